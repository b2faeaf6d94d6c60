"""Linear layers on CUDA: quantised weights, multiplied by PyTorch's own kernels as they are.

Both operators are private to torch.  What they are taken for was read in its source (aten/src/ATen/native/cuda:
int4mm.cu, and _int_mm in Blas.cpp), where it stands since 2.5; no GPU has run them from here yet.  The newer
`_weight_int8pack_mm` is not used: a single thread walks each row of weights (int8mm.cu, pytorch#190529).
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from ..quant import GROUP, Bits, Quantised
from .linear import DenseLinear, Linear, dense_numbers

MOST_ROWS = 64  # of activations for `_weight_int4pack_mm`, which reads all weights again for every 16
EVEN_ROWS = 32  # `_int_mm` refuses 16 rows and fewer, and cuBLAS has summed 17 wrongly (pytorch#107671)
TILE = 8  # rows of weights that tensor cores take together


def make_linear(weight: Quantised, bias: Tensor | None, *, dtype: torch.dtype, rounds_activations: bool) -> Linear:
    """The layer for a weight [N, K], where it lies, and activations in `dtype`: dense where no kernel here serves."""
    kind = kind_of(weight.shape, weight.bits, weight.codes.device, dtype, rounds_activations=rounds_activations)
    if kind is Int8CudaLinear:
        return Int8CudaLinear(weight, bias, rounds_activations=rounds_activations)
    return Int4CudaLinear(weight, bias) if kind is Int4CudaLinear else DenseLinear(weight, bias, by_native=False)


def kind_of(
    shape: tuple[int, int], bits: Bits, device: torch.device, dtype: torch.dtype, *, rounds_activations: bool
) -> type[Linear]:
    """Which layer that is."""
    return DenseLinear if missing(device) else kind_for(shape, bits, dtype, rounds_activations=rounds_activations)


def kind_for(shape: tuple[int, int], bits: Bits, dtype: torch.dtype, *, rounds_activations: bool) -> type[Linear]:
    """The same where `missing` says nothing: what the operators' limits leave."""
    rows, width = shape
    if bits == 4:  # a group is 32 columns, two tiles of tensor cores, so every width will do
        return Int4CudaLinear if dtype == torch.bfloat16 and rows % TILE == 0 else DenseLinear
    whole = rows % 8 == 0 and width % 8 == 0
    return Int8CudaLinear if whole and (rounds_activations or dtype.itemsize == 2) else DenseLinear


