"""One sequence that lives in an LLM's one bounded cache: it grows, and can be saved, restored, copied and rewound.

    session = llm.session(temperature=0.8, seed=1)
    session.append("Once upon a time")
    print(session.generate(max_tokens=20).finish().text)
    session.save("story.session")

Invariant: between two calls everything but the last token of the sequence is in the cache, and that one is `pending`
(none is after a token that ended an answer, which is never fed).  So drawing 10 tokens twice is drawing 20, whatever
was saved, restored or copied in between.  This module must not know what a saved file holds (saved.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .answer import Answer, Progress, collect, overlap
from .cache import MAX_POSITION
from .errors import PromptError, SessionError
from .generate import Pins, feed
from .results import Usage
from .sampling import Sampler, SamplingParams
from .saved import copy_session_, load_session, save_session, session_bytes
from .slots import NOTHING, PINNED
from .stream import Stream

if TYPE_CHECKING:
    from .llm import LLM

Prompt = str | Iterator[str] | Iterator[Tensor] | Sequence[int] | Tensor


class Session:
    """A sequence of tokens.  A newer request on the same LLM takes the cache over: going on with this one then raises
    PromptError, and only `load` brings back what was saved of it.
    """

    def __init__(self, llm: LLM, params: SamplingParams) -> None:
        """The cache is taken over when the first tokens come."""
        self.llm = llm
        self.sampler = self.new_sampler(params)
        self.params = replace(params, seed=self.sampler.seed)
        self.notes: dict[str, Any] = {}  # what else is to be saved: anything that JSON can carry
        self.pending: list[int] = []  # the last token of the sequence, while it is not in the cache
        self.pending_pinned = False
        self.pinned = 0  # tokens that were fed and pinned
        self.latest: object = None  # what `llm.owner` is as long as the cache holds this session; None: an empty one

    @property
    def seen(self) -> int:
        """Tokens fed so far."""
        return 0 if self.latest is None else self.llm.cache.seen[0]

    def usage(self) -> Usage:
        """What the cache has seen of the session, and keeps; prompt and completion are those of the last answer."""
        self._require_cache()
        if self.latest is None:
            return Usage(0, 0, 0, 0, 0, (0, 0), [], None)
        last = self.latest if isinstance(self.latest, Answer) else None
        prompt, completion = (last.prompt_tokens, last.completion_tokens) if last else (0, 0)
        return Usage.of(self.llm.cache, self.llm.team, prompt=prompt, completion=completion)

    def use(self, params: SamplingParams) -> None:
        """Draw by other rules from here on.  What was drawn still counts; the draws begin again if the seed is new."""
        sampler, state = self.new_sampler(params), self.sampler.state()
        if params.seed is None:
            sampler.seed = self.sampler.seed
        elif params.seed != self.sampler.seed:
            state["generator"] = sampler.state()["generator"]
        sampler.restore_(state)
        self.sampler, self.params = sampler, replace(params, seed=sampler.seed)

    @torch.inference_mode()
    def append(self, prompt: Prompt, *, pin: bool = False, progress: Progress | None = None) -> None:
        """Read text or token ids at once, and draw nothing; pin: never evict them.

        Raises BudgetError for more pins than slots, ContextFullError where the tokens do not fit, PromptError.
        """
        self._require_cache()
        llm, tokens = self.llm, self.whole(prompt)  # [n]
        pins = self.shifted([(0, len(tokens))] if pin else [])
        tokens = torch.cat((torch.tensor(self.pending, dtype=torch.int32), tokens))
        self.require_room(len(tokens), pins)
        if self.latest is None:
            llm.cache.reset()
        self.latest, llm.owner = object(), None  # cut off in the middle, the cache belongs to nobody
        fed = 0
        for piece, _ in feed(llm.model, llm.cache, tokens[None, :-1], llm.chunk, pins):  # [1, T]
            self.sampler.observe_prompt(piece[0])
            fed += piece.shape[1]
            llm.check_memory()
            if progress is not None:
                progress(fed, len(tokens))
        self.pinned += overlap(pins, 0, fed)
        self.pending, self.pending_pinned = tokens[-1:].tolist(), overlap(pins, fed, fed + 1) > 0
        self.sampler.restart()
        llm.owner = self.latest

    def generate(
        self,
        prompt: Prompt | None = None,
        *,
        max_tokens: int | None = None,
        stop: tuple[str, ...] | None = None,
        pin: bool = False,
        progress: Progress | None = None,
    ) -> Stream:
        """Read a prompt and answer it; without one, go on with what was appended or drawn last.

        pin: never evict the prompt.  max_tokens, stop: instead of those of the session's parameters.
        Raises BudgetError for more pins than slots, ContextFullError where the tokens do not fit, PromptError.
        """
        given = {"max_tokens": max_tokens, "stop": stop}
        params = replace(self.params, **{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]
        if pin and prompt is not None:
            tokens = self.whole(prompt)
            return self.stream(tokens, params, pins=[(0, len(tokens))], progress=progress)
        return self.stream(None if prompt is None else self.encode(prompt), params, progress=progress)

    def stream(
        self, tokens: Tensor | Iterator[Tensor] | None, params: SamplingParams | None = None, **options: Any
    ) -> Stream:
        """Answer tokens [n], or pieces of them; None goes on.  Options as in `begin`."""
        return Stream(self.begin(tokens, params, **options))

    def begin(
        self,
        tokens: Tensor | Iterator[Tensor] | None,
        params: SamplingParams | None = None,
        *,
        pins: Pins = (),
        continuation: bool = True,
        length: int | None = None,
        progress: Progress | None = None,
    ) -> Answer:
        """The answer to tokens, still to be computed; it owns the cache from here on.  See Answer for the options."""
        self._require_cache()
        if tokens is None and not self.pending:
            raise PromptError(
                "there is nothing to go on from, the last answer has ended or none has begun: give a prompt"
            )
        answer = Answer(
            self, tokens, params or self.params, pins=pins, continuation=continuation, length=length, progress=progress
        )
        if self.latest is None:
            self.llm.cache.reset()
        if tokens is not None:
            self.sampler.restart()
        self.latest = self.llm.owner = answer
        return answer

    def encode(self, prompt: Prompt) -> Tensor | Iterator[Tensor]:
        """Text as it is, or ids, or pieces of either -> token ids [n] int32, or pieces of them.

        BOS comes only where the session begins, and text goes on right behind what was there.  Raises PromptError.
        """
        llm, beginning = self.llm, self.seen == 0 and not self.pending
        if not isinstance(prompt, (str, Iterator)):
            return llm.ids(prompt)
        pieces = iter([prompt]) if isinstance(prompt, str) else prompt
        first = next(pieces, "")
        whole = chain([first], pieces)
        if isinstance(first, str):
            tokens = llm.checkpoint.tokenizer.encode_pieces(whole, bos=beginning, continuation=not beginning)  # type: ignore[arg-type]
        else:
            tokens = map(llm.ids, whole)  # type: ignore[arg-type]
        some = next(tokens, None)
        if some is None:
            raise PromptError("the prompt is empty: give some text")
        tokens = chain([some], tokens)
        return collect(tokens, MAX_POSITION) if isinstance(prompt, str) else tokens

    @property
    def nbytes(self) -> int:
        """Exact size of the file that `save` writes, known before a token is fed."""
        return session_bytes(self)

    def save(self, path: str | Path) -> None:
        """Write everything that the future of the session depends on to a file, at once or not at all.

        Raises SessionError where it cannot be written, PromptError where the cache holds another request.
        """
        self._require_cache()
        if self.latest is None:
            raise SessionError("there is nothing to save: the session has not begun")
        if self.llm.team.ranks > 1:
            raise SessionError(f"one of {self.llm.team.ranks} processes has only its heads: save in one process")
        save_session(self, Path(path))

    def load(self, path: str | Path) -> None:
        """Go on as the session that was saved, with its sampling parameters; what was in the cache is lost.

        Raises SessionError, naming every setting that differs, if the file is not from the very same model, cache and
        machine, or is damaged; what was in the cache is then untouched.
        """
        load_session(self, Path(path))

    def fork(self) -> Session:
        """A copy that goes its own way, in a second LLM over the same model: takes `llm.plan.nbytes` bytes more, and
        what recorded steps take.

        Raises BudgetError where that would break the promise of `memory`.
        """
        self._require_cache()
        llm = copy(self.llm)
        if llm.memory is not None:
            llm.memory = replace(llm.memory, base=llm.memory.base + llm.plan.nbytes + llm.memory.recording)
            llm.memory.require()
        llm.cache, llm.owner = llm.plan.allocate(llm.checkpoint.device), None
        llm.cache.kinds = self.llm.cache.kinds
        llm.steps = llm.checkpoint.recorded(llm.model, llm.cache)
        other = Session(llm, self.params)
        copy_session_(self, other)
        return other

    @torch.inference_mode()
    def rewind(self, tokens: int) -> None:
        """Forget the last tokens, of prompt or answer; a new prompt has to follow.  The sampler is not turned back.

        Raises SessionError where what was there before cannot be had back.
        """
        self._require_cache()
        plan, keep = self.llm.plan, self.seen + len(self.pending) - tokens
        way_back = "restore a session that was saved before"
        if tokens < 0 or keep < 0:
            raise SessionError(f"cannot rewind {tokens:,} of {keep + tokens:,} tokens: name a number in between")
        if self.seen > plan.retention.slots:
            raise SessionError(f"cannot rewind: of {self.seen:,} tokens some have been evicted; {way_back}")
        if plan.policy.needs_queries or plan.policy.needs_attention:
            raise SessionError(
                f"cannot rewind: policy '{plan.policy.name}' remembers queries that came after; {way_back}"
            )
        if tokens == 0:
            return
        self.pending, self.pending_pinned = [], False
        if self.latest is not None:
            for layer in self.llm.cache.layers:
                layer.positions.masked_fill_(layer.positions >= keep, NOTHING)
            self.llm.cache.seen = [keep]
            first = self.llm.cache.layers[0]  # nothing was evicted: all heads of all layers hold the same
            self.pinned = int(((first.flags[0, 0] & PINNED > 0) & (first.positions[0, 0] >= 0)).sum())
            self.latest = self.llm.owner = object()

    def shifted(self, pins: Pins) -> Pins:
        """Pins of a prompt as pins of what is fed: the pending token comes first."""
        shift = len(self.pending)
        first = [(0, 1)] if self.pending_pinned else []
        return [*first, *((start + shift, stop + shift) for start, stop in pins)]

    def require_room(self, tokens: int, pins: Pins) -> int:
        """Tokens that may still be fed; raises ContextFullError or BudgetError if these do not fit."""
        end = max((self.seen + stop for _, stop in pins), default=0)
        self.llm.plan.require_pins(self.pinned + overlap(pins, 0, MAX_POSITION), end)
        return self.llm.plan.require_room(tokens, self.seen)

    def whole(self, prompt: Prompt) -> Tensor:
        """`encode`, in one tensor [n]."""
        tokens = self.encode(prompt)
        return tokens if isinstance(tokens, Tensor) else collect(tokens, MAX_POSITION)

    def new_sampler(self, params: SamplingParams) -> Sampler:
        """One for this model that has drawn nothing yet."""
        checkpoint = self.llm.checkpoint
        ids = (checkpoint.config.vocab_size, self.llm.real_vocab, checkpoint.eos_ids)
        return Sampler(params, *ids, checkpoint.device, self.llm.team.agreed)

    def _require_cache(self) -> None:
        if self.latest is not None and self.llm.owner is not self.latest:
            raise PromptError(
                "another request has used this LLM's cache, or was cut off in it: the session or conversation in it is "
                "gone; load it from a file, or begin again"
            )
