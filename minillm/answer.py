"""One answer as it comes: from drawn tokens to pieces of text, with everything that is counted in between.

Whoever runs the model - stream.py one sequence, the server's engine many - tells it what was read and drawn.
"""

from __future__ import annotations

import time
import warnings
from array import array
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .generate import Pins
from .model import Transformer
from .results import FinishReason, Result, Timings, TokenLogprob, Usage
from .sampling import Sample, SamplingParams
from .text import StopMatcher

if TYPE_CHECKING:
    from .session import Session

Progress = Callable[[int, int | None], None]  # tokens read so far, and in all where that is known
LOGIT_ROWS = 32  # positions that go through the output projection together: bounds the logits to 32 x V


class Answer:
    """`read` is told every chunk of the prompt, `draw` every token; `over` says when no more are wanted.

    Between the two the session is always whole: what it has seen, and the one token that is pending.
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
        """To a session's pending token and a prompt: tokens [n], or pieces of an endless one, or nothing more.

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
        self.pins = session.shifted(pins)
        room = session.require_room(known or 1, self.pins)
        self.session, self.llm, self.prompt, self.params, self.sampler = session, llm, prompt, params, session.sampler
        # A cache that may not evict ends the answer when it is full; the last token drawn is never fed.
        self.max_tokens = min(params.max_tokens, room - (known or 0) + 1)
        self._progress, self._known = progress, known
        self._decoder = llm.checkpoint.tokenizer.stream(continuation=continuation)
        self._stops = StopMatcher(params.stop)
        self._ids, self._texts = array("i"), [""]
        self.logprobs: list[TokenLogprob] = []
        self.prompt_logprobs: list[TokenLogprob | None] = []
        self._before: Tensor | None = None  # the hidden state [1, hidden] before the present chunk of the prompt
        self._shorter = (
            session.seen <= llm.checkpoint.config.max_position_embeddings
        )  # than what the model was trained on
        self.prompt_tokens = 0  # fed so far
        self.decoded = 0  # characters that the tokens drawn so far stand for, shown or held back
        self._started = self._first_at = self._last_at = 0.0
        self.finish_reason: FinishReason = "abort"  # until it is known better
        self.over = False

    def begin(self) -> None:
        """The clock starts."""
        self._started = time.perf_counter()

    def read(self, tokens: Tensor, hidden: Tensor) -> None:
        """One chunk of the prompt, tokens [1, T], has become hidden states [1, T, hidden]: note what was asked for."""
        start, self.prompt_tokens = self.prompt_tokens, self.prompt_tokens + tokens.shape[1]
        self.session.pinned += overlap(self.pins, start, self.prompt_tokens)
        self.session.pending, self.session.pending_pinned = [], False
        self._note_length()
        self.llm.check_memory()
        self.sampler.observe_prompt(tokens[0])
        if self.params.prompt_logprobs is not None:
            self._note_prompt_logprobs(tokens[0].to(torch.int64), hidden[0], self.params.prompt_logprobs)
        if self._progress is not None:
            self._progress(self.prompt_tokens, self._known)

    def draw(self, sample: Sample) -> str:
        """A token was drawn: the text that is certain now - whole characters, and no beginning of a stop string."""
        self._last_at = time.perf_counter()
        self._first_at = self._first_at or self._last_at
        self._ids.append(sample.token_id)
        ended = self.sampler.is_stop(sample.token_id)
        self.session.pending = [] if ended else [sample.token_id]
        if sample.logprob is not None:
            self.logprobs.append(TokenLogprob(sample.token_id, sample.logprob, sample.top))
        self._note_length()
        self.llm.check_memory()
        text = self._decoder.flush() if ended else self._decoder.push(sample.token_id)
        self.decoded += len(text)
        text, stopped = self._stops.push(text)
        if ended or stopped:
            self.finish_reason = "stop"
        self.over = stopped or ended or len(self._ids) >= self.max_tokens
        return self._shown(text)

    def close(self, *, aborted: bool = False) -> str:
        """No more tokens come: the rest of the text."""
        self.over = True
        text = self._stops.push(self._decoder.flush())[0] + self._stops.flush()
        if self._stops.stopped:
            self.finish_reason = "stop"
        elif self.finish_reason != "stop" and not aborted:
            self.finish_reason = "length"
        return self._shown(text)

    @property
    def cut(self) -> bool:
        """Whether a stop string ended it, so that the text of the latest tokens is not shown."""
        return self._stops.stopped

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
            finish_reason=self.finish_reason,
            usage=Usage.of(llm.cache, llm.team, prompt=self.prompt_tokens, completion=produced),
            cache=llm.plan.summary(),
            timings=Timings(
                first_token_s=max(0.0, waited),
                generation_s=generating,
                prompt_tokens_per_s=self.prompt_tokens / waited if waited > 0 else 0.0,
                generation_tokens_per_s=(produced - 1) / generating if generating > 0 else 0.0,
            ),
            seed=self.sampler.seed,
            logprobs=None if self.params.logprobs is None else self.logprobs,
            prompt_logprobs=None if self.params.prompt_logprobs is None else self.prompt_logprobs,
        )

    def _shown(self, text: str) -> str:
        self._texts.append(text)
        return text

    def _note_length(self) -> None:
        """Say so once, when the sequence grows longer than those that the model was trained on."""
        trained, cache = self.llm.checkpoint.config.max_position_embeddings, self.llm.cache
        if self._shorter and cache.seen[0] > trained:
            then = "it extrapolates" if cache.trained is None else "it looks back no further than that"
            plan = self.llm.plan
            enough = trained + plan.retention.evict_every  # so many are free at once
            # Pins would take room of others, and layers that differ would share fewer slots in other parts.
            alike = len(set(plan.retentions)) == 1 and not any(layer.flagged for layer in cache.layers)
            if cache.trained and plan.evicts and alike and plan.retention.slots > enough:
                then += f", for which --budget {enough} is enough"
            warnings.warn(
                f"the sequence is now longer than the {trained:,} tokens that {self.llm.checkpoint.name} was trained "
                f"for: from here on {then}",
                stacklevel=2,
            )
        self._shorter = cache.seen[0] <= trained

    def _note_prompt_logprobs(self, targets: Tensor, hidden: Tensor, count: int) -> None:
        """Of a chunk of the prompt, ids [T] and hidden states [T, hidden]."""
        before = hidden[:-1]  # [T - 1, hidden]
        if self._before is None:
            self.prompt_logprobs.append(None)  # nothing predicts the first token
            targets = targets[1:]
        else:
            before = torch.cat((self._before, before))
        self._before = hidden[-1:]
        blocks = log_probabilities(self.llm.model, before, self.llm.real_vocab)
        for block, wanted in zip(blocks, targets.split(LOGIT_ROWS), strict=True):
            self.prompt_logprobs += _describe(block.cpu(), wanted, count)


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