def keeps_zeros(shape: tuple[int, int], device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a 4-bit weight of this shape has a zero beside each scale."""
    return kind_of(shape, 4, device, dtype, rounds_activations=False) is Int4CudaLinear


def product_bytes(count: int, shape: tuple[int, int], device: torch.device) -> int:
    """The most bytes that a product of `count` rows of activations holds beside them and what it gives, in any layer
    of `make_linear`: a block of weights as numbers, or two digits of activations and their products.
    """
    rows, width = shape
    digits = 2 * count + EVEN_ROWS
    return max(11 * min(dense_numbers(device), rows * width), 16 * count * width + digits * (2 * width + 8 * rows))


def missing(device: torch.device) -> str | None:
    """Why the kernels do not run on a device; None where they do."""
    if device.type != "cuda":
        return "there is no CUDA device"
    if torch.version.hip is not None:
        return "this torch is for ROCm, where weights of 4 bits lie in another order"
    major, minor = torch.cuda.get_device_capability(device)
    return None if major >= 8 else f"they need compute capability 8.0, and this GPU has {major}.{minor}"


class Int4CudaLinear(DenseLinear):
    """4-bit weights in the order of tensor cores: few rows of bfloat16 activations by torch's `tinygemm`, many dense.

    On an A6000, the authors of hqq measured that 128 rows take it as long as making the weights numbers and multiplying
    those (torchao, prototype/hqq).  What it computes with is (nibble - 8) * scale + zero, rounded to bfloat16.
    """

    unit = TILE

    def __init__(self, weight: Quantised, bias: Tensor | None) -> None:
        Linear.__init__(self, weight.shape, bias)
        tiles = next(tiles for tiles in (8, 4, 2) if self.in_features % (tiles * 16) == 0)
        self.packed = pack_tiles(weight.codes, tiles)
        scales = weight.scales.T  # [K / 32, N]
        self.scales = torch.stack((scales, torch.zeros_like(scales)), 2)  # [K / 32, N, 2]: scale, zero
        self.few = MOST_ROWS if unpacks(tiles, weight.codes.device) else 1 << 31  # or all, slow but right

    def product(self, x: Tensor) -> Tensor:
        if x.shape[0] > self.few:
            return super().product(x)
        y: Tensor = torch.ops.aten._weight_int4pack_mm(x.contiguous(), self.packed, GROUP, self.scales)
        return y if self.bias is None else y.add_(self.bias)

    def part(self, rows: slice) -> Quantised:
        codes = unpack_tiles(self.packed[rows.start // TILE : rows.stop // TILE])
        return Quantised(codes, self.scales[:, rows, 0].T)

    @property
    def nbytes(self) -> int:
        return int(self.packed.nbytes + self.scales.nbytes)


def pack_tiles(codes: Tensor, tiles: int) -> Tensor:
    """uint8 [N, K / 2] -> int32 [N / 8, K / (16 * tiles), 32, tiles / 2]; torch wants the first of two nibbles high."""
    swapped = (codes << 4).bitwise_or_(codes >> 4)  # [N, K / 2]
    return torch.ops.aten._convert_weight_to_int4pack(swapped, tiles)  # type: ignore[no-any-return]


def unpack_tiles(packed: Tensor) -> Tensor:
    """The inverse: int32 [n, k, 32, t] -> uint8 [8 * n, 16 * k * t].

    A number is what thread (row r, column pair c) of a tile holds of 32 weights of a row.  Nibble i of its low half is
    weight 8 * i + 2 * c, nibble i of its high half the one after.
    """
    n, k, _, t = packed.shape
    first, second = packed.view(torch.uint8).view(n, k, TILE, 4, t, 2, 2).unbind(5)  # [n, k, r, c, t, i / 2] each
    pairs = torch.stack(((second << 4) | (first & 15), (second & 240) | (first >> 4)), 6)  # [n, k, r, c, t, i / 2, 2]
    return pairs.permute(0, 2, 1, 4, 5, 6, 3).reshape(n * TILE, -1)  # [n * r, k * t * i * c]


@cache
def unpacks(tiles: int, device: torch.device) -> bool:
    """Whether torch packs as `unpack_tiles` takes it to do."""
    drawn = torch.randint(256, (2 * TILE, 16 * tiles), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    codes = drawn.to(device)
    return torch.equal(unpack_tiles(pack_tiles(codes, tiles)), codes)


class Int8CudaLinear(Linear):
    """8-bit weights times activations of 8 or 16 bits, whole numbers with a scale for each token, by tensor cores.

    An activation of 16 bits is two digits of 8, which are multiplied as rows of their own: high * 254 + low, up to
    127 * 254.  It is off by 2^-16 of the largest one in its row at most.  Sums of products are exact.
    """

    def __init__(self, weight: Quantised, bias: Tensor | None, *, rounds_activations: bool) -> None:
        """rounds_activations: to 8 bits."""
        super().__init__(weight.shape, bias)
        self.codes, self.scales = weight.codes, weight.scales.flatten()  # [N, K], [N]
        self.base = 1 if rounds_activations else 254

    def product(self, x: Tensor) -> Tensor:
        most = torch.linalg.vector_norm(x, float("inf"), 1, keepdim=True, dtype=torch.float32)  # [M, 1]
        scales = most.clamp_(min=1e-30) / (127 * self.base)  # [M, 1]
        numbers = (x / scales).round_()  # [M, K], whole
        digits = [numbers]
        if self.base > 1:
            high = (numbers / self.base).round_()  # [M, K]
            digits = [high, numbers.sub_(high, alpha=self.base)]
        codes = torch.cat(digits).to(torch.int8)  # [digits * M, K]
        padded = F.pad(codes, (0, 0, 0, -len(codes) % EVEN_ROWS))
        sums = torch._int_mm(padded, self.codes.T)[: len(codes)].to(torch.float32)  # [digits * M, N]
        y = sums[-len(x) :]  # [M, N]
        if self.base > 1:
            y = y.add_(sums[: len(x)], alpha=self.base)  # [M, N]
        y = y.mul_(scales).mul_(self.scales)
        return (y if self.bias is None else y.add_(self.bias)).to(x.dtype)

    def fewest_alike(self, rows: int, dtype: torch.dtype) -> int:  # noqa: ARG002
        return rows  # these sums are exact, but what stands between the layers of a model on CUDA is torch's

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes
