"""The tokenizer files of a checkpoint folder: two formats behind one protocol, and the JSON beside them.

Each format says how text becomes ids and which bytes an id stands for.  This file must not know what ids are used for:
BOS, streaming and hiding of special tokens are `tokenizer.py`'s.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import sentencepiece
import tokenizers

from .errors import CheckpointError

Encoded = tuple[list[int], list[int]]  # ids, and the character of the text each starts at

_SPECIAL = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
_LFS_POINTER = b"version https://git-lfs"
_TIKTOKEN_RANK = re.compile(rb"[A-Za-z0-9+/]+=* \d+\r?\n")
_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")


class Vocabulary(Protocol):
    """What the two formats have in common. `vocab_size` is one more than the largest id that decodes."""

    adds_space: bool  # a space is put before the first word, and has to be dropped again

    def vocab_size(self) -> int: ...
    def bos_id(self) -> int | None: ...
    def eos_id(self) -> int | None: ...
    def special_ids(self) -> frozenset[int]: ...
    def id_of(self, token: str) -> int | None: ...
    def piece(self, token: int) -> str: ...
    def token_bytes(self, token: int) -> bytes: ...
    def encode(self, text: str) -> Encoded: ...


def encode_after(encode: Callable[[str], Encoded], text: str) -> Encoded:
    """Encodes text that follows other text: a newline, a byte that never merges here, takes the space put first."""
    ids, starts = encode("\n" + text)
    begin = bisect_left(starts, 1)
    return ids[begin:], [start - 1 for start in starts[begin:]]


class TokenizerJson:
    """tokenizer.json, through `tokenizers`."""

    def __init__(self, path: Path) -> None:
        data = _read(path)
        try:
            self._hf = tokenizers.Tokenizer.from_buffer(data)
            decoder = json.loads(data)["decoder"]
        except (ValueError, KeyError) as error:
            raise CheckpointError(f"{path} is not a tokenizer: {_line(error)}; download it again") from None
        self._hf.no_truncation()
        self._hf.no_padding()
        self._added = self._hf.get_added_tokens_decoder()
        steps = decoder.get("decoders", [decoder]) if decoder else []
        kinds = {step["type"]: step for step in steps}
        if not kinds.keys() & {"ByteLevel", "ByteFallback", "Metaspace"}:
            raise CheckpointError(f"{path} decodes by {sorted(kinds)}: only byte-level and byte-fallback are supported")
        self._byte_of = _byte_alphabet() if "ByteLevel" in kinds else None
        self._byte_fallback = "ByteFallback" in kinds
        scheme = kinds.get("Metaspace", {}).get("prepend_scheme", "never")
        self.adds_space = scheme != "never" or kinds.get("Strip", {}).get("start", 0) > 0

    def vocab_size(self) -> int:
        return max(self._hf.get_vocab(with_added_tokens=True).values()) + 1

    def bos_id(self) -> int | None:
        # Without a configuration, what the file itself puts before a text is the only hint.
        return next(iter(self._hf.encode("", add_special_tokens=True).ids), None)

    def eos_id(self) -> int | None:
        return None

    def special_ids(self) -> frozenset[int]:
        return frozenset(id_ for id_, token in self._added.items() if token.special)

    def id_of(self, token: str) -> int | None:
        return self._hf.token_to_id(token)

    def piece(self, token: int) -> str:
        return self._hf.id_to_token(token) or ""  # vocabularies may have holes

    def token_bytes(self, token: int) -> bytes:
        piece = self.piece(token)
        if self._byte_of is not None:
            # An added token may be spelled with characters that stand for no byte.
            known = all(char in self._byte_of for char in piece)
            return bytes(self._byte_of[char] for char in piece) if known else piece.encode()
        return _spelled(piece, self._byte_fallback)

    def encode(self, text: str) -> Encoded:
        encoding = self._hf.encode(text, add_special_tokens=False)
        return encoding.ids, [start for start, _ in encoding.offsets]


class SentencePieceModel:
    """tokenizer.model, through `sentencepiece`, with the added tokens of tokenizer_config.json."""

    def __init__(self, path: Path, config: dict[str, Any]) -> None:
        data = _read(path)
        if _TIKTOKEN_RANK.match(data):
            raise CheckpointError(
                f"{path} holds tiktoken ranks, Meta's original format, not a sentencepiece model: put the "
                "tokenizer.json of the Hugging Face version of this model beside it"
            )
        self._sp = sentencepiece.SentencePieceProcessor()
        try:
            self._sp.LoadFromSerializedProto(data)
        except RuntimeError as error:
            raise CheckpointError(f"{path} is not a sentencepiece model: {_line(error)}; download it again") from None
        self._size = self._sp.get_piece_size()
        entries = config.get("added_tokens_decoder", {})
        added = {int(id_): entry for id_, entry in entries.items()}
        self._added = {id_: entry["content"] for id_, entry in added.items() if id_ >= self._size}
        self._special = {id_ for id_, entry in added.items() if entry.get("special")}
        self._special |= {id_ for id_ in range(self._size) if self._sp.IsControl(id_) or self._sp.IsUnknown(id_)}
        marks = {self._sp.IdToPiece(id_): id_ for id_ in range(self._size) if self._sp.IsControl(id_)}
        self._marks: dict[str, int] = marks | {entry["content"]: id_ for id_, entry in added.items()}
        longest_first = sorted(self._marks, key=len, reverse=True)
        self._mark = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        # As in transformers: unless "legacy" is false, the text after a special token gets a space put first, too.
        self._legacy = config.get("legacy") is not False
        self.adds_space = self._sp.encode("a", out_type=str)[0].startswith("▁")

    def vocab_size(self) -> int:
        return max([self._size - 1, *self._added]) + 1

    def bos_id(self) -> int | None:
        return _present(self._sp.bos_id())

    def eos_id(self) -> int | None:
        return _present(self._sp.eos_id())

    def special_ids(self) -> frozenset[int]:
        return frozenset(self._special)

    def id_of(self, token: str) -> int | None:
        if token in self._marks:
            return self._marks[token]
        id_ = int(self._sp.PieceToId(token))
        return id_ if self._sp.IdToPiece(id_) == token else None

    def piece(self, token: int) -> str:
        return str(self._added.get(token, "") if token >= self._size else self._sp.IdToPiece(token))

    def token_bytes(self, token: int) -> bytes:
        piece = self.piece(token)
        return piece.encode() if token >= self._size else _spelled(piece, self._sp.IsByte(token))

    def encode(self, text: str) -> Encoded:
        ids: list[int] = []
        starts: list[int] = []
        at = 0
        for mark in [*self._mark.finditer(text), None]:
            stretch = text[at : mark.start() if mark else None]
            bare = at > 0 and not self._legacy and stretch
            new_ids, new_starts = encode_after(self._plain, stretch) if bare else self._plain(stretch)
            ids += new_ids
            starts += [at + start for start in new_starts]
            if mark:
                ids.append(self._marks[mark[0]])
                starts.append(mark.start())
                at = mark.end()
        return ids, starts

    def _plain(self, text: str) -> Encoded:
        raw, ids, starts = text.encode(), [], []
        byte = char = 0
        for id_, begin in _pieces(self._sp.encode(text, out_type="serialized_proto")):
            char += len(raw[byte:begin].decode())
            byte = begin
            ids.append(id_)
            starts.append(char)
        return ids, starts


def _present(id_: int) -> int | None:
    return id_ if id_ >= 0 else None  # sentencepiece says -1 for "none"


def _pieces(serialized: bytes) -> Iterator[tuple[int, int]]:
    """(id, first byte) of every piece in a serialised SentencePieceText.

    The message is read by hand because each release of sentencepiece offers it under another name and only the bytes
    stayed the same (sentencepiece.proto: SentencePieceText.pieces = 2; SentencePiece.id = 2, .begin = 4).
    """
    for number, _, payload in _fields(serialized):
        if number == 2:
            values = {field: value for field, value, _ in _fields(payload)}
            yield values[2], values.get(4, 0)


def _fields(message: bytes) -> Iterator[tuple[int, int, bytes]]:
    """(field number, integer, bytes) of each field of a protobuf message; of a bytes field, integer is the length."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        value, at = _varint(message, at)
        end = at + (value if key & 7 == 2 else 0)  # wire type 2 is length-delimited, the others here are integers
        yield key >> 3, value, message[at:end]
        at = end


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """The integer that begins at byte `at`, seven bits a byte, lowest first, and where it ends."""
    value = shift = 0
    while message[at] >= 0x80:
        value |= (message[at] & 0x7F) << shift
        at, shift = at + 1, shift + 7
    return value | message[at] << shift, at + 1


