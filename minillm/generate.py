"""THE decode loop, for one sequence: start reading here.

Tokens in, tokens out.  The loop knows nothing of text (llm.py), of how a token is drawn (sampling.py), or of what the
cache keeps (cache.py, eviction.py).  It is the naive oracle that faster loops are compared with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from .cache import KVCache
from .model import Transformer
from .sampling import Sample, Sampler
from .slots import PINNED

Pins = Sequence[tuple[int, int]]  # (start, stop) of tokens that are never evicted, counted from the first one fed


@torch.inference_mode()
def generate(
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
    """Feed a prompt of token ids ([n], or pieces of it) after what the cache has already seen, then draw up to
    `max_tokens` tokens.

    Ends after a stop token, which is yielded but never fed to the model, or after `max_tokens`.  Memory is constant:
    the cache makes room by itself.  on_prompt sees every chunk of the prompt: tokens [1, T], hidden [1, T, hidden].
    """
    pieces = (prompt,) if isinstance(prompt, Tensor) else prompt
    for tokens, hidden in feed(model, cache, (piece[None] for piece in pieces), chunk, pins):
        on_prompt(tokens, hidden)
        last = hidden[:, -1]  # [1, hidden]
    for produced in range(1, max_tokens + 1):
        sample = sampler.sample(model.logits(last)[0])  # [V] -> one token
        yield sample
        if produced == max_tokens or sampler.is_stop(sample.token_id):
            return
        token = torch.tensor([[sample.token_id]])  # [1, 1]
        span = cache.append(1, flags=flags_of(cache, token))
        last = model(token.to(cache.device), span, cache)[:, -1]  # [1, hidden]


def feed(
    model: Transformer, cache: KVCache, tokens: Tensor | Iterable[Tensor], chunk: int, pins: Pins = ()
) -> Iterator[tuple[Tensor, Tensor]]:
    """Run tokens [B, n], or pieces of them, through the model, `chunk` at a time.

    Yields every chunk: tokens [B, T] and their hidden states [B, T, hidden].  The result does not depend on `chunk` or
    on the pieces.  The last chunk is padded to a power of two, so that the libraries below, which keep something for
    every shape they meet, meet only a few.
    """
    done = 0
    for piece in in_chunks((tokens,) if isinstance(tokens, Tensor) else tokens, chunk):  # [B, T]
        length = piece.shape[1]
        padded = min(chunk, 1 << (length - 1).bit_length())
        wide = torch.nn.functional.pad(piece, (0, padded - length))  # [B, padded]
        mine = [(max(0, start - done), stop - done) for start, stop in pins if stop > done and start < done + length]
        span = cache.append(length, padded=padded, flags=flags_of(cache, wide, mine))
        yield piece, model(wide.to(cache.device, torch.int64), span, cache)[:, :length]  # [B, T, hidden]
        done += length


def in_chunks(pieces: Iterable[Tensor], chunk: int) -> Iterator[Tensor]:
    """The same tokens [B, n] in pieces of exactly `chunk`; the last may be shorter."""
    held: Tensor | None = None
    for piece in pieces:
        whole = piece if held is None else torch.cat((held, piece), 1)
        *full, held = whole.split(chunk, dim=1)
        if held.shape[1] == chunk:
            full, held = [*full, held], None
        yield from full
    if held is not None and held.shape[1] > 0:
        yield held


def flags_of(cache: KVCache, tokens: Tensor, pins: Pins = ()) -> Tensor | None:
    """What is to be written with tokens [B, T], see slots.py: uint8 [B, T], or None where it is nothing at all."""
    if cache.kinds is None and not pins:
        return None
    flags = torch.zeros_like(tokens, dtype=torch.uint8) if cache.kinds is None else cache.kinds[tokens.to(torch.int64)]
    for start, stop in pins:
        flags[:, start:stop] |= PINNED
    return flags
