"""Hash codes: packing, distances, and the angle they estimate."""

from __future__ import annotations

import math

import pytest
import torch

from minillm import lsh

BITS = [1, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 130]


@pytest.mark.parametrize("bits", BITS)
def test_codes_are_no_wider_than_needed(bits: int) -> None:
    words, dtype = lsh.code_words(bits)
    assert words * dtype.itemsize == math.ceil(bits / 8)


def test_word_types_of_the_docstring() -> None:
    assert lsh.code_words(16) == (1, torch.int16)
    assert lsh.code_words(24) == (3, torch.int8)
    assert lsh.code_words(64) == (1, torch.int64)
    assert lsh.code_words(96) == (3, torch.int32)
    assert lsh.code_words(128) == (2, torch.int64)
    sixteen = torch.tensor([True, True] + [False] * 13 + [True])
    assert lsh.pack(sixteen).tolist() == [-32765]


@pytest.mark.parametrize("bits", BITS)
def test_pack_and_hamming_agree_with_python_integers(bits: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    a = torch.rand(7, 1, bits, generator=generator) < 0.5
    b = torch.rand(1, 5, bits, generator=generator) < 0.5
    words, dtype = lsh.code_words(bits)
    packed = lsh.pack(a)
    assert packed.dtype == dtype
    assert packed.shape == (7, 1, words)
    assert torch.equal(lsh.hamming(packed, lsh.pack(b)), (a ^ b).sum(-1))


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.int64])
def test_hamming_at_the_extremes_of_every_word(dtype: torch.dtype) -> None:
    info = torch.iinfo(dtype)
    values = [0, 1, -1, info.min, info.max, 0x55 % info.max, -2]
    a = torch.tensor(values, dtype=dtype)[:, None, None]
    expected = [[((x ^ y) & ((1 << info.bits) - 1)).bit_count() for y in values] for x in values]
    assert lsh.hamming(a, a.transpose(0, 1)).tolist() == expected


def test_zero_counts_as_one() -> None:
    assert lsh.encode(torch.zeros(3), lsh.projection(16, 3, seed=0, layer=0)[0]).tolist() == [-1]


def test_distance_estimates_the_angle() -> None:
    """E[Hamming] = P * theta / pi: checked at five angles with 20,000 bits, five standard errors."""
    bits = 20_000
    rows = lsh.projection(bits, 64, seed=1, layer=0)[0]
    x = torch.zeros(64)
    x[0] = 3.0
    for theta in (0.1, 0.7, 1.5, 2.4, 3.0):
        y = torch.zeros(64)
        y[0], y[1] = math.cos(theta), math.sin(theta)
        share = lsh.hamming(lsh.encode(x, rows), lsh.encode(y, rows)).item() / bits
        p = theta / math.pi
        assert abs(share - p) < 5 * math.sqrt(p * (1 - p) / bits)


def test_projection_depends_on_seed_and_layer_only() -> None:
    first = lsh.projection(16, 8, seed=3, layer=2)
    assert first.dtype == torch.float32
    assert torch.equal(first, lsh.projection(16, 8, seed=3, layer=2))
    assert not torch.equal(first, lsh.projection(16, 8, seed=4, layer=2))
    assert not torch.equal(first, lsh.projection(16, 8, seed=3, layer=1))


def test_float64_input_is_hashed_in_float64() -> None:
    """A vector that float32 would round onto the hyperplane keeps its side."""
    rows = torch.tensor([[1.0, -1.0]])
    below = torch.tensor([1.0, 1.0 + 1e-12], dtype=torch.float64)
    assert lsh.encode(below, rows).tolist() == [0]
    assert lsh.encode(below.float(), rows).tolist() == [1]