def _spelled(piece: str, byte_fallback: bool) -> bytes:
    """What a sentencepiece-like piece stands for: "▁the" is b" the", "<0x0A>" is one byte."""
    byte = _BYTE_PIECE.fullmatch(piece) if byte_fallback else None
    return bytes([int(byte[1], 16)]) if byte else piece.replace("▁", " ").encode()


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's visible character for each byte (bytes_to_unicode in its encoder.py), inverted."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + i): byte for i, byte in enumerate(others)}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, {} if there is no such file. Raises CheckpointError if it is anything else."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(_read(path))
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {_line(error)}; download it again") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a JSON object; download it again")
    return content


def read_special_tokens(folder: Path) -> dict[str, str | None]:
    """Such as {"bos_token": "<s>"}, from tokenizer_config.json before special_tokens_map.json.

    None where a file says that the tokenizer has no such token; no entry where neither file says anything.
    """
    tokens: dict[str, str | None] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        content = read_json(folder / name)
        for key in content.keys() & set(_SPECIAL):
            entry = content[key]
            value = entry.get("content") if isinstance(entry, dict) else entry
            if not isinstance(value, str | None):
                raise CheckpointError(f"{key} in {folder / name} is not a token but {value!r}; download it again")
            tokens[key] = value
    return tokens


def _read(path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    if data.startswith(_LFS_POINTER):
        raise CheckpointError(f"{path} is a git-lfs pointer, not the file: run `git lfs pull`, or download it again")
    return data


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
