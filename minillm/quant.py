"""Weights in 8 or 4 bits: what the numbers in a quantised tensor mean, and how they are made.

This module is arithmetic on tensors.  It must not know files (loader.py) or kernels (backends/linear.py and
linear_cuda.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .config import SCHEMES
from .errors import ConfigError

GROUP = 32  # weights along a row that share a scale, at 4 bits
BLOCK = 1 << 18  # weights that are quantised together: what is computed on the way stays in the CPU's caches

Bits = Literal[4, 8]


@dataclass(frozen=True)
class Scheme:
    """How the linear layers of a model are stored, and what is multiplied with what.

    int8: 8 bits, a scale for each output channel, and activations rounded to 8 bits, token by token, as they come
    (by the CPU backend and on CUDA; others do int8-a16, and say so).
    int8-a16: the same weights, activations as they are.  int4: 4 bits, a scale for every 32 weights, activations as
    they are.  The output projection has 8 bits in every scheme, for it decides between tokens, and so have layers whose
    rows do not divide into groups of 32; embeddings, norms and biases stay as they are.  Where CUDA multiplies 8 bits
    with 16-bit activations as they are, these are whole numbers of 16 bits with a scale for each token.
    """

    name: str

    def __post_init__(self) -> None:
        if self.name not in SCHEMES:
            raise ConfigError(f"weights are {self.name!r}; choose one of auto, {', '.join(SCHEMES)}")

    def bits(self, module: str, width: int) -> Bits:
        """Bits of the weights of the linear layer with this name, and rows of this width."""
        return 4 if self.name == "int4" and module != "lm_head" and width % GROUP == 0 else 8

    @property
    def rounds_activations(self) -> bool:
        """Whether activations are rounded to 8 bits before they meet 8-bit weights."""
        return self.name == "int8"


@dataclass(frozen=True)
class Quantised:
    """A weight matrix [N, K] as whole numbers times scales.

    8 bits: codes int8 [N, K] in -127..127, scales float32 [N, 1]; weight = code * scale.
    4 bits: codes uint8 [N, K / 2], scales bfloat16 [N, K / 32]; weight = (nibble - 8) * scale.  Element 2i of a row is
    the low nibble of byte i, element 2i + 1 the high one: (-8, 7) -> 0xF0.
    """

    codes: Tensor
    scales: Tensor

    @property
    def bits(self) -> Bits:
        """8 or 4."""
        return 8 if self.codes.dtype == torch.int8 else 4

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K) of the matrix that this stands for."""
        rows, width = self.codes.shape
        return rows, width * 8 // self.bits

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.codes.nbytes + self.scales.nbytes

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The matrix [N, K] that this stands for."""
        if self.bits == 8:
            return (self.codes.to(torch.float32) * self.scales).to(dtype)
        numbers = unpack_nibbles(self.codes).to(torch.float32).sub_(8)  # [N, K]
        scales = self.scales.to(torch.float32).unsqueeze(2)  # [N, K / 32, 1]
        dense: Tensor = numbers.unflatten(1, (-1, GROUP)) * scales  # [N, K / 32, 32]
        return dense.flatten(1).to(dtype)

    @classmethod
    def join(cls, parts: list[Quantised]) -> Quantised:
        """Matrices of one width, one below the other: scales are per row, so nothing is rounded again."""
        if len(parts) == 1:
            return parts[0]
        return cls(torch.cat([part.codes for part in parts]), torch.cat([part.scales for part in parts]))


def shapes(rows: int, width: int, bits: Bits) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of the codes and scales of a matrix [rows, width]: the one place that knows."""
    if bits == 8:
        return {"codes": ((rows, width), torch.int8), "scales": ((rows, 1), torch.float32)}
    return {"codes": ((rows, width // 2), torch.uint8), "scales": ((rows, width // GROUP), torch.bfloat16)}


def quantise(weight: Tensor, bits: Bits) -> Quantised:
    """weight [N, K] -> the nearest numbers, a block of rows at a time."""
    rounding = _to_int8 if bits == 8 else _to_int4
    rows, width = weight.shape
    made = {name: weight.new_empty(shape, dtype=kind) for name, (shape, kind) in shapes(rows, width, bits).items()}
    for start, stop in blocks(rows, width):
        made["codes"][start:stop], made["scales"][start:stop] = rounding(weight[start:stop].to(torch.float32))
    return Quantised(made["codes"], made["scales"])


def blocks(rows: int, width: int, most: int = BLOCK) -> Iterator[tuple[int, int]]:
    """Row ranges (start, stop) of a matrix that hold at most `most` numbers each, and at least a row."""
    step = max(1, most // width)
    for start in range(0, rows, step):
        yield start, min(rows, start + step)


def _to_int8(rows: Tensor) -> tuple[Tensor, Tensor]:
    """float32 [n, K] -> int8 [n, K], float32 [n, 1]: the largest weight of a row becomes 127."""
    scales = rows.abs().amax(1, keepdim=True).clamp_(min=1e-30) / 127  # [n, 1]
    return (rows / scales).round_().to(torch.int8), scales


def _to_int4(rows: Tensor) -> tuple[Tensor, Tensor]:
    """float32 [n, K] -> uint8 [n, K / 2], bfloat16 [n, K / 32].

    The largest weight of a group, with its sign, becomes -8, the one number that has no opposite.  Then the scale is
    chosen that is best for these codes, in least squares: sum(w q) / sum(q q).
    """
    groups = rows.unflatten(1, (-1, GROUP))  # [n, g, 32]
    low, high = groups.aminmax(dim=2)  # [n, g] each
    scales = torch.where(-low >= high, low, high) / -8
    scales = torch.where(scales == 0, 1e-30, scales)
    codes = (groups / scales.unsqueeze(2)).round_().clamp_(-8, 7)  # [n, g, 32]
    best = torch.linalg.vecdot(groups, codes) / torch.linalg.vecdot(codes, codes).clamp_(min=1)  # [n, g]
    return pack_nibbles(codes.flatten(1).add_(8).to(torch.uint8)), best.to(torch.bfloat16)


def pack_nibbles(numbers: Tensor) -> Tensor:
    """uint8 [n, K] in 0..15 -> uint8 [n, K / 2], two at a time as the bytes of a 16-bit number (0x0B0A -> 0xBA)."""
    pairs = numbers.contiguous().view(torch.int16)  # [n, K / 2]
    return ((pairs >> 4) | pairs).to(torch.uint8)


def unpack_nibbles(codes: Tensor) -> Tensor:
    """The inverse: uint8 [n, K / 2] -> uint8 [n, K]."""
    return torch.stack((codes & 15, codes >> 4), 2).flatten(1)
