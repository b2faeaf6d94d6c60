"""Beginnings that many prompts share, such as a system prompt: read once, then restored.

A prompt is looked at in whole chunks from its first token.  What a row holds after a chunk depends on those tokens
alone, so that a restored beginning is, bit for bit, one that was read.  The second prompt that begins like an earlier
one leaves a copy of its row behind, in rows of the cache that are kept for that: planned, like everything else.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Callable, Sequence
from hashlib import sha256

from torch import Tensor

from ..cache import KVCache

MOST_CHUNKS = 256  # of a prompt that are looked at
MOST_SEEN = 4096  # beginnings that are remembered, 32 bytes each


class Prefixes:
    """Copies of rows after the first chunks of a prompt, the least recently used one given up for a new one."""

    def __init__(
        self, caches: Sequence[KVCache], chunk: int, copy_: Callable[[KVCache, KVCache], None] = KVCache.copy_
    ) -> None:
        """caches: rows to keep copies in, perhaps none.  copy_: makes a row what another one is."""
        self._chunk, self._free, self._copy_ = chunk, list(caches), copy_
        self._kept: OrderedDict[bytes, KVCache] = OrderedDict()
        self._seen: OrderedDict[bytes, None] = OrderedDict()

    def beginnings(self, tokens: Tensor) -> list[bytes]:
        """A digest of tokens [n] after each chunk; but for the last token, which always has to be read.

        None where there is no row to keep a copy in.
        """
        digest, found = sha256(), []
        whole = min(MOST_CHUNKS, (len(tokens) - 1) // self._chunk) if self._free or self._kept else 0
        for chunk in range(whole):
            piece = tokens[chunk * self._chunk : (chunk + 1) * self._chunk]  # [chunk]
            digest.update(array("i", piece.tolist()).tobytes())
            found.append(digest.digest())
        return found

    def restore_(self, cache: KVCache, beginnings: Sequence[bytes]) -> int:
        """Make a row what it was after the longest beginning that is kept; the tokens in it, 0 where none is."""
        for count in range(len(beginnings), 0, -1):
            kept = self._kept.get(beginnings[count - 1])
            if kept is not None:
                self._kept.move_to_end(beginnings[count - 1])
                self._copy_(cache, kept)
                return count * self._chunk
        return 0

    def worth_keeping(self, beginnings: Sequence[bytes]) -> int:
        """Tokens of the longest beginning that another prompt had, too, and is not kept yet; 0 where there is none."""
        shared = [count for count, digest in enumerate(beginnings, 1) if digest in self._seen]
        for digest in beginnings:
            self._seen[digest] = None
            self._seen.move_to_end(digest)
        while len(self._seen) > MOST_SEEN:
            self._seen.popitem(last=False)
        if not shared or beginnings[shared[-1] - 1] in self._kept:
            return 0
        return shared[-1] * self._chunk

    def keep(self, beginnings: Sequence[bytes], tokens: int, cache: KVCache) -> None:
        """Copy a row that holds so many tokens of a prompt, and nothing else."""
        digest = beginnings[tokens // self._chunk - 1]
        if digest in self._kept:
            return
        room = self._free.pop() if self._free else self._kept.popitem(last=False)[1]
        self._copy_(room, cache)
        self._kept[digest] = room

    def __len__(self) -> int:
        return len(self._kept)
