"""Linear layers of the CPU backend: one form of each weight in memory, for decode and for prefill alike.

The packed forms are made and read by private operators of torch (`torch.ops.mkldnn`, `torch.ops.onednn`,
`_weight_int4pack_mm_for_cpu`), which tests pin to what they are taken for; where torch lacks one, the plain layer runs.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import quant
from ..quant import GROUP, Bits, Quantised, blocks
from . import native

# Weights that are held dense at a time, where a product wants them so: on a CPU what stays in its caches (with 8 times
# as many, one row took 10 times as long on an EPYC), on a GPU enough to fill it, 16 MiB of bfloat16.
DENSE_NUMBERS = {"cpu": 1 << 20, "cuda": 1 << 23}
PANEL_NUMBERS = 1 << 19  # the same for 4 bits in the order in which oneDNN packs: 1 MiB, which stays in the cache
ZERO = 128  # what stands for 0 in 8-bit activations


def make_linear(
    weight: Tensor | Quantised, bias: Tensor | None, *, dtype: torch.dtype, rounds_activations: bool = True
) -> Linear:
    """The fastest layer on the CPU for a weight [N, K] and activations in `dtype`; it takes the place of `weight`."""
    if isinstance(weight, Tensor):
        return OneDNNLinear(weight, bias) if can_pack(dtype) else PlainLinear(weight, bias)
    if weight.bits == 8:
        if rounds_activations and has_int8():
            return Int8RoundedLinear(weight, bias)
        return DenseLinear(weight, bias)
    rows, _ = weight.shape
    if has_int4(dtype) and rows % native.TILE == 0:
        return Int4NativeLinear(weight, bias)
    return Int4Linear(weight, bias, dtype) if rows % 64 == 0 else DenseLinear(weight, bias)


def quantise(weight: Tensor, bits: Bits) -> Quantised:
    """`quant.quantise`, by native.c where it can (sums of 32 products are then rounded in another order)."""
    suits = weight.dtype == torch.bfloat16 and weight.device.type == "cpu" and weight.shape[1] % GROUP == 0
    if suits and native.missing() is None:
        return native.quantise(weight.contiguous(), bits)
    return quant.quantise(weight, bits)


def can_pack(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies this dtype well on this CPU."""
    if not torch.backends.mkldnn.is_available() or dtype not in (torch.float32, torch.bfloat16):
        return False
    return dtype == torch.float32 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def pack(weight: Tensor) -> Tensor:
    """A weight [N, K] in the order in which oneDNN's kernels read it."""
    return torch.ops.mkldnn._reorder_linear_weight(weight, 32)  # type: ignore[no-any-return]  # better for many rows


