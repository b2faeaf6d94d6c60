"""A model for lm-evaluation-harness whose every request is read, scored and answered inside a memory budget.

    python -m minillm.lab.harness --model minillm --model_args pretrained=mistral-7b,budget=0.3 --tasks gsm8k

is `lm_eval` with one more model.  (Releases of lm_eval that look for the entry points of other packages find it by
themselves; 0.4.13 does not.)  Nothing is compressed after the fact: a context goes through the bounded cache as in
generation, and the continuation is scored token by token (teacher forcing) while eviction goes on.

What a fraction is a fraction of, where `context` does not say: for an answer, prompt + max_gen_toks; for choices, their
common context + the longest of them, so that all are scored in one cache; for running text, each window.  Tokens are
taken as they are, and so are bytes.  Without a budget a request keeps all of itself.  Nothing is ever cut off: what is
longer than the model was trained for goes through the window that an evicting cache slides, or is extrapolated.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from ..answer import LOGIT_ROWS, log_probabilities
from ..checkpoint import Checkpoint
from ..errors import ConfigError, MinillmError, PromptError, TemplateError
from ..generate import feed
from ..hub import EMBEDDED
from ..llm import LLM
from ..sampling import SamplingParams
from ..version import __version__
from .ask import Fork

try:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM
    from lm_eval.api.registry import MODEL_REGISTRY, register_model
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
    from tqdm import tqdm  # the bars that every model of lm_eval shows
except ModuleNotFoundError as absent:
    message = f"lm-evaluation-harness is not complete here, {absent.name} is missing: pip install 'minillm[lab]'"
    if __name__ == "__main__":
        argparse.ArgumentParser().exit(2, f"minillm: error: {message}\n")
    raise ConfigError(message) from None

SAMPLING = {"temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"}
ANSWER = 256  # tokens of an answer where a task does not say, as lm_eval's own models have it


class MiniLLM(LM):  # type: ignore[misc]  # lm_eval has no types
    """One request at a time, in one cache, which is allocated anew only where a request needs another size."""

    def __init__(
        self,
        pretrained: str = EMBEDDED,
        *,
        budget: str | float | None = None,
        context: int | None = None,
        max_length: int | None = None,
        chunk: int = 256,
        dtype: str = "auto",
        device: str = "auto",
        revision: str | None = None,
        offline: bool = False,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        **cache_options: Any,
    ) -> None:
        """What `--model_args` may say; pretrained is an alias, hub id or folder, cache_options as in CachePlan.of.

        budget, context: see above.  device, batch_size: what lm_eval's own options --device and --batch_size say.
        max_length: tokens of a window of running text (loglikelihood_rolling), by default as many as the model was
        trained for; a budget that evicts may be given one of any length.
        Raises MinillmError's descendants.
        """
        super().__init__()
        if batch_size not in (1, "1", "auto") or max_batch_size is not None:
            raise ConfigError(
                "requests go through the cache one at a time: leave --batch_size and --max_batch_size out"
            )
        if cache_options.pop("memory", None) is not None:
            raise ConfigError("memory cannot be promised here, a cache is copied for every choice: name a budget")
        if device == "cuda:0":  # lm_eval's default, on machines without a GPU too
            device = "auto"
        self.checkpoint = Checkpoint.open(pretrained, dtype=dtype, device=device, revision=revision, offline=offline)
        self._plan_options = {**cache_options, "budget": budget}
        self._context, self._chunk = context, chunk
        self.checkpoint.plan(**self._plan_options, context=context)  # a mistake in the options is said now
        self.max_length = self.checkpoint.config.max_position_embeddings if max_length is None else max_length
        if self.max_length < 1:
            raise ConfigError(f"max_length must be at least 1 token, not {max_length}; leave it out for the default")
        self.prefix = self._prefix()
        self.model = self.checkpoint.load_model()
        self._llm: LLM | None = None
        self._templated = False  # whether contexts come with their own special tokens
        self._device = self.checkpoint.device

    def loglikelihood(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log p of the continuation, whether it is the greedy one) for every (context, continuation).

        The choices of one document that share a context are scored after reading it once.
        """
        groups: dict[tuple[Any, ...], list[tuple[int, list[int]]]] = {}
        for number, request in enumerate(requests):
            before, after = self.encode_pair(*request.args)
            groups.setdefault((request.task_name, request.doc_id, *before), []).append((number, after))
        found: dict[int, tuple[float, bool]] = {}
        with tqdm(total=len(requests), desc="loglikelihood", disable=disable_tqdm) as bar:
            for (_, _, *before), members in groups.items():
                answers = self.score(before, [after for _, after in members])
                for (number, _), answer in zip(members, answers, strict=True):
                    self.cache_hook.add_partial("loglikelihood", requests[number].args, answer)
                    found[number] = answer
                bar.update(len(members))
        return [found[number] for number in range(len(requests))]

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """log p of every text after BOS, in windows of `max_length` tokens as lm_eval's own models read it."""
        totals = []
        for request in tqdm(requests, desc="loglikelihood_rolling", disable=disable_tqdm):
            tokens = self.checkpoint.tokenizer.encode(request.args[0], bos=False)
            windows = get_rolling_token_windows(tokens, self.prefix, self.max_length, 1)
            parts = (self.score(before, [after]) for before, after in map(make_disjoint_window, windows))
            totals.append(sum(part[0][0] for part in parts))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, totals[-1])
        return totals

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """The answer to every (context, generation arguments), up to a string of its `until`, which is left out."""
        answers = []
        for number, request in enumerate(tqdm(requests, desc="generate_until", disable=disable_tqdm)):
            context, given = request.args
            params, tokens = sampling(given, number), self._encode(context) or [self.prefix]
            llm = self._reader(len(tokens) + params.max_tokens)
            answers.append(llm.stream(tokens, params, raw=not self._templated).finish().text)
            self.cache_hook.add_partial("generate_until", request.args, answers[-1])
        return answers

    @torch.inference_mode()
    def score(self, context: Sequence[int], continuations: Sequence[Sequence[int]]) -> list[tuple[float, bool]]:
        """For each continuation of a context, both token ids: its log p in nats, and whether each token is the
        likeliest.  The context is read once; every continuation goes to a copy of what was kept of it.
        """
        assert all(continuations)
        length = len(context) + max(map(len, continuations))
        llm = self._reader(length)
        llm.plan.require_room(length - 1)
        trained = self.checkpoint.config.max_position_embeddings
        if length > trained and llm.plan.position_mode == "absolute":
            warnings.warn(
                f"requests are longer than the {trained:,} tokens that the model was trained for: it extrapolates",
                stacklevel=2,
            )
        llm.owner = None
        llm.cache.reset()
        for _, hidden in feed(llm.model, llm.cache, torch.tensor([context]), llm.chunk):  # [1, T, hidden]
            last = hidden[:, -1:]  # [1, 1, hidden]
        # A continuation of one token is not fed at all.
        fork = Fork(llm.cache) if sum(len(ids) > 1 for ids in continuations) > 1 else None
        found = []
        for ids in continuations:
            if fork is not None:
                fork.restore_()
            found.append(_score_after(llm, last, torch.tensor(ids)))
        return found

    def encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Token ids of both, cut where those of the context alone end; spaces between them go to the continuation.

        The rule of lm_eval's own models, so that their numbers are comparable.  An empty context is BOS.  Raises
        PromptError where nothing is left of the continuation.
        """
        if not context:
            ids = self.checkpoint.tokenizer.encode(continuation, bos=False)
            before, after = (ids[:1], ids[1:]) if ids[:1] == [self.prefix] else ([self.prefix], ids)
        else:
            before, whole = self._encode(context.rstrip()), self._encode(context + continuation)
            before, after = before or [self.prefix], whole[len(before) :]
        if not after:
            raise PromptError(
                f"{continuation!r} after {context[-20:]!r} has no token of its own, so there is nothing to score: let "
                "the task begin its choices with a space"
            )
        return before, after

    @property
    def tokenizer_name(self) -> str:
        """What lm_eval's cache of rendered requests tells models apart by."""
        return self.checkpoint.name.replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The source of the checkpoint's template, for the report; from here on contexts bring their special tokens."""
        if not chat_template:
            return None
        if self.checkpoint.template is None:
            raise TemplateError(f"{self.checkpoint.name} has no chat template: leave --apply_chat_template out")
        if chat_template is not True:
            raise ConfigError("a chat template cannot be chosen by name: say --apply_chat_template without one")
        self._templated = True
        return self.checkpoint.template._source

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as text; without the prompt for an answer it ends in the middle of the last message."""
        self.chat_template(True)
        assert self.checkpoint.template is not None  # said above
        messages: list[Any] = chat_history
        text = self.checkpoint.template.render(messages, add_generation_prompt=add_generation_prompt)
        last = chat_history[-1]["content"].strip()
        return text if add_generation_prompt or not last else "".join(text.rpartition(last)[:2])

    def get_model_info(self) -> dict[str, Any]:
        """What goes into the report beside the arguments."""
        return {
            "minillm_version": __version__,
            "model_num_parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "model_dtype": str(self.checkpoint.dtype).removeprefix("torch."),
            "cache_of_last_request": None if self._llm is None else self._llm.plan.summary(),
        }

    def _reader(self, length: int) -> LLM:
        """The model with the cache that a request of so many tokens gets."""
        plan = self.checkpoint.plan(**self._plan_options, context=self._context or length)
        if self._llm is None or plan.retentions != self._llm.plan.retentions:
            self._llm = None  # one cache goes before the next one comes
            with torch.inference_mode(False):  # else nothing could be written into it outside of that mode
                self._llm = LLM(self.checkpoint, self.model, plan, chunk=self._chunk)
        return self._llm

    def _encode(self, text: str) -> list[int]:
        return self.checkpoint.tokenizer.encode(text, bos=not self._templated)

    def _prefix(self) -> int:
        """What stands before a text that has nothing before it."""
        tokenizer = self.checkpoint.tokenizer
        if tokenizer.bos_id is not None:
            return tokenizer.bos_id
        if not self.checkpoint.eos_ids:
            raise PromptError(f"{self.checkpoint.name} has no token that begins or ends a text: nothing can be scored")
        return min(tokenizer.eos_ids or self.checkpoint.eos_ids)


def sampling(given: dict[str, Any], number: int) -> SamplingParams:
    """lm_eval's generation arguments as ours; `number`: of the request, so that repeated ones are drawn differently.

    Greedy unless a temperature is given.  Raises ConfigError for an argument that could not take effect.
    """
    options = dict(normalize_gen_kwargs(given, ANSWER))
    stop, most, seed = options.pop("until"), options.pop("max_gen_toks"), options.pop("seed", 0)
    greedy = not options.pop("do_sample")
    chosen = {name: value for name, value in options.items() if value is not None}
    if unknown := chosen.keys() - SAMPLING:
        known = ", ".join(sorted(SAMPLING | {"until", "max_gen_toks", "do_sample", "seed"}))
        raise ConfigError(f"generation argument {', '.join(sorted(unknown))} is not supported; these are: {known}")
    chosen["temperature"] = 0.0 if greedy else float(chosen.get("temperature", 1.0))
    return SamplingParams(stop=tuple(filter(None, stop)), max_tokens=most, seed=seed + number, **chosen)


def _score_after(llm: LLM, last: Tensor, targets: Tensor) -> tuple[float, bool]:
    """Score tokens [n] after what the cache holds, whose last hidden state is [1, 1, hidden]."""
    total, greedy, at = 0.0, True, 0
    fed = (hidden for _, hidden in feed(llm.model, llm.cache, targets[None, :-1], llm.chunk))  # [1, T, hidden]
    for hidden in chain([last], fed):
        wanted = targets[at : at + hidden.shape[1]].to(hidden.device)  # [T]
        blocks = log_probabilities(llm.model, hidden[0], llm.real_vocab)  # [<=32, V'] each
        for block, ids in zip(blocks, wanted.split(LOGIT_ROWS), strict=True):
            total += float(block.gather(1, ids[:, None]).sum(dtype=torch.float64))
            greedy = greedy and bool((block.argmax(1) == ids).all())
        at += len(wanted)
    return total, greedy


def main() -> None:
    """lm_eval's own command line; a mistake is one line and exit code 2."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except MinillmError as error:
        argparse.ArgumentParser().exit(2, f"minillm: error: {' '.join(str(error).splitlines())}\n")


# Newer releases have it from our entry point already; run as a program, this module is there under two names.
if "minillm" not in MODEL_REGISTRY:
    register_model("minillm")(MiniLLM)

if __name__ == "__main__":
    main()
