"""The loop of generate.py over recorded steps: the next one is launched before it is known what was drawn.

So the GPU computes while the host reads the token, turns it into text and hands it on.  The answer, the cache and
what is counted are those of generate.py: a token that turns out to be the last one, be it by a stop token, by its text
or because nobody listens any more, is taken back, which leaves no trace as long as it pushed out no other one.
Where it would, in one step of `evict_every`, the token is read first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .cache import KVCache
from .generate import Pins, feed
from .model import Transformer
from .sampling import Sample, Sampler

if TYPE_CHECKING:
    from .backends.graph import Steps


@torch.inference_mode()
def generate_ahead(
    steps: Steps,
    model: Transformer,
    cache: KVCache,
    prompt: Tensor | Iterable[Tensor],
    sampler: Sampler,
    *,
    max_tokens: int,
    chunk: int = 256,
    pins: Pins = (),
    on_prompt: Callable[[Tensor, Tensor], None] = lambda tokens, hidden: None,  # noqa: ARG005
) -> Iterator[Sample]:
    """`generate`, with its arguments, effects and results; steps: those of the cache, which has one row.

    While a sample is looked at, the cache may hold one token more than it has `seen`.  Whoever wants no other sample
    calls `cache.take_back_`; feeding, saving and copying the cache do.
    """
    pieces = (prompt,) if isinstance(prompt, Tensor) else prompt
    for tokens, hidden in feed(model, cache, (piece[None] for piece in pieces), chunk, pins):
        on_prompt(tokens, hidden)
        last = hidden[:, -1]  # [1, hidden]
    logits = model.logits(last)  # [1, V]
    for produced in range(1, max_tokens + 1):
        drawn = sampler.draw(logits[0])  # on the device
        read = steps.fetch([drawn])
        if produced < max_tokens and not cache.due:
            logits = steps.feed([0], cache.feed_ahead(), [drawn])  # [1, V]
        sample = sampler.note(read()[0])
        ended = produced == max_tokens or sampler.is_stop(sample.token_id)
        if ended:
            cache.take_back_()
        yield sample
        if ended:
            return
        if not cache.ahead:  # it was due, or somebody has saved the session meanwhile
            logits = steps.feed([0], cache.feed_ahead(), [drawn])
        cache.keep()
