"""Text that arrives in pieces: token bytes to characters, stop strings, and long texts to ids in bounded memory.

Everything here is plain strings, bytes and ids.  It must not know which tokenizer library made them, nor any tensor.
"""

from __future__ import annotations

import codecs
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence

from .errors import SamplingError

# A window's encoder: (text, whether it is the beginning of the whole text) -> ids, and the character each id starts at.
WindowEncoder = Callable[[str, bool], tuple[list[int], list[int]]]

# Two windows that agree on this many tokens in a row have forgotten where they were cut.
_AGREEMENT = 8


class IncrementalDecoder:
    """Turns ids into text, one at a time, and never shows half a character.

    Holds at most the three bytes of an unfinished UTF-8 character.  Bytes that can never become a character turn into
    U+FFFD, as they do in `Tokenizer.decode`, which is this class run over all ids.
    """

    def __init__(self, token_bytes: Callable[[int], bytes], *, strip_space: bool) -> None:
        """`token_bytes(id)` is what the token stands for; `strip_space` drops one space at the very beginning."""
        self._token_bytes = token_bytes
        self._strip_space = strip_space
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """The characters that this token completes, perhaps none. Raises PromptError for an id out of range."""
        data = self._token_bytes(token)
        if self._strip_space and data:
            data = data.removeprefix(b" ")
            self._strip_space = False
        return self._utf8.decode(data)

    def flush(self) -> str:
        """At the end: a character whose last bytes never came, as U+FFFD; else nothing."""
        return self._utf8.decode(b"", final=True)


class StopMatcher:
    """Cuts a stream of text before the stop string that begins first, wherever the pieces are cut.

    Held back is only the longest suffix that is a proper prefix of some stop string.  Example with stops ["<end>"]:
    push("a <") gives "a ", push("b") gives "<b", push("<end>x") gives "" and stopped.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        """Raises SamplingError for an empty stop string."""
        if "" in stops:
            raise SamplingError("a stop string is empty: give at least one character")
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> tuple[str, bool]:
        """Returns (what may be shown now, whether a stop string was met). After the stop nothing is shown any more."""
        if self.stopped:
            return "", True
        held = self._held + text
        stop = self._find(held)
        hold = next(
            i for i in range(len(held) + 1) if any(s.startswith(held[i:]) for s in self._stops) or i == len(held)
        )
        # A stop string inside of a longer one that began earlier and may still be completed has to wait for it.
        self.stopped = 0 <= stop <= hold
        shown = stop if self.stopped else hold
        self._held = "" if self.stopped else held[shown:]
        return held[:shown], self.stopped

    def flush(self) -> str:
        """At the end: what was held back, up to a stop string that only waited for a longer one (see `stopped`)."""
        held, self._held = self._held, ""
        stop = self._find(held)
        self.stopped = self.stopped or stop >= 0
        return held[:stop] if stop >= 0 else held

    def _find(self, text: str) -> int:
        return min((at for at in map(text.find, self._stops) if at >= 0), default=-1)


def encode_in_windows(encode: WindowEncoder, pieces: Iterable[str], *, window: int) -> Iterator[list[int]]:
    """Ids of a text of any length, given in any pieces, as if it had been encoded at once; some at a time.

    Only about `window` characters are looked at together.  Each window begins at a token border near the end of the one
    before it; where both have the same tokens at the same characters, the ids go over from one to the other.  For BPE
    this is exact on the left: two borders in common mean that no merge crosses them, because what is left and what is
    right of a border merges independently.  On the right, and for a tokenizer that first splits text into words, it
    takes that no one word is longer than the overlap, a sixteenth of the window: 2,000 newlines behind a full stop
    could end in other tokens of the same text.  Where the windows never agree they become one growing window: memory
    gives way to truth.
    """
    overlap = max(window // 16, 64)
    chunks = _chunks(pieces, window)
    text, settled, first = next(chunks, ""), 0, True  # `settled`: the characters of `text` whose ids are out
    ids, starts = encode(text, first)
    for more in chunks:
        begin = bisect_left(starts, settled)
        border = max(begin, bisect_left(starts, len(text) - overlap))
        for left in sorted({starts[border] if border < len(starts) else 0, 0}, reverse=True):
            longer = text[left:] + more
            new_ids, new_starts = encode(longer, first and left == 0)
            crossing = _crossing(ids, starts, begin, new_ids, [left + start for start in new_starts])
            base = 0
            if crossing is not None:
                yield ids[begin:crossing]
                settled = starts[crossing] - left
                # What is settled stays a while as context, from a border on that is itself settled.
                context = max(begin, bisect_left(starts, starts[crossing] - overlap))
                base = max(starts[context] - left, 0)
                break
        keep = bisect_left(new_starts, base)
        text, ids, starts = longer[base:], new_ids[keep:], [start - base for start in new_starts[keep:]]
        first, settled = first and left == base == 0, settled - base
    yield ids[bisect_left(starts, settled) :]


def _crossing(ids: list[int], starts: list[int], begin: int, new_ids: list[int], new_starts: list[int]) -> int | None:
    """The index in `ids` (>= begin) in the middle of the longest stretch that both encodings share, if long enough.

    Never inside a character that is spelled in several byte tokens: those share one start.
    """
    i, j = begin, 0
    run = best = end = 0
    while i < len(ids) and j < len(new_ids):
        behind = starts[i] - new_starts[j]
        run = run + 1 if behind == 0 and ids[i] == new_ids[j] else 0
        i, j = i + (behind <= 0), j + (behind >= 0)
        if run > best:
            best, end = run, i
    if best < _AGREEMENT:
        return None
    middle = end - best // 2
    while middle > end - best and starts[middle] == starts[middle - 1]:
        middle -= 1
    return middle if middle > end - best else None


def _chunks(pieces: Iterable[str], size: int) -> Iterator[str]:
    """The same text in pieces of exactly `size` characters; the last may be shorter."""
    held = ""
    for piece in pieces:
        for at in range(0, len(piece), size):  # one piece may itself be the whole text
            held += piece[at : at + size]
            if len(held) >= size:
                yield held[:size]
                held = held[size:]
    if held:
        yield held
