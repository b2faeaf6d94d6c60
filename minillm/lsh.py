"""Locality-sensitive hashing of vectors to packed bits, whose Hamming distance estimates an angle.

SimHash (Charikar 2002): for Gaussian rows r_1..r_P, bit p of a vector x is 1 where r_p . x >= 0.  For two vectors at
angle theta the expected Hamming distance of their codes is P * theta / pi.  Nothing here knows about caches or
attention.
"""

from __future__ import annotations

import torch
from torch import Tensor


def projection(bits: int, head_dim: int, *, seed: int, layer: int, heads: int = 1, orthogonal: bool = False) -> Tensor:
    """The Gaussian rows [heads, P, D] of one layer in float32, a function of seed and layer alone.

    float32 always: a bfloat16 projection flips bits of vectors that lie near a hyperplane.  orthogonal: every D rows
    are made orthogonal, which spreads the hyperplanes evenly (Ji et al., "Super-Bit LSH", NeurIPS 2012).
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + layer)
    rows = torch.randn(heads, bits, head_dim, generator=generator, dtype=torch.float32)  # [heads, P, D]
    if not orthogonal:
        return rows
    # Rows are columns of Q: at most D at a time can be orthogonal.  Lengths do not matter to signs.
    blocks = [torch.linalg.qr(block.transpose(1, 2)).Q.transpose(1, 2) for block in rows.split(head_dim, dim=1)]
    return torch.cat(blocks, 1)  # [heads, P, D]


def code_words(bits: int) -> tuple[int, torch.dtype]:
    """(W, dtype) of a packed code: the fewest whole bytes, in the widest integers that divide them.

    16 bits -> one int16; 24 bits -> three int8; 64 -> one int64; 96 -> three int32; 128 -> two int64.
    """
    size = (bits + 7) // 8
    width = next(width for width in (8, 4, 2, 1) if size % width == 0)
    return size // width, _WORDS[width]


_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_WEIGHTS = {
    1: torch.tensor([1.0, 2, 4, 8, 16, 32, 64, -128]),
    2: 2.0 ** torch.arange(16) * torch.tensor([1.0] * 15 + [-1]),
}


def encode(x: Tensor, rows: Tensor) -> Tensor:
    """Codes of vectors: x [..., n, D] and rows [..., P, D] -> packed bits [..., n, W], as `code_words` says."""
    precise = torch.promote_types(x.dtype, rows.dtype)
    projected: Tensor = x.to(precise) @ rows.to(precise).transpose(-1, -2)  # [..., n, P]
    return pack(projected >= 0)  # [..., n, W]


def pack(bits: Tensor) -> Tensor:
    """Booleans [..., P] -> integers [..., W]; bit p of the code is bit p % 16 of 16-bit piece p // 16.

    A piece is a product with powers of two, which float32 holds exactly up to 2^24; the highest bit counts negative, as
    it does in a signed integer.  With 16 bits 1,1,0,...,0,1: 1 + 2 - 32768 = -32765 = 0b1000000000000011 as int16.
    """
    words, dtype = code_words(bits.shape[-1])
    size = words * dtype.itemsize
    piece = 2 if size % 2 == 0 else 1
    if bits.shape[-1] < 8 * size:
        bits = torch.nn.functional.pad(bits, (0, 8 * size - bits.shape[-1]))  # [..., 8 * bytes]
    weights = _WEIGHTS[piece].to(bits.device)
    pieces: Tensor = bits.to(torch.float32).unflatten(-1, (-1, 8 * piece)) @ weights  # [..., pieces]
    return pieces.to(_WORDS[piece]).view(dtype)  # [..., W]


def unpack(codes: Tensor, bits: int) -> Tensor:
    """The inverse of `pack`: integers [..., W] -> booleans [..., P] (a byte holds eight bits, lowest first)."""
    places = torch.arange(8, device=codes.device, dtype=torch.uint8)  # [8]
    pieces = codes.contiguous().view(torch.uint8).unsqueeze(-1) >> places & 1  # [..., bytes, 8]
    return pieces.flatten(-2)[..., :bits].bool()  # [..., P]


def dot(codes: Tensor, numbers: Tensor) -> Tensor:
    """Dot products of codes [..., S, W], read as +1 and -1, with numbers [..., P]: [..., S] in the numbers' dtype.

    Byte by byte, from a table of the 256 sums that a byte can give: no code is ever spread out to P numbers.
    """
    spare = -numbers.shape[-1] % 8
    groups = torch.nn.functional.pad(numbers, (0, spare)).unflatten(-1, (-1, 8))  # [..., bytes, 8]
    every_byte = torch.arange(256, device=codes.device, dtype=torch.uint8)[:, None]  # [256, 1]
    signs = unpack(every_byte, 8).to(numbers.dtype) * 2 - 1  # [256, 8]
    table = groups @ signs.T  # [..., bytes, 256]
    pieces = codes.view(torch.uint8)  # [..., S, bytes]
    total = torch.zeros(codes.shape[:-1], dtype=numbers.dtype, device=codes.device)  # [..., S]
    for byte in range(table.shape[-2]):
        total += table[..., byte, :].gather(-1, pieces[..., byte].to(torch.int64))
    return total


def hamming(a: Tensor, b: Tensor) -> Tensor:
    """Number of differing bits between packed codes [..., W] of one dtype, broadcast against each other: int64
    [...].
    """
    ones = popcount(a ^ b)  # [..., W]
    return ones.sum(-1) if ones.shape[-1] > 1 else ones[..., 0].to(torch.int64)  # [...]; a sum of one is 4x slower


def popcount(x: Tensor) -> Tensor:
    """Ones in every integer, by adding neighbouring bits, pairs, nibbles, then bytes (Hacker's Delight, section
    5-1).
    """
    ones, width = {1: 0x01, 2: 0x0101, 4: 0x01010101, 8: 0x0101010101010101}[x.itemsize], 8 * x.itemsize
    x = x - ((x >> 1) & (ones * 0x55))
    x = (x & (ones * 0x33)) + ((x >> 2) & (ones * 0x33))
    x = (x + (x >> 4)) & (ones * 0x0F)
    return (x * ones >> (width - 8)) & 0x7F