def multiply_packed(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    """x [M, K] times what `pack` gave -> [M, N]."""
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")  # type: ignore[no-any-return]


@cache
def packs_panels(rows: int, width: int, threads: int) -> bool:  # noqa: ARG001
    """Whether oneDNN packs weights [rows, width] of bfloat16 in `native.panels` for so many threads."""
    weight = torch.arange(rows * width).view(rows, width).to(torch.bfloat16)
    return native.panels(pack(weight), weight) is not None


def has_int4(dtype: torch.dtype) -> bool:
    """Whether native.c multiplies 4-bit weights; torch's operator keeps a zero beside each of their scales."""
    return native.missing() is None and dtype == torch.bfloat16


@cache
def has_int8() -> bool:
    """Whether oneDNN is there, and its 8-bit products are right on this CPU: without instructions made for them (VNNI),
    pairs of products are added up in 16 bits, which overflow.
    """
    if "onednn" not in torch.backends.quantized.supported_engines:
        return False
    rows, width = 32, 64
    largest = Int8RoundedLinear(Quantised(torch.full((rows, width), 127, dtype=torch.int8), torch.ones(rows, 1)), None)
    return all(bool((largest(torch.ones(count, width)) - 127 * width).abs().max() < 1) for count in (1, 40))


def dense_numbers(device: torch.device) -> int:
    """Weights in 8 or 4 bits that become numbers at a time."""
    return DENSE_NUMBERS.get(device.type, DENSE_NUMBERS["cuda"])


class Linear(nn.Module):
    """y = x W^T + bias for x [..., K]; subclasses say how W is kept and multiply two-dimensional x.

    form: how native.c multiplies few rows of bfloat16 activations, where it does.
    """

    form: native.Linear | None = None
    few = native.MOST_ROWS

    def __init__(self, shape: tuple[int, int], bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = shape
        self.bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        """`forward`, and the hooks of torch's modules only where there are any: looking for them takes microseconds."""
        return super().__call__(x) if self._forward_hooks or self._forward_pre_hooks else self.forward(x)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 2:
            return self.forward(x.reshape(-1, self.in_features)).view(*x.shape[:-1], self.out_features)
        if self.form is not None and self.by_native(x.dtype) and x.shape[0] <= self.few:
            return native.linear(self.form, x.contiguous())  # [M, N]
        return self.product(x)  # [M, N]

    def product(self, x: Tensor) -> Tensor:
        """x [M, K] -> [M, N], bias included."""
        raise NotImplementedError

    def fewest_alike(self, rows: int, dtype: torch.dtype) -> int:
        """The fewest rows of x that are multiplied as `rows` are, so that results are the same bit for bit.

        One row of float32 goes to another kernel of oneDNN than two, and few rows of bfloat16 to native.c.
        """
        return min(rows, 2 if not self.by_native(dtype) or rows <= self.few else self.few + 1)

    def by_native(self, dtype: torch.dtype) -> bool:
        """Whether native.c multiplies few rows of activations."""
        return self.form is not None and dtype == torch.bfloat16

    @property
    def nbytes(self) -> int:
        """Bytes of the weights, as they are kept."""
        raise NotImplementedError


class PlainLinear(Linear):
    """As torch does it."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__((weight.shape[0], weight.shape[1]), bias)
        self.weight = weight

    def product(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def fewest_alike(self, rows: int, dtype: torch.dtype) -> int:  # noqa: ARG002
        return rows  # torch's kernels change at 4 and 8, too

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes


class OneDNNLinear(Linear):
    """float32 or bfloat16 in the order in which oneDNN's kernels read it, and native.c for few rows of activations:
    oneDNN reads memory at 85% of its speed on a Xeon, and at 60% on an EPYC.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__((weight.shape[0], weight.shape[1]), bias)
        self.packed = pack(weight)
        self._nbytes = weight.nbytes
        panels = native.panels(self.packed, weight) if weight.dtype == torch.bfloat16 else None
        if panels is not None:
            self.form = native.form("pairs", (self.out_features, self.in_features), panels, bias=bias)

    def product(self, x: Tensor) -> Tensor:
        return multiply_packed(x, self.packed, self.bias)

    @property
    def nbytes(self) -> int:
        return self._nbytes


class Int8RoundedLinear(Linear):
    """8-bit weights times activations that are rounded to 8 bits, each token with a scale of its own.

    Activations are uint8 with 128 for zero: without AMX, oneDNN multiplies int8 by int8 a number at a time, 500 times
    slower.
    """

    def __init__(self, weight: Quantised, bias: Tensor | None) -> None:
        super().__init__(weight.shape, bias)
        self._nbytes = weight.nbytes
        self.packed = torch.ops.onednn.qlinear_prepack(weight.codes, None)
        self.scales = weight.scales.flatten()  # [N]
        self.zeros = torch.zeros(1, dtype=torch.int64)  # for all rows
        self.one, self.zero = torch.ones(()), torch.tensor(ZERO)
        panels = native.panels(self.packed, weight.codes)
        if panels is not None:
            some = weight.codes.split(256)  # rows: torch sums int8 as int32, and makes that of all of them first
            self.shifts = torch.cat([codes.sum(1, dtype=torch.int32) for codes in some]) * ZERO  # [N]
            self.form = native.form("rounded", weight.shape, panels, self.scales, self.shifts, bias)

    def product(self, x: Tensor) -> Tensor:
        codes, scales = round_rows(x)  # [M, K], [M, 1]
        y = torch.ops.onednn.qlinear_pointwise(
            codes, self.one, self.zero, self.packed, self.scales, self.zeros, None, 1.0, 0, x.dtype, "none", [], ""
        )
        y.mul_(scales.to(y.dtype))
        return y if self.bias is None else y.add_(self.bias)  # type: ignore[no-any-return]

    @property
    def nbytes(self) -> int:
        return self._nbytes


class DenseLinear(Linear):
    """Weights that become numbers a block of rows at a time, where no kernel multiplies them as they are.

    What every other kind is compared with, on every device.  by_native: native.c may multiply 8 bits and few rows of
    activations.  unit: rows that stay together.
    """

    unit = 1

    def __init__(self, weight: Quantised, bias: Tensor | None, *, by_native: bool = True) -> None:
        super().__init__(weight.shape, bias)
        self.weight = weight
        if by_native and weight.bits == 8 and native.missing() is None:
            self.form = native.form("whole", weight.shape, weight.codes.data_ptr(), weight.scales, bias=bias)

    def product(self, x: Tensor) -> Tensor:
        y, most = x.new_empty(x.shape[0], self.out_features), dense_numbers(x.device)  # y [M, N]
        for start, stop in blocks(self.out_features // self.unit, self.in_features * self.unit, most):
            some = slice(start * self.unit, stop * self.unit)
            part = self.part(some)
            # Whole numbers are exact in bfloat16, and the scale of a row can wait; float16 would overflow.
            if part.bits == 8 and x.dtype != torch.float16:
                y[:, some] = F.linear(x, part.codes.to(x.dtype)) * part.scales.to(x.dtype).flatten()
            else:
                y[:, some] = F.linear(x, part.dense(x.dtype))
        return y if self.bias is None else y.add_(self.bias)

    def part(self, rows: slice) -> Quantised:
        """Some rows of the weight; they begin and end at multiples of `unit`."""
        return Quantised(self.weight.codes[rows], self.weight.scales[rows])

    def fewest_alike(self, rows: int, dtype: torch.dtype) -> int:
        return super().fewest_alike(rows, dtype) if self.by_native(dtype) and rows <= self.few else rows

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes


class Int4Linear(Linear):
    """4-bit weights by torch's own operator: as fast as memory for one row, slow for many."""

    def __init__(self, weight: Quantised, bias: Tensor | None, dtype: torch.dtype) -> None:
        """dtype: of the activations, in which the operator wants the scales."""
        super().__init__(weight.shape, bias)
        codes = quant.unpack_nibbles(weight.codes).to(torch.int32)  # [N, K]
        self.packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        scales = weight.scales.T.to(dtype)  # [K / 32, N]
        self.scales = torch.stack((scales, torch.zeros_like(scales)), 2)  # [K / 32, N, 2]: scale, and what 8 stands for

    def product(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x.contiguous(), self.packed, GROUP, self.scales)
        return y if self.bias is None else y.add_(self.bias)

    @property
    def nbytes(self) -> int:
        return int(self.packed.nbytes + self.scales.nbytes)


class Int4NativeLinear(Linear):
    """4-bit weights by native.c: few rows at the speed of memory, many as bfloat16, a block of weights at a time."""

    def __init__(self, weight: Quantised, bias: Tensor | None) -> None:
        super().__init__(weight.shape, bias)
        self.codes, self.scales = native.pack_int4(weight)
        self.form = native.form("nibbles", weight.shape, self.codes.data_ptr(), self.scales, bias=bias)
        self.by_amx = native.has_amx() and self.out_features % 32 == 0
        self.few = native.MOST_ROWS // 2 if self.by_amx else native.MOST_ROWS

    def product(self, x: Tensor) -> Tensor:
        if self.by_amx:
            y = native.int4_many(x.contiguous(), self.codes, self.scales)
            return y if self.bias is None else y.add_(self.bias)
        panels = -(-min(PANEL_NUMBERS // self.in_features, self.out_features) // native.PANEL)
        some = panels * native.PANEL  # rows of weights, and perhaps a few more than there are: nobody reads those
        packed = pack(x.new_zeros(some, self.in_features))
        if not packs_panels(some, self.in_features, torch.get_num_threads()):
            return torch.cat([self.forward(few) for few in x.split(self.few)])  # slow, but right
        address, y = int(torch.ops.mkldnn.data_ptr(packed)), x.new_empty(x.shape[0], self.out_features)
        for start in range(0, self.out_features, some):
            stop = min(self.out_features, start + some)
            native.int4_panels(self.codes, self.scales, start, stop, address)
            y[:, start:stop] = multiply_packed(x, packed, None)[:, : stop - start]
        return y if self.bias is None else y.add_(self.bias)

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes


def fewest_alike(module: nn.Module, rows: int, dtype: torch.dtype) -> int:
    """The fewest rows of activations that each linear layer in a module multiplies as it does `rows`, bit for bit."""
    fewest = [layer.fewest_alike(rows, dtype) for layer in module.modules() if isinstance(layer, Linear)]
    plain = any(isinstance(layer, nn.Linear) for layer in module.modules())
    return max(fewest, default=1) if not plain else rows


def round_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [M, K] -> uint8 [M, K] and scales [M, 1], so that x is about (uint8 - 128) * scale; float32 scales."""
    if rounds_natively(x):
        return native.round_rows(x.contiguous())
    scales = x.abs().amax(1, keepdim=True).to(torch.float32).clamp_(min=1e-30) / 127  # [M, 1]
    return (x / scales).round_().add_(ZERO).to(torch.uint8), scales


def rounds_natively(x: Tensor) -> bool:
    """Whether native.c rounds activations of this kind."""
    return x.dtype == torch.bfloat16 and x.shape[1] % 16 == 0 and native.missing() is None
