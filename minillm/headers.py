"""Where every tensor of a checkpoint lies: the headers of safetensors files, checked before a byte of data is used.

This module must not know which tensors a model wants (loader.py) or what they are for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch

from .errors import CheckpointError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPE_OF: Mapping[str, torch.dtype] = {  # what may be stored
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I8": torch.int8,
    "U8": torch.uint8,
}
FLOATS = ("F64", "F32", "F16", "BF16")  # the others hold the codes of quantised weights
LARGEST_HEADER = 100_000_000  # bytes: the limit of the safetensors format
LFS_POINTER = b"version https://git-lfs"
PICKLES = (".bin", ".pth", ".pt", ".ckpt")


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies: bytes `begin`..`end` of `file`, as its header says.

    pitch: bytes from one row to the next, where only a part of a matrix is meant, which is to be read row by row: pages
    of a mapped file would bring their neighbours along.  0 = all of it is meant, and its rows lie side by side.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int
    pitch: int = 0

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * DTYPE_OF[self.dtype].itemsize if self.pitch else self.end - self.begin

    def part(self, dim: int, start: int, stop: int) -> Stored:
        """Rows (dim 0) or columns (dim 1) start..stop of it."""
        row = self.nbytes // self.shape[0]  # bytes
        if dim == 0:
            shape, begin = (stop - start, *self.shape[1:]), self.begin + start * row
            pitch = row if len(shape) > 1 else 0
            return replace(self, shape=shape, begin=begin, end=begin + (stop - start) * row, pitch=pitch)
        item = DTYPE_OF[self.dtype].itemsize
        shape, begin = (self.shape[0], stop - start), self.begin + start * item
        return replace(self, shape=shape, begin=begin, end=self.end - row + stop * item, pitch=row)


def in_brief(names: list[str]) -> str:
    """The first five names, and how many more there are."""
    return ", ".join(names[:5]) + (f", ... {len(names) - 5} more" if len(names) > 5 else "")


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """Every tensor of the checkpoint, from the headers of its one file or of the shards that its index names."""
    if (folder / SINGLE).is_file():
        return _header(folder / SINGLE)
    if not (folder / INDEX).is_file():
        raise _no_weights(folder)
    weight_map = _weight_map(folder / INDEX)
    shards = sorted(set(weight_map.values()))
    absent = [shard for shard in shards if not (folder / shard).is_file()]
    if absent:
        raise CheckpointError(
            f"{folder}: {len(absent)} of {len(shards)} shards named in {INDEX} are missing ({in_brief(absent)}); "
            "download the checkpoint again"
        )
    stored: dict[str, Stored] = {}
    for shard in shards:
        header = _header(folder / shard)
        lacking = [name for name, place in weight_map.items() if place == shard and name not in header]
        if lacking:
            raise CheckpointError(
                f"{folder / shard} lacks {len(lacking)} tensors that {INDEX} places there ({in_brief(lacking)}); "
                "the files are of different versions: download the checkpoint again"
            )
        stored |= {name: entry for name, entry in header.items() if weight_map.get(name, shard) == shard}
    return stored


def _weight_map(index: Path) -> dict[str, str]:
    try:
        raw = json.loads(index.read_text("utf-8"))
        weight_map = dict(raw["weight_map"])
    except (ValueError, KeyError, TypeError, OSError, RecursionError) as error:
        raise CheckpointError(f"{index} is not a readable index ({error!r}); download it again") from error
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not re.fullmatch(r"[\w.-]+\.safetensors", shard):
            raise CheckpointError(
                f"{index} places {name!r} in {shard!r}; expected the plain name of a .safetensors file beside it"
            )
    return weight_map


def _no_weights(folder: Path) -> CheckpointError:
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    pickles = [name for name in names if name.endswith(PICKLES)]
    if pickles:
        return CheckpointError(
            f"{folder} has its weights as pickle files ({in_brief(pickles)}), which can run code when opened and are "
            "never read; convert them where you trust them, in Python with transformers: "
            'AutoModelForCausalLM.from_pretrained("OLD").save_pretrained("NEW")'
        )
    return CheckpointError(
        f"{folder} has neither {SINGLE} nor {INDEX} (found: {in_brief(names) or 'nothing'}); expected the weights in "
        "Hugging Face's layout (consolidated*, original/ and GGUF files are in another and not read)"
    )


def _header(file: Path) -> dict[str, Stored]:
    """Parse and check the header of a safetensors file: 8 bytes of length, JSON, then the tensors without gaps.

    Format: https://github.com/huggingface/safetensors#format.  Raises CheckpointError with found and expected.
    """
    again = f"delete {file.name} and download it again"
    try:
        size = file.stat().st_size
        with file.open("rb") as opened:
            start = opened.read(200)
            length = int.from_bytes(start[:8], "little")
            opened.seek(8)
            text = opened.read(length) if length <= min(LARGEST_HEADER, size - 8) else b""
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    if start.startswith(LFS_POINTER):
        real = re.search(rb"^size (\d+)", start, re.MULTILINE)
        expected = f", {int(real[1]):,} bytes" if real else ""
        raise CheckpointError(
            f"{file} is a git-lfs pointer of {size} bytes, not the weights{expected}; run `git lfs pull` beside it"
        )
    if not text:
        raise CheckpointError(
            f"{file} has {size:,} bytes, but its first 8 announce a header of {length:,}: empty, cut off or no "
            f"safetensors file; {again}"
        )
    try:
        stored = _entries(file, json.loads(text, parse_constant=_refuse_constant), 8 + length)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{file} has a damaged header ({error!r}), expected valid safetensors; {again}"
        ) from error
    expected_size = max((entry.end for entry in stored.values()), default=8 + length)
    if size != expected_size:
        raise CheckpointError(
            f"{file} has {size:,} bytes, expected {expected_size:,} by its header: an incomplete download? {again}"
        )
    return stored


def _entries(file: Path, raw: dict[str, Any], data: int) -> dict[str, Stored]:
    """The header's entries, offsets counted from the start of the file; any exception means a damaged header."""
    stored = {}
    for name, entry in raw.items():
        if name == "__metadata__":
            continue
        begin, end = entry["data_offsets"]
        dtype, shape = entry["dtype"], tuple(entry["shape"])
        if not all(type(number) is int and number >= 0 for number in (begin, end - begin, *shape)):
            raise ValueError(f"{name} has shape {list(shape)} at bytes {begin}..{end}")
        if dtype in DTYPE_OF and end - begin != prod(shape) * DTYPE_OF[dtype].itemsize:
            raise ValueError(f"{name} is {dtype} {list(shape)} in {end - begin} bytes")
        stored[name] = Stored(file, dtype, shape, data + begin, data + end)
    return stored


def _refuse_constant(text: str) -> float:
    raise ValueError(f"{text} is no JSON")
