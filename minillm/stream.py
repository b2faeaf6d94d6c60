"""An answer as an iterator over its text, computed by the loop of generate.py or ahead.py while it is asked for."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from torch import Tensor

from .ahead import generate_ahead
from .answer import Answer
from .errors import PromptError
from .generate import generate
from .results import Result


class _StoppedInPromptError(Exception):
    """`stop` was called while the prompt was read."""


class Stream(Iterator[str]):
    """Pieces of an answer's text, as they come.  `.result` may be asked at any time; before the end it says "abort".

    Nothing is computed before the first piece is asked for.  A newer request on the same LLM, be it of the same
    session, takes the cache over: going on with this one then raises.
    """

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self._stopping = False
        self._pieces = self._run()

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
    def result(self) -> Result:
        """What there is so far; reads the device once."""
        return self.answer.result

    @property
    def completion_tokens(self) -> int:
        """Tokens drawn so far."""
        return self.answer.completion_tokens

    def _run(self) -> Iterator[str]:
        answer, llm = self.answer, self.answer.llm
        self._require_cache()
        answer.begin()
        decode = generate if llm.steps is None else partial(generate_ahead, llm.steps)
        samples = decode(
            llm.model,
            llm.cache,
            answer.prompt,
            answer.sampler,
            max_tokens=answer.max_tokens,
            chunk=llm.chunk,
            pins=answer.pins,
            on_prompt=self._on_prompt,
        )
        try:
            for sample in samples:
                text = answer.draw(sample)
                if text:
                    yield text
                if answer.over or self._stopping:
                    break
                self._require_cache()
        except _StoppedInPromptError:
            pass
        except (Exception, KeyboardInterrupt):
            llm.owner = None  # a forward pass was cut in the middle: nobody may go on with what is in the cache
            raise
        llm.cache.take_back_()
        text = answer.close(aborted=self._stopping and not answer.over)
        if text:
            yield text

    def _on_prompt(self, tokens: Tensor, hidden: Tensor) -> None:
        self.answer.read(tokens, hidden)
        if self._stopping:
            raise _StoppedInPromptError

    def _require_cache(self) -> None:
        if self.answer.llm.owner is not self.answer:
            raise PromptError(
                "a newer request has taken over this LLM's cache; for two at a time use a second LLM over one model"
            )
