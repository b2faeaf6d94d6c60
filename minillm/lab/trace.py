"""When was each token forgotten, and by whom: a bounded cache reads a text, and every eviction is written down.

A layer evicts before the first token of an "eviction block" and nowhere else, so reading the text from one eviction to
the next and comparing what lies in the slots before and after gives the exact step, at a few comparisons a block.
"""

from __future__ import annotations

import json
import pkgutil
import sys
from array import array
from base64 import b64encode
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..answer import Progress
from ..cache import KVCache
from ..errors import BudgetError, PromptError
from ..generate import feed
from ..llm import LLM
from ..results import Usage
from ..slots import LayerCache
from ..tokenizer import Tokenizer

MOST_TOKENS = 20_000  # a browser draws each of them; and times are stored in 16 bits
MOST_TIMES = 4_000_000  # tokens x layers x KV heads: about 11 MB of page


class Eviction(NamedTuple):
    """The token at `position` was last let go by `heads` layers x KV heads at once, when the token at `by` came in."""

    position: int
    by: int
    heads: int


@dataclass(frozen=True)
class Trace:
    """A text of n tokens, and when each layer and KV head let go of each of them.

    gone[l, h, p] is the position of the token whose arrival took token p from the sight of layer l, KV head h; n where
    the end of the text still sees it.  So after N tokens a head holds p exactly when p < N <= gone.  Example: with two
    slots of a window, token 2 pushes out token 0, so gone[l, h, 0] = 2: held after 1 and 2 tokens, not after 3.
    texts[p]: what the token adds to the text; "" for a special token, or for the first bytes of a character.
    """

    model: str
    ids: list[int]
    texts: list[str]
    pieces: list[str]  # the vocabulary's own spelling
    gone: Tensor  # [L, Hkv, n] int32
    usage: Usage
    cache: dict[str, object]

    def shares(self, after: int) -> Tensor:
        """The share of layers x KV heads that hold each token after `after` tokens were read: [after] float64."""
        return (self.gone[:, :, :after] >= after).to(torch.float64).mean((0, 1))  # [after]

    def last_evicted(self, after: int, most: int) -> list[Eviction]:
        """What was evicted up to then, the latest first (of one moment: in the order of the text), `most` at most."""
        gone = self.gone[:, :, :after].flatten(0, 1)  # [L * Hkv, after]
        by = torch.where(gone < after, gone, -1).amax(0)  # [after]
        heads = (gone == by).sum(0)  # [after]
        order = by.sort(descending=True, stable=True).indices[:most]  # [most]
        return [Eviction(p, int(by[p]), int(heads[p])) for p in order.tolist() if by[p] >= 0]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return self._facts() | {"gone": self.gone.tolist(), "usage": asdict(self.usage)}

    def to_html(self, after: int | None = None) -> str:
        """One page that needs nothing else, showing the moment after `after` tokens (default: the end)."""
        times = array("H", self.gone.flatten().tolist())
        if sys.byteorder == "big":
            times.byteswap()
        data = self._facts() | {
            "gone": b64encode(times).decode(),  # unsigned, 16 bits, little end first
            "after": len(self.ids) if after is None else after,
        }
        template = pkgutil.get_data(__name__, "trace.html")
        assert template is not None, "trace.html is part of the package"
        return template.decode().replace("@@DATA@@", script_json(data))

    def _facts(self) -> dict[str, Any]:
        layers, kv_heads, tokens = self.gone.shape
        return {
            "model": self.model,
            "tokens": tokens,
            "layers": layers,
            "kv_heads": kv_heads,
            "ids": self.ids,
            "texts": self.texts,
            "pieces": self.pieces,
            "cache": self.cache,
        }


def script_json(data: object) -> str:
    """JSON for the inside of a <script>: no text in it can end the element, open a comment, or break a line.

    "</script>" becomes "\\u003c/script\\u003e", which JSON.parse reads back as it was.
    """
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def most_tokens(layers: int, kv_heads: int) -> int:
    """The longest text that a page can hold: `MOST_TOKENS`, fewer for a model with many layers and heads."""
    return min(MOST_TOKENS, MOST_TIMES // (layers * kv_heads))


@torch.inference_mode()
def trace(llm: LLM, tokens: Tensor, *, progress: Progress | None = None) -> Trace:
    """Read token ids [n] through an LLM's cache and record when each layer and KV head lets go of each of them.

    Raises PromptError for a text of less than two tokens, BudgetError for one that would make too big a page, and
    ContextFullError for one that does not fit a cache that may not evict.
    """
    cache, config, count = llm.cache, llm.checkpoint.config, len(tokens)
    limit = most_tokens(config.num_hidden_layers, config.num_key_value_heads)
    if count < 2:
        raise PromptError(f"a text of {count} tokens has nothing to forget: give at least two")
    if count > limit:
        raise BudgetError(f"{count:,} tokens are more than the {limit:,} that a page can show: take fewer")
    llm.plan.require_room(count)
    llm.owner = None
    cache.reset()
    gone = torch.full((config.num_hidden_layers, config.num_key_value_heads, count), count, dtype=torch.int32)
    before = held(cache)
    for start, stop in steps(cache, count, llm.chunk):
        for _ in feed(llm.model, cache, tokens[None, start:stop], llm.chunk):
            pass
        after = held(cache)
        for layer, (old, new) in enumerate(zip(before, after, strict=True)):
            head, slot = ((old != new) & (old >= 0)).nonzero(as_tuple=True)  # [evictions] each
            gone[layer, head, old[head, slot].to(torch.int64)] = start
        before = after
        llm.check_memory()
        if progress is not None:
            progress(stop, count)
    for index, layer_cache in enumerate(cache.layers):
        torch.minimum(gone[index], out_of_sight(layer_cache, count), out=gone[index])
    ids, tokenizer = tokens.tolist(), llm.checkpoint.tokenizer
    return Trace(
        model=llm.checkpoint.name,
        ids=ids,
        texts=texts_of(tokenizer, ids),
        pieces=[tokenizer.piece(one) for one in ids],
        gone=gone,
        usage=Usage.of(cache, prompt=count, completion=0),
        cache=llm.plan.summary(),
    )


def steps(cache: KVCache, count: int, chunk: int) -> Iterator[tuple[int, int]]:
    """Cut the text 0..count so that a layer evicts nowhere but at the start of a piece, of `chunk` tokens at most."""
    start = 0
    while start < count:
        stop = min(count, start + chunk, start + min(layer.until_eviction(start) for layer in cache.layers))
        yield start, stop
        start = stop


def held(cache: KVCache) -> list[Tensor]:
    """The position in every slot, for each layer: a copy [Hkv, S] on the CPU."""
    return [layer.positions[0].cpu().clone() for layer in cache.layers]


def out_of_sight(layer: LayerCache, count: int) -> Tensor:
    """When a sliding window alone takes each of `count` tokens out of sight: [count] int32, `count` for never.

    With a window of 8, query 8 no longer sees token 0.
    """
    if layer.window is None:
        return torch.full((count,), count, dtype=torch.int32)
    ends = (torch.arange(count) + layer.window).clamp(max=count)  # [count]
    if layer.far:
        ends[: layer.retention.sinks] = count
    return ends.to(torch.int32)


def texts_of(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    """What each token adds to the text; all of it together is the text."""
    decoder = tokenizer.stream()
    texts = [decoder.push(one) for one in ids]
    texts[-1] += decoder.flush()
    return texts
