"""THE decode loop, for one sequence: start reading here.

Tokens in, tokens out.  The loop knows nothing of text (llm.py), of how a token is drawn (sampling.py), or of what the
cache keeps (cache.py, eviction.py).  It is the naive oracle that faster loops are compared with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .cache import KVCache
from .model import Transformer
from .sampling import Sample, Sampler


@torch.inference_mode()
def generate(
    model: Transformer,
    cache: KVCache,
    prompt: Tensor,
    sampler: Sampler,
    *,
    max_tokens: int,
    chunk: int = 256,
    on_prompt: Callable[[Tensor], None] = lambda hidden: None,  # noqa: ARG005
) -> Iterator[Sample]:
    """Feed a prompt [n] of token ids after what the cache has already seen, then draw up to `max_tokens` tokens.

    Ends after a stop token, which is yielded but never fed to the model, or after `max_tokens`.  Memory is constant:
    the cache makes room by itself.  on_prompt sees the hidden states [1, T, hidden] of every chunk of the prompt.
    """
    for hidden in feed(model, cache, prompt[None], chunk):  # [1, T, hidden]
        on_prompt(hidden)
        last = hidden[:, -1]  # [1, hidden]
    for produced in range(1, max_tokens + 1):
        sample = sampler.sample(model.logits(last)[0])  # [V] -> one token
        yield sample
        if produced == max_tokens or sampler.is_stop(sample.token_id):
            return
        token = torch.tensor([[sample.token_id]], device=cache.device)  # [1, 1]
        last = model(token, cache.append(1), cache)[:, -1]  # [1, hidden]


def feed(model: Transformer, cache: KVCache, tokens: Tensor, chunk: int) -> Iterator[Tensor]:
    """Run tokens [B, n] through the model, `chunk` at a time: yields the hidden states [B, T, hidden] of every chunk.

    The result does not depend on `chunk`.  The last chunk is padded to a power of two, so that the libraries below,
    which keep something for every shape they meet, meet only a few.
    """
    for piece in tokens.split(chunk, dim=1):  # [B, T]
        length = piece.shape[1]
        padded = min(chunk, 1 << (length - 1).bit_length())
        piece = torch.nn.functional.pad(piece, (0, padded - length))  # [B, padded]
        span = cache.append(length, padded=padded)
        yield model(piece.to(cache.device, torch.int64), span, cache)[:, :length]  # [B, T, hidden]
