"""One request on its way: from token ids to pieces of text, with everything that is counted in between."""

from __future__ import annotations

import time
import warnings
from array import array
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .errors import PromptError
from .generate import Pins, generate
from .model import Transformer
from .results import FinishReason, Result, Timings, TokenLogprob, Usage
from .sampling import SamplingParams
from .text import IncrementalDecoder, StopMatcher

if TYPE_CHECKING:
    from .session import Session

Progress = Callable[[int, int | None], None]  # tokens read so far, and in all where that is known
LOGIT_ROWS = 32  # positions that go through the output projection together: bounds the logits to 32 x V


class _StoppedInPromptError(Exception):
    """`stop` was called while the prompt was read."""


class Stream(Iterator[str]):
    """Pieces of an answer's text, as they come.  `.result` may be asked at any time; before the end it says "abort".

    Nothing is computed before the first piece is asked for.  A newer request on the same LLM, be it of the same
    session, takes the cache over: going on with this one then raises.
    """

    def __init__(
        self,
        session: Session,
        prompt: Tensor | Iterator[Tensor] | None,
        params: SamplingParams,
        *,
        continuation: bool = False,
        pins: Pins = (),
        length: int | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Feed a session's pending token and a prompt: tokens [n], or pieces of an endless one, or nothing more.

        Raises what `Session.require_room` raises, and nothing has happened then.
        length: tokens of the prompt in all, where it comes in pieces and that is known.
        continuation: the answer goes on with the prompt's text, so a space before its first word is real.
        """
        llm, pending = session.llm, torch.tensor(session.pending, dtype=torch.int32)
        if prompt is None or isinstance(prompt, Tensor):
            prompt = pending if prompt is None else torch.cat((pending, prompt))
        else:
            prompt = chain([pending], prompt)
            if not llm.plan.evicts:
                prompt = collect(prompt, llm.plan.slots - session.seen + 1)  # enough to know that it does not fit
        known = len(prompt) if isinstance(prompt, Tensor) else length and length + len(pending)
        pins = session.shifted(pins)
        room = session.require_room(known or 1, pins)
        self.session, self.llm, self.prompt, self.params, self.sampler = session, llm, prompt, params, session.sampler
        # A cache that may not evict ends the answer when it is full; the last token drawn is never fed.
        self._limit = min(params.max_tokens, room - (known or 0) + 1)
        self._pins, self._progress, self._known = pins, progress, known
        self._ids, self._texts = array("i"), [""]
        self._logprobs: list[TokenLogprob] = []
        self._prompt_logprobs: list[TokenLogprob | None] = []
        self._before: Tensor | None = None  # the hidden state [1, hidden] before the present chunk of the prompt
        self._stopping = False
        self._shorter = (
            session.seen <= llm.checkpoint.config.max_position_embeddings
        )  # than what the model was trained on
        self.prompt_tokens = 0  # fed so far
        self._started = self._first_at = self._last_at = 0.0
        self._finish: FinishReason = "abort"
        self._pieces = self._run(llm.checkpoint.tokenizer.stream(continuation=continuation))

    def __next__(self) -> str:
        return next(self._pieces)

    def finish(self) -> Result:
        """Run to the end."""
        for _ in self:
            pass
        return self.result

    def stop(self) -> None:
        """Ask for an early end, from a signal handler or another thread: heeded after the present chunk or token."""
        self._stopping = True

    @property
    def completion_tokens(self) -> int:
        """Tokens drawn so far."""
        return len(self._ids)

    @property
    def result(self) -> Result:
        """What there is so far; reads the device once."""
        llm, produced = self.llm, len(self._ids)
        waited, generating = self._first_at - self._started, self._last_at - self._first_at
        return Result(
            text="".join(self._texts),
            token_ids=self._ids.tolist(),
            finish_reason=self._finish,
            usage=Usage.of(llm.cache, prompt=self.prompt_tokens, completion=produced),
            cache=llm.plan.summary(),
            timings=Timings(
                first_token_s=max(0.0, waited),
                generation_s=generating,
                prompt_tokens_per_s=self.prompt_tokens / waited if waited > 0 else 0.0,
                generation_tokens_per_s=(produced - 1) / generating if generating > 0 else 0.0,
            ),
            seed=self.sampler.seed,
            logprobs=None if self.params.logprobs is None else self._logprobs,
            prompt_logprobs=None if self.params.prompt_logprobs is None else self._prompt_logprobs,
        )

    def _run(self, decoder: IncrementalDecoder) -> Iterator[str]:
        """Generate, and show text as soon as it is certain: whole characters, and no beginning of a stop string."""
        stops = StopMatcher(self.params.stop)
        for token_id in self._tokens():
            ended = self.sampler.is_stop(token_id)
            text, stopped = stops.push(decoder.flush() if ended else decoder.push(token_id))
            if ended or stopped:
                self._finish = "stop"
            yield from self._show(text)
            if stopped:
                return
        text = stops.push(decoder.flush())[0] + stops.flush()
        if stops.stopped:
            self._finish = "stop"
        elif self._finish != "stop" and not self._stopping:
            self._finish = "length"
        yield from self._show(text)

    def _show(self, text: str) -> Iterator[str]:
        if text:
            self._texts.append(text)
            yield text

    def _tokens(self) -> Iterator[int]:
        """The token ids as they are drawn, noted and timed."""
        llm = self.llm
        self._require_cache()
        self._started = time.perf_counter()
        samples = generate(
            llm.model,
            llm.cache,
            self.prompt,
            self.sampler,
            max_tokens=self._limit,
            chunk=llm.chunk,
            pins=self._pins,
            on_prompt=self._note_prompt,
        )
        try:
            for sample in samples:
                self._last_at = time.perf_counter()
                self._first_at = self._first_at or self._last_at
                self._ids.append(sample.token_id)
                self.session.pending = [] if self.sampler.is_stop(sample.token_id) else [sample.token_id]
                if sample.logprob is not None:
                    self._logprobs.append(TokenLogprob(sample.token_id, sample.logprob, sample.top))
                self._note_length()
                llm.check_memory()
                yield sample.token_id
                self._require_cache()
                if self._stopping:
                    return
        except _StoppedInPromptError:
            return
        except (Exception, KeyboardInterrupt):
            llm.owner = None  # a forward pass was cut in the middle: nobody may go on with what is in the cache
            raise

    def _note_length(self) -> None:
        """Say so once, when the sequence grows longer than those that the model was trained on."""
        trained, cache = self.llm.checkpoint.config.max_position_embeddings, self.llm.cache
        if self._shorter and cache.seen[0] > trained:
            then = "it extrapolates" if cache.trained is None else "it looks back no further than that"
            warnings.warn(
                f"the sequence is now longer than the {trained:,} tokens that {self.llm.checkpoint.name} was trained "
                f"for: from here on {then}",
                stacklevel=2,
            )
        self._shorter = cache.seen[0] <= trained

    def _require_cache(self) -> None:
        if self.llm.owner is not self:
            raise PromptError(
                "a newer request has taken over this LLM's cache; for two at a time use a second LLM over one model"
            )

    def _note_prompt(self, tokens: Tensor, hidden: Tensor) -> None:
        """Look at one chunk of the prompt, tokens [1, T] and hidden states [1, T, hidden]: for what was asked for."""
        start, self.prompt_tokens = self.prompt_tokens, self.prompt_tokens + tokens.shape[1]
        self.session.pinned += overlap(self._pins, start, self.prompt_tokens)
        self.session.pending, self.session.pending_pinned = [], False
        self._note_length()
        self.llm.check_memory()
        self.sampler.observe_prompt(tokens[0])
        if self.params.prompt_logprobs is not None:
            targets, before = tokens[0].to(torch.int64), hidden[0, :-1]  # [T], [T - 1, hidden]
            if self._before is None:
                self._prompt_logprobs.append(None)  # nothing predicts the first token
                targets = targets[1:]
            else:
                before = torch.cat((self._before, before))
            self._before = hidden[0, -1:]
            blocks = log_probabilities(self.llm.model, before, self.llm.real_vocab)
            for block, wanted in zip(blocks, targets.split(LOGIT_ROWS), strict=True):
                self._prompt_logprobs += _describe(block.cpu(), wanted, self.params.prompt_logprobs)
        if self._progress is not None:
            self._progress(self.prompt_tokens, self._known)
        if self._stopping:
            raise _StoppedInPromptError


def overlap(pins: Pins, start: int, stop: int) -> int:
    """How many of the tokens start..stop are pinned."""
    return sum(max(0, min(stop, last) - max(start, first)) for first, last in pins)


def collect(pieces: Iterable[Tensor], enough: int) -> Tensor:
    """Pieces of tokens as one tensor [n]; no more are asked for once there are `enough`."""
    found, count = [torch.empty(0, dtype=torch.int32)], 0
    for piece in pieces:
        found.append(piece)
        count += len(piece)
        if count >= enough:
            break
    return torch.cat(found)


def log_probabilities(model: Transformer, hidden: Tensor, real_vocab: int) -> Iterator[Tensor]:
    """Log-probabilities over the real vocabulary for hidden states [T, hidden], a few positions at a time: [<=32,
    V'].
    """
    for block in hidden.split(LOGIT_ROWS):
        yield model.logits(block)[:, :real_vocab].log_softmax(-1)  # [n, V']


def target_logprobs(model: Transformer, hidden: Tensor, targets: Tensor, real_vocab: int) -> Tensor:
    """log p of targets [T] given the hidden states [T, hidden] before them: [T]."""
    blocks = zip(log_probabilities(model, hidden, real_vocab), targets.split(LOGIT_ROWS), strict=True)
    return torch.cat([block.gather(1, wanted[:, None])[:, 0] for block, wanted in blocks])  # [T]


def _describe(logprobs: Tensor, targets: Tensor, count: int) -> list[TokenLogprob]:
    """logprobs [n, V'] and the n tokens that came -> what `logprobs=count` reports of each."""
    values, ids = logprobs.topk(min(count, logprobs.shape[1]))  # [n, count]
    chosen = logprobs.gather(1, targets[:, None])[:, 0]  # [n]
    return [
        TokenLogprob(token, logprob, list(zip(best, scores, strict=True)))
        for token, logprob, best, scores in zip(
            targets.tolist(), chosen.tolist(), ids.tolist(), values.tolist(), strict=True
        )
    ]
