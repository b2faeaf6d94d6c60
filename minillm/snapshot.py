"""One file of named tensors, written whole or not at all: what a saved session is.

The format is safetensors, so that any tool opens it: 8 bytes of length, a JSON header, then the tensors without gaps,
widest dtype first.  The last tensor, `checksum`, is the SHA-256 of every byte before it.  All that varies lies in
tensors, so the header and with it the size follow from names, shapes and metadata alone.  This module must not know
what the tensors mean (session.py).
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from hashlib import sha256
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from .errors import SessionError
from .headers import DTYPE_OF, LARGEST_HEADER, in_brief

Specs = Mapping[str, tuple[tuple[int, ...], torch.dtype]]

PIECE = 4 * 2**20  # bytes that are copied, hashed or written at a time
CHECKSUM, CHECKSUM_BYTES = "checksum", sha256().digest_size
FORMAT = "minillm session 1"
NAME_OF: Mapping[torch.dtype, str] = {dtype: name for name, dtype in DTYPE_OF.items()} | {
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def specs_of(tensors: Mapping[str, Tensor]) -> Specs:
    """Shape and dtype of tensors, by name."""
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


def snapshot_bytes(specs: Specs, metadata: Mapping[str, str]) -> int:
    """Exact size of the file of such tensors, known before there are any."""
    data = sum(prod(shape) * dtype.itemsize for shape, dtype in specs.values())
    return len(_head(specs, metadata)) + data + CHECKSUM_BYTES


def save_snapshot(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write the file at once: whatever happens meanwhile, `path` is the old file or the new one, never a torn one.

    Tensors may lie on any device and in any order of strides; beside them a few MiB are needed.  What a killed process
    left behind (`<name>.<8 hex digits>.tmp`) is removed.  Raises SessionError where the file cannot be written.
    """
    path = path.resolve()  # through a link, which stays
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        if path.exists() and not path.is_file():
            raise SessionError(f"{path} cannot be written: it is a folder or a device; name a file")
        _remove_leftovers(path)
        with temporary.open("xb") as file:
            digest = sha256()
            for block in _blocks(tensors, metadata):
                digest.update(block)
                file.write(block)
            file.write(digest.digest())
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        size = snapshot_bytes(specs_of(tensors), metadata)
        raise SessionError(
            f"{path} cannot be written: {error.strerror or error}; it takes {size:,} bytes in a folder that you may "
            "write to; what was there before is unchanged"
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


class Snapshot:
    """An opened file: `metadata`, and tensors to be read in place once `check` has looked at every byte."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        """Read the header.  Raises SessionError for a foreign or cut file."""
        self.path, self._file = path, file
        header, start = self._read_header()
        try:
            self.metadata = {name: text for name, text in header.pop("__metadata__").items() if name != "format"}
            self._begin = {name: start + entry["data_offsets"][0] for name, entry in header.items()}
            end = start + max(entry["data_offsets"][1] for entry in header.values())
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise self._damaged(f"its header cannot be understood, {error!r}") from error
        self._entries = header
        self._size = os.fstat(file.fileno()).st_size
        if self._size != end:
            raise self._damaged(f"it has {self._size:,} bytes, expected {end:,} by its header")

    def check(self) -> None:
        """Read every byte.  Raises SessionError for a damaged file."""
        self._file.seek(0)
        digest, buffer, left = sha256(), memoryview(bytearray(PIECE)), self._size - CHECKSUM_BYTES
        while left > 0 and (got := self._file.readinto(buffer[:left])):  # type: ignore[attr-defined]
            digest.update(buffer[:got])
            left -= got
        if self._file.read(CHECKSUM_BYTES + 1) != digest.digest():
            raise self._damaged("its checksum does not match its content")

    def length(self, name: str) -> int:
        """The first dimension of a tensor whose size may vary; 0 where there is none.  Still to be `require`d."""
        shape = self._entries.get(name, {}).get("shape")
        return shape[0] if isinstance(shape, list) and shape and type(shape[0]) is int else 0

    def require(self, specs: Specs) -> None:
        """Raise SessionError unless the file holds exactly such tensors."""
        head = json.loads(_head(specs, self.metadata)[8:])
        wanted = {name: entry for name, entry in head.items() if name != "__metadata__"}
        if wanted == self._entries:
            return
        complaints = {
            "missing": [name for name in wanted if name not in self._entries],
            "unexpected": [name for name in self._entries if name not in wanted],
            "different": [
                f"{name} is {_described(entry)} instead of {_described(wanted[name])}"
                for name, entry in self._entries.items()
                if name in wanted and _described(entry) != _described(wanted[name])
            ],
        }
        found = [f"{len(names)} {what} ({in_brief(names)})" for what, names in complaints.items() if names]
        raise SessionError(
            f"{self.path} does not hold the tensors of this session: {'; '.join(found) or 'their order differs'}; "
            "save the session again with this version of minillm"
        )

    def fill_(self, tensors: Mapping[str, Tensor]) -> None:
        """Read some of the tensors, checked by `require`, into those given; a few MiB are needed beside them."""
        buffer = torch.empty(PIECE, dtype=torch.uint8, device="cpu")  # [bytes]
        for name, tensor in tensors.items():
            self._file.seek(self._begin[name])
            for piece in _pieces(tensor):
                target = piece if _is_plain(piece) else _like(piece, buffer)
                if self._file.readinto(_memory(target)) != piece.nbytes:  # type: ignore[attr-defined]
                    raise self._damaged("it was cut off while it was read")
                if target is not piece:
                    piece.copy_(target)

    def _read_header(self) -> tuple[dict[str, Any], int]:
        size = os.fstat(self._file.fileno()).st_size
        length = int.from_bytes(self._file.read(8), "little")
        text = self._file.read(length) if length <= min(LARGEST_HEADER, size - 8) else b""
        try:
            header = json.loads(text)
            ours = header["__metadata__"]["format"] == FORMAT
        except (ValueError, KeyError, TypeError, RecursionError):
            ours = False
        if not ours:
            raise SessionError(
                f"{self.path} ({size:,} bytes) is no saved session, or its beginning is damaged: expected a "
                f"safetensors file of the format '{FORMAT}'"
            )
        return header, 8 + length

    def _damaged(self, what: str) -> SessionError:
        return SessionError(f"{self.path} is damaged ({what}): use another copy, or start a new session")


@contextmanager
def open_snapshot(path: Path, *, check: bool = True) -> Iterator[Snapshot]:
    """Open a file, see Snapshot, and `check` it; nothing in memory has changed until `fill_`.  Raises SessionError."""
    try:
        if not path.is_file():
            raise SessionError(
                f"{path}: {'this is no file' if path.exists() else 'no such file'}; name a saved session"
            )
        with path.open("rb") as file:
            snapshot = Snapshot(path, file)
            if check:
                snapshot.check()
            yield snapshot
    except OSError as error:
        raise SessionError(f"{path} cannot be read: {error.strerror or error}") from error


def _head(specs: Specs, metadata: Mapping[str, str]) -> bytes:
    """The beginning of the file: length and JSON, padded so that the tensors behind it are aligned."""
    entries: dict[str, object] = {"__metadata__": {"format": FORMAT, **metadata}}
    end = 0
    for name, (shape, dtype) in [*_in_file_order(specs), (CHECKSUM, ((CHECKSUM_BYTES,), torch.uint8))]:
        begin, end = end, end + prod(shape) * dtype.itemsize
        entries[name] = {"dtype": NAME_OF[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(entries).encode()
    text += b" " * (-(len(text) + 8) % 64)
    return len(text).to_bytes(8, "little") + text


def _in_file_order(specs: Specs) -> list[tuple[str, tuple[tuple[int, ...], torch.dtype]]]:
    """Widest dtype first, which aligns every tensor."""
    assert CHECKSUM not in specs
    return sorted(specs.items(), key=lambda item: -item[1][1].itemsize)


def _blocks(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Iterator[bytes | memoryview]:
    """Everything but the checksum, in pieces; each is valid until the next is asked for."""
    specs, buffer = specs_of(tensors), torch.empty(PIECE, dtype=torch.uint8, device="cpu")  # [bytes]
    yield _head(specs, metadata)
    for name, _ in _in_file_order(specs):
        for piece in _pieces(tensors[name]):
            yield _memory(piece if _is_plain(piece) else _like(piece, buffer).copy_(piece))


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    """Views of at most PIECE bytes, in row-major order."""
    if tensor.nbytes <= PIECE:
        yield tensor
    elif tensor.is_contiguous():
        yield from tensor.view(-1).split(PIECE // tensor.itemsize)  # [n]
    else:
        rows = max(1, PIECE // tensor[0].nbytes)
        for part in tensor.split(rows):
            yield from _pieces(part if rows > 1 else part[0])


def _is_plain(tensor: Tensor) -> bool:
    """Whether its bytes can be read and written where they are."""
    return tensor.device.type == "cpu" and tensor.is_contiguous()


def _like(piece: Tensor, buffer: Tensor) -> Tensor:
    """The beginning of a buffer [bytes] as a tensor of the shape and dtype of `piece`."""
    return buffer[: piece.nbytes].view(piece.dtype).view(piece.shape)


def _memory(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, shared with it; the tensor must outlive them."""
    return memoryview((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")


def _described(entry: Mapping[str, Any]) -> str:
    return f"{entry.get('dtype')} {entry.get('shape')}"


def _remove_leftovers(path: Path) -> None:
    pattern = re.compile(re.escape(path.name) + r"\.[0-9a-f]{8}\.tmp")
    for other in path.parent.iterdir():
        if pattern.fullmatch(other.name):
            other.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Make the new name as durable as the data."""
    if os.name == "posix":
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)
