"""Text in, text out: a model, its tokenizer and one bounded cache.

    llm = LLM.load("mistral-7b", budget=0.3)
    print(llm.generate("Once upon a time").text)

The library's front.  It prints nothing; the command line is built on it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor

from .answer import Progress, collect, target_logprobs
from .budget import CachePlan
from .cache import MAX_POSITION
from .chat import Message
from .checkpoint import Checkpoint
from .errors import PromptError
from .generate import feed
from .hub import EMBEDDED
from .model import Transformer
from .planner import MemoryPlan
from .results import Result, Score, Usage
from .sampling import SamplingParams
from .session import Prompt, Session
from .shard import ALONE, Team
from .slots import PUNCTUATION, SPECIAL
from .stream import Stream

if TYPE_CHECKING:
    from .backends.graph import Steps


class LLM:
    """Owns one cache, allocated here and never again.  One request at a time: a new one ends the one before.

    Any number of LLMs may share one model: `LLM(llm.checkpoint, llm.model, llm.checkpoint.plan(budget=64))`.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        model: Transformer,
        plan: CachePlan,
        *,
        chunk: int = 256,
        memory: MemoryPlan | None = None,
    ) -> None:
        """`chunk`: how many tokens of a prompt go through the linear layers together (memory against speed).

        memory: what this process was planned to hold, and the promise that is watched while it runs.
        """
        if chunk < 1:
            raise PromptError(f"chunk must be at least 1 token, not {chunk}; the default is 256")
        self.checkpoint, self.model, self.plan, self.chunk, self.memory = checkpoint, model, plan, chunk, memory
        self.cache = plan.allocate(checkpoint.device)
        self.team: Team = checkpoint.team  # who counts and draws together
        if plan.policy.needs_kinds:
            self.cache.kinds = torch.zeros(checkpoint.config.vocab_size, dtype=torch.uint8)
            self.cache.kinds[checkpoint.tokenizer.special_ids()] = SPECIAL
            self.cache.kinds[checkpoint.tokenizer.punctuation_ids()] = PUNCTUATION
        self.owner: object = None  # whoever fed the cache last: nobody else may go on with what is in it

    @cached_property
    def steps(self) -> Steps | None:
        """Recorded decode steps, where the backend makes them: before the first answer, as who scores needs none.

        Those of a server's many rows are its engine's business.
        """
        return self.checkpoint.recorded(self.model, self.cache) if self.plan.rows == 1 else None

    @classmethod
    def load(
        cls,
        name: str = EMBEDDED,
        *,
        chunk: int = 256,
        dtype: str = "auto",
        device: str = "auto",
        revision: str | None = None,
        offline: bool = False,
        weights: str = "auto",
        backend: str = "auto",
        memory: str | int | None = None,
        team: Team = ALONE,
        **cache_options: Any,
    ) -> LLM:
        """Load a model by alias, hub id or folder.

        weights: "int8", "int8-a16" or "int4" quantises linear layers while loading.  backend: see Checkpoint.open.
        memory: what the whole process may hold, such as "6GiB"; it runs in that for ever, or stops with
            MemoryPromiseError.  Without a budget the largest is chosen that fits.
        team: the processes that compute it together, see `parallel.connected`; budget and memory are of each.
        cache_options: those of `Checkpoint.plan`, such as
            budget: what is kept - a fraction of the context (0.3), tokens (2048), bytes ("512MiB"), None = everything.
            context: the whole of a fraction; default the smaller of the model's context and 8,192.
            policy, sinks, recent, evict_every, layer_budget, kv_dtype, positions, on_overflow, and the policy's own.
        Raises MinillmError's descendants, all of them before the weights are read except damage to the weights.
        """
        where = {"dtype": dtype, "device": device, "weights": weights, "backend": backend, "revision": revision}
        checkpoint = Checkpoint.open(name, offline=offline, team=team, **where)  # type: ignore[arg-type]
        plan = checkpoint.plan(memory=memory, chunk=chunk, **cache_options)
        needs = checkpoint.memory_plan(plan, memory=memory, chunk=chunk)
        needs.require()
        return cls(checkpoint, checkpoint.load_model(), plan, chunk=chunk, memory=needs)

    @overload
    def generate(self, prompt: list[str], **options: object) -> list[Result]: ...
    @overload
    def generate(self, prompt: Prompt, **options: object) -> Result: ...
    def generate(self, prompt: Prompt | list[str], **options: object) -> Result | list[Result]:
        """Answer one prompt, or each of a list, from an empty cache.  Options as in `stream`."""
        if isinstance(prompt, list) and prompt and isinstance(prompt[0], str):
            return [self.stream(one, **options).finish() for one in prompt]  # type: ignore[arg-type]
        return self.stream(prompt, **options).finish()  # type: ignore[arg-type]

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        raw: bool = False,
        system: str | None = None,
        length: int | None = None,
        progress: Progress | None = None,
        **sampling: object,
    ) -> Stream:
        """An iterator over the pieces of the answer's text; its `.result` says everything else.

        prompt: text, which is put into the model's chat template where it has one (`raw`: not), or token ids; or an
        iterator over pieces of either, of any length (`length`: so many tokens in all, if known).
        params, or its fields as keywords over the checkpoint's own defaults: `stream("Hi", temperature=0.7)`.
        progress(tokens read, tokens in all if known) follows a long prompt.
        """
        tokens: Tensor | Iterator[Tensor]
        if isinstance(prompt, str):
            tokens = self.encode(prompt, raw=raw, system=system)
        elif isinstance(prompt, Iterator):
            tokens = self._pieces(prompt, raw=raw, system=system)
        else:
            tokens = self.ids(prompt)
        return self.session(params, **sampling).stream(
            tokens, length=length, progress=progress, continuation=raw or self.checkpoint.template is None
        )

    def session(self, params: SamplingParams | None = None, **sampling: object) -> Session:
        """A sequence that is fed, continued, saved and restored piece by piece; parameters as in `stream`."""
        return Session(self, self._params(params, sampling))

    def chat(self, messages: Sequence[Message], params: SamplingParams | None = None, **sampling: object) -> Result:
        """Answer a conversation, given whole, from an empty cache.  `Conversation` is one that lives in the cache."""
        template = self.checkpoint.template
        if template is None:
            raise PromptError(f"{self.checkpoint.name} has no chat template; use generate, which continues plain text")
        tokens = self.ids(self.checkpoint.tokenizer.encode(template.render(messages), bos=False))
        return self.session(params, **sampling).stream(tokens, continuation=False).finish()

    def encode(self, text: str | Iterable[str], *, raw: bool = False, system: str | None = None) -> Tensor:
        """Token ids [n] int32 of a prompt, as `generate` feeds it.

        Raises PromptError where nothing would be left to feed, or for a system message that nothing can carry.
        """
        return collect(encode_prompt(self.checkpoint, text, raw=raw, system=system), MAX_POSITION)

    @torch.inference_mode()
    def score(
        self,
        tokens: Sequence[int] | Tensor,
        *,
        rows: int | None = None,
        context: int | None = None,
        progress: Progress | None = None,
    ) -> Score:
        """How well the model predicts token ids [n] under its budget: the mean -log p of all but each row's first.

        The stream is cut into rows of context + 1 tokens (None: one row), each scored from an empty cache; `rows`
        limits them.  The same bounded path as generation, fed with the text itself (teacher forcing).
        """
        ids = self.ids(tokens)
        pieces = ids.split(len(ids) if context is None else context + 1)[:rows]
        pieces = tuple(piece for piece in pieces if len(piece) > 1)
        if not pieces:
            raise PromptError(
                f"a text of {len(ids)} tokens has nothing to score: the first token is given, not predicted"
            )
        total, done, count = 0.0, 0, sum(len(piece) - 1 for piece in pieces)
        self.owner = None
        for piece in pieces:
            self.cache.reset()
            self.plan.require_room(len(piece) - 1)
            at = 0
            for _, hidden in feed(self.model, self.cache, piece[None, :-1], self.chunk):  # [1, T, hidden]
                targets = piece[at + 1 : at + 1 + hidden.shape[1]].to(hidden.device, torch.int64)  # [T]
                scored = target_logprobs(self.model, hidden[0], targets, self.real_vocab)  # [T]
                total -= float(scored.sum(dtype=torch.float64))
                at += len(targets)
                self.check_memory()
                if progress is not None:
                    progress(done + at, count)
            done += at
        usage = Usage.of(self.cache, self.team, prompt=count, completion=0)
        nats = total / count
        return Score(count, nats, math.exp(nats), usage, self.plan.summary())

    def check_memory(self) -> None:
        """Raise MemoryPromiseError if this process holds more than it was promised to; asked after every step."""
        if self.memory is not None:
            self.memory.check()

    @property
    def real_vocab(self) -> int:
        """Ids that mean something: rows of the output projection beyond the tokenizer's are padding."""
        return min(self.checkpoint.tokenizer.vocab_size, self.checkpoint.config.vocab_size)

    def _pieces(self, prompt: Iterator[str] | Iterator[Tensor], *, raw: bool, system: str | None) -> Iterator[Tensor]:
        """Pieces of token ids, out of pieces of ids or of text."""
        first = next(prompt, "")
        if isinstance(first, str):
            return encode_prompt(self.checkpoint, chain([first], prompt), raw=raw, system=system)  # type: ignore[arg-type]
        return map(self.ids, chain([first], prompt))  # type: ignore[arg-type]

    def _params(self, params: SamplingParams | None, sampling: dict[str, object]) -> SamplingParams:
        if params is not None:
            if sampling:
                raise PromptError(f"both params and {', '.join(sampling)} were given: put everything into one of them")
            return params
        return SamplingParams(**{**self.checkpoint.sampling_defaults, **sampling})  # type: ignore[arg-type]

    def ids(self, prompt: Sequence[int] | Tensor) -> Tensor:
        """Token ids as int32 [n]; raises PromptError for none, or one that the model has no embedding for."""
        tokens = torch.as_tensor(prompt).to("cpu")
        if tokens.numel() == 0:
            raise PromptError("the prompt is empty: give at least one token")
        if tokens.ndim != 1 or tokens.is_floating_point():
            raise PromptError(
                f"token ids must be one row of whole numbers, not {tokens.dtype} of shape {list(tokens.shape)}"
            )
        low, high, limit = int(tokens.min()), int(tokens.max()), self.checkpoint.config.vocab_size
        if low < 0 or high >= limit:
            raise PromptError(
                f"token id {low if low < 0 else high} is out of range: the model has ids 0 to {limit - 1}"
            )
        return tokens.to(torch.int32)


def encode_prompt(
    checkpoint: Checkpoint, text: str | Iterable[str], *, raw: bool = False, system: str | None = None
) -> Iterator[Tensor]:
    """See `LLM.encode`; pieces of tokens [n] for pieces of text, however many.  Needs no weights."""
    tokenizer, template = checkpoint.tokenizer, None if raw else checkpoint.template
    if system is not None and template is None:
        raise PromptError(
            f"a system message needs a chat template, and {'--raw turns it off' if raw else 'there is none'}"
        )
    if template is None:
        tokens = tokenizer.encode_pieces([text] if isinstance(text, str) else text, bos=True)
    else:
        opening: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        if isinstance(text, str):
            pieces: Iterable[str] = [template.render([*opening, {"role": "user", "content": text}])]
        else:  # a text too long for the template: render around it
            before, after = template.render_around(opening)
            pieces = chain([before], text, [after])
        tokens = tokenizer.encode_pieces(pieces, bos=False)
    first = next(tokens, None)  # now, and not when it is too late to say what is wrong
    if first is None:
        raise PromptError("the prompt is empty and this model has no beginning-of-sequence token: give some text")
    return chain([first], tokens)
