"""Quantised weights on CUDA, by PyTorch's kernels.

`_int_mm` is there for CPUs, too, and really runs here.  The two operators for 4 bits are not: stand-ins take their
place on the CPU, written lane by lane after int4mm.cu and the fragments of mma.m16n8k16.  That proves no more than that
its source was read in one way throughout; the same tests run with the real ones where there is a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from minillm.backends import linear, linear_cuda
from minillm.backends.linear import DenseLinear, Int4Linear, Linear, has_int8
from minillm.backends.linear_cuda import Int4CudaLinear, Int8CudaLinear, kind_for, product_bytes
from minillm.budget import CachePlan
from minillm.checkpoint import Checkpoint
from minillm.engine import fewest_alike
from minillm.loader import save_checkpoint
from minillm.quant import Bits, Quantised, Scheme, quantise

from .test_cpu_backend import distance, heads, run_mixed, tokens_of
from .test_cpu_backend import random_model as biased_model
from .test_memory_plan import Living
from .test_quant import bias_of, bytes_held, random

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
CPU = torch.device("cpu")
LANES = torch.arange(32)


def as_int4mm_packs(codes: Tensor, tiles: int) -> Tensor:
    """`matrix_to_m16n8k16_Bint4_layout` of int4mm.cu: uint8 [N, K / 2] -> int32 [N / 8, K / (16 * t), 32, t / 2]."""
    rows, width = codes.shape[0], codes.shape[1] * 2
    packed = torch.empty(rows // 8, width // (16 * tiles), 32, tiles // 2, dtype=torch.int32)
    for outer in range(packed.shape[1]):
        for inner in range(0, tiles, 2):
            base = (outer * tiles + inner) * 16 // 2
            v = [codes.view(-1, 8, width // 2)[:, LANES // 4, base + at + LANES % 4].long() for at in (0, 4, 8, 12)]
            word = sum((v[i] & 15) << (16 + 4 * i) for i in range(4)) + sum((v[i] >> 4) << (4 * i) for i in range(4))
            packed[:, outer, :, inner // 2] = word.to(torch.int32)  # type: ignore[union-attr]  # a tensor, as v has some
    return packed


def as_int4mm_multiplies(x: Tensor, packed: Tensor, group: int, scales_and_zeros: Tensor) -> Tensor:
    """`tinygemm_m16n8k16_chunk_kernel`: what lanes and registers hold of the weights, times x [M, K] -> [M, N]."""
    assert (x.dtype, scales_and_zeros.dtype, packed.dtype) == (BF16, BF16, torch.int32)
    assert x.is_contiguous()
    assert scales_and_zeros.is_contiguous()
    n, outers, _, words = packed.shape
    numbers = torch.empty(n, 8, outers * words * 32, dtype=torch.int64)  # [N / 8, 8, K]
    for outer in range(outers):
        for word in range(words):
            for register in range(4):  # two of each k-tile: the second holds what is 8 further
                for half in range(2):
                    nibble = (packed[:, outer, :, word].long() >> (16 * half + 4 * register)) & 15
                    at = (outer * words + word) * 32 + (register // 2) * 16 + (register % 2) * 8
                    numbers[:, LANES // 4, at + LANES % 4 * 2 + half] = nibble
    scales, zeros = scales_and_zeros.float().repeat_interleave(group, 0).unbind(2)  # [K, N] each
    weights = ((numbers.flatten(0, 1) - 8) * scales.T + zeros.T).to(BF16)  # [N, K], rounded once
    return (x.double() @ weights.double().T).to(BF16)


INT_MM = torch._int_mm


def within_cudas_limits(x: Tensor, weight: Tensor) -> Tensor:
    """`_int_mm` of the CPU, for what that of Blas.cpp takes, and cuBLAS as its manual prefers it: x times columns."""
    assert x.shape[0] > 16
    assert not any(size % 8 for size in (*x.shape, *weight.shape))
    assert (x.stride(1), weight.stride(0)) == (1, 1)
    return INT_MM(x, weight)


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The CPU is taken for a CUDA device."""
    library = torch.library.Library("aten", "IMPL")
    library.impl("_convert_weight_to_int4pack", as_int4mm_packs, "CPU")
    library.impl("_weight_int4pack_mm", as_int4mm_multiplies, "CPU")
    monkeypatch.setattr(torch, "_int_mm", within_cudas_limits)
    monkeypatch.setattr(linear_cuda, "missing", lambda _: None)
    linear_cuda.unpacks.cache_clear()
    yield
    linear_cuda.unpacks.cache_clear()
    library._destroy()


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> torch.device:
    """The CPU with stand-ins, and the real thing."""
    found = torch.device(request.param)
    if found.type == "cpu":
        request.getfixturevalue("stand_ins")
    elif not torch.cuda.is_available():
        pytest.skip("there is no GPU here: on one, this is what tells whether its kernels do what we take them to do")
    return found


def moved(weight: Quantised, device: torch.device) -> Quantised:
    return Quantised(weight.codes.to(device), weight.scales.to(device))


# --- who multiplies what ----------------------------------------------------------------------------------------------


def test_kinds_follow_the_operators_limits() -> None:
    def kind(rows: int, width: int, bits: Bits, dtype: torch.dtype, rounds: bool = False) -> type[Linear]:
        return kind_for((rows, width), bits, dtype, rounds_activations=rounds)

    assert kind(8, 32, 4, BF16) is kind(4096, 11008, 4, BF16) is Int4CudaLinear
    assert kind(12, 32, 4, BF16) is kind(8, 32, 4, F16) is kind(8, 32, 4, F32) is DenseLinear
    assert kind(8, 40, 8, BF16) is kind(8, 40, 8, F16) is Int8CudaLinear
    assert kind(8, 40, 8, F32) is DenseLinear, "whole numbers of 16 bits are not float32"
    assert kind(8, 40, 8, F32, rounds=True) is Int8CudaLinear
    assert kind(50, 40, 8, BF16, rounds=True) is kind(8, 36, 8, BF16, rounds=True) is DenseLinear


def test_elsewhere_they_are_dense() -> None:
    assert linear_cuda.missing(CPU) == linear_cuda.missing(torch.device("mps")) == "there is no CUDA device"
    for bits in (8, 4):
        weight = quantise(random(64, 64), bits)  # type: ignore[arg-type]
        layer = linear_cuda.make_linear(weight, None, dtype=BF16, rounds_activations=True)
        assert type(layer) is DenseLinear
        assert layer.form is None


def test_old_gpus_and_rocm_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    place = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert linear_cuda.missing(place) == "they need compute capability 8.0, and this GPU has 7.5"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    assert linear_cuda.missing(place) is None
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "ROCm" in str(linear_cuda.missing(place))


# --- 4 bits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "width"), [(8, 32), (24, 64), (64, 96), (40, 128), (16, 192), (72, 384)])
def test_4_bits(rows: int, width: int, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rows and many, by all three numbers of tiles; what is unpacked again is what was packed, bit for bit."""
    monkeypatch.setitem(linear.DENSE_NUMBERS, device.type, 20 * width)  # several blocks, the last one shorter
    weight = quantise(random(rows, width, scale=0.1), 4)
    for biased in (False, True):
        bias = bias_of(rows, biased, BF16)
        layer = Int4CudaLinear(moved(weight, device), None if bias is None else bias.to(device))
        assert layer.packed.shape[3] * 2 == {0: 8, 64: 4}.get(width % 128, 2)
        assert layer.few == linear_cuda.MOST_ROWS, "torch packs as we take it to do"
        again = layer.part(slice(0, rows))
        assert torch.equal(again.codes.cpu(), weight.codes)
        assert torch.equal(again.scales.cpu(), weight.scales)
        assert layer.nbytes == rows * width // 2 + rows * width // 32 * 4
        right = weight.dense(torch.float64)
        for count in (1, 2, 17, linear_cuda.MOST_ROWS, linear_cuda.MOST_ROWS + 1, 100):
            x = random(count, width, seed=count).to(BF16)
            exact = x.double() @ right.T + (0 if bias is None else bias.double())
            found = layer(x.to(device)).cpu()
            assert (found.shape, found.dtype) == ((count, rows), BF16)
            assert distance(found, exact) < 0.01
            assert torch.equal(layer(x.view(1, count, width).to(device)).cpu()[0], found)
            assert layer.fewest_alike(count, BF16) == count


def test_one_number_at_a_time(device: torch.device) -> None:
    """A weight of which one number is not zero is found where it was put, with its sign: no nibble is swapped."""
    for column in (*range(34), 63, 64, 127, 128, 255):
        dense = torch.zeros(16, 256)
        dense[column % 16, column] = -8.0  # a code that has no opposite
        dense[column % 16, column ^ 1] = 3.0
        layer = Int4CudaLinear(moved(quantise(dense, 4), device), None)
        found = layer(torch.eye(256)[[column, column ^ 1]].to(device, BF16)).cpu()  # [2, 16]
        assert found[:, column % 16].tolist() == [-8.0, 3.0]
        assert int(found.count_nonzero()) == 2


@pytest.mark.usefixtures("stand_ins")
def test_where_torch_packs_otherwise_all_rows_go_to_its_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = quantise(random(16, 64), 4), random(100, 64).to(BF16)
    pack, calls = linear_cuda.pack_tiles, []
    monkeypatch.setattr(linear_cuda, "pack_tiles", lambda codes, tiles: calls.append(tiles) or pack(codes, tiles) ^ 1)
    layer = Int4CudaLinear(weight, None)
    assert calls == [4, 4]  # the layer, and what is asked about it
    layer.packed = pack(weight.codes, 4)
    assert distance(layer(x), x.double() @ weight.dense(torch.float64).T) < 0.01


def test_shapes_are_those_that_torch_says() -> None:
    """Its own rules for shapes on a CUDA device that is not there."""
    with FakeTensorMode():
        for rows, width, tiles in ((64, 32, 2), (64, 192, 4), (128, 256, 8)):
            codes = torch.empty(rows, width // 2, dtype=torch.uint8, device="cuda")
            packed = linear_cuda.pack_tiles(codes, tiles)
            assert packed.shape == (rows // 8, width // 16 // tiles, 32, tiles // 2)
            assert linear_cuda.unpack_tiles(packed).shape == codes.shape
            x = torch.empty(3, width, dtype=BF16, device="cuda")
            scales = torch.empty(width // 32, rows, 2, dtype=BF16, device="cuda")
            assert torch.ops.aten._weight_int4pack_mm(x, packed, 32, scales).shape == (3, rows)


@pytest.mark.usefixtures("stand_ins")
def test_scales_are_those_of_the_operator_for_cpus() -> None:
    """Which takes them as this one does, and really runs, in the tests of quant.py."""
    weight = quantise(random(64, 96), 4)
    assert torch.equal(Int4CudaLinear(weight, None).scales, Int4Linear(weight, None, BF16).scales)


# --- 8 bits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rounds", [True, False])
@pytest.mark.parametrize("dtype", [BF16, F16, F32])
@pytest.mark.parametrize(("rows", "width"), [(8, 8), (40, 96), (64, 200)])
def test_8_bits(rows: int, width: int, dtype: torch.dtype, rounds: bool, device: torch.device) -> None:
    """Within half a step of each activation, and the rounding of what comes out."""
    weight = quantise(random(rows, width, scale=0.1), 8)
    for biased in (False, True):
        bias = bias_of(rows, biased, dtype)
        moved_bias = None if bias is None else bias.to(device)
        layer = Int8CudaLinear(moved(weight, device), moved_bias, rounds_activations=rounds)
        assert layer.nbytes == weight.nbytes
        right = weight.dense(torch.float64)
        for count in (1, 2, 16, 17, 33, 64):
            x = random(count, width, seed=count).to(dtype)
            x[0, :2] *= 30
            exact = x.double() @ right.T + (0 if bias is None else bias.double())
            found = layer(x.to(device)).cpu()
            assert (found.shape, found.dtype) == ((count, rows), dtype)
            step = x.double().abs().amax(1, keepdim=True) / (127 if rounds else 127 * 254)
            unit = {BF16: 2**-8, F16: 2**-11, F32: 1e-6}[dtype]
            allowed = 0.501 * step * right.abs().sum(1) + unit * exact.abs() + 1e-6
            assert bool(((found.double() - exact).abs() <= allowed).all()), count
            assert layer.fewest_alike(count, dtype) == count


def test_whole_numbers_are_multiplied_exactly(device: torch.device) -> None:
    """Activations that need no rounding: 254 * 127 is the largest, and both digits of every number count."""
    weight = Quantised(torch.randint(-127, 128, (16, 64), dtype=torch.int8), torch.ones(16, 1))
    x = torch.randint(-127 * 254, 127 * 254 + 1, (5, 64)).float()
    x[:, 0] = 127 * 254
    layer = Int8CudaLinear(moved(weight, device), None, rounds_activations=False)
    exact = x.double() @ weight.codes.double().T
    assert bool(((layer(x.to(device)).cpu().double() - exact).abs() <= 2**-22 * exact.abs().amax()).all())


@pytest.mark.parametrize("rounds", [True, False])
def test_a_row_of_8_bits_does_not_depend_on_its_neighbours(rounds: bool, device: torch.device) -> None:
    layer = Int8CudaLinear(moved(quantise(random(64, 96), 8), device), None, rounds_activations=rounds)
    x = random(40, 96).to(BF16)
    x[20] *= 1000
    together = layer(x.to(device))
    for count in (1, 2, 7, 31, 33):
        assert torch.equal(layer(x[-count:].to(device)), together[-count:])


@pytest.mark.parametrize("rounds", [True, False])
def test_zeros_stay_zeros_and_damage_stays_visible(rounds: bool, device: torch.device) -> None:
    layer = Int8CudaLinear(moved(quantise(random(8, 32), 8), device), None, rounds_activations=rounds)
    x = torch.zeros(3, 32, dtype=BF16)
    x[1, 3], x[2, 3] = float("inf"), float("nan")
    found = layer(x.to(device)).cpu()
    assert not found[0].any()
    assert not found[1:].isfinite().any()


# --- models -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["int8", "int8-a16", "int4"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_model_of_these_layers(tied: bool, scheme: str, device: torch.device, tmp_path: Path) -> None:
    """Loaded as it is planned, and as near to the reference on a CPU as its precision is."""
    shape = heads(4, 2, 32, vocab_size=128, qkv_bias=True, o_bias=True)
    config = replace(shape, tie_word_embeddings=tied)
    save_checkpoint(tmp_path / "source", biased_model(config, F32), config)
    options = {"weights": scheme, "dtype": "bfloat16", "backend": "reference", "offline": True}
    checkpoint = Checkpoint.open(str(tmp_path / "source"), device=device.type, **options)  # type: ignore[arg-type]
    assert checkpoint.scheme == Scheme(scheme), "int8 rounds activations here"
    model = checkpoint.load_model()
    kinds = {name: type(module) for name, module in model.named_modules() if isinstance(module, Linear)}
    assert len(kinds) == 7 * config.num_hidden_layers + 1
    assert kinds.pop("lm_head") is Int8CudaLinear
    assert set(kinds.values()) == {Int4CudaLinear if scheme == "int4" else Int8CudaLinear}
    assert checkpoint.weight_bytes() == bytes_held(model)
    assert fewest_alike(model, 5, BF16) == 5, "no row is computed in a smaller batch than it will be"

    tokens = tokens_of(28)
    found = run_mixed(model, checkpoint.plan(context=64).allocate(device), tokens).cpu()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear_cuda, "missing", lambda _: "not now")
        plain = Checkpoint.open(str(tmp_path / "source"), device="cpu", **options)  # type: ignore[arg-type]
        expected = run_mixed(plain.load_model(), plain.plan(context=64).allocate(CPU), tokens)
    assert 0 < distance(found, expected) < (0.05 if scheme == "int8" else 0.02)


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize("count", [1, 70])
@pytest.mark.parametrize(("rows", "width"), [(64, 512), (512, 64), (128, 128)])
def test_products_hold_no_more_than_is_planned(rows: int, width: int, count: int) -> None:
    x = random(count, width).to(BF16)
    for rounds in (True, False):
        made = linear_cuda.make_linear(quantise(random(rows, width), 8), None, dtype=BF16, rounds_activations=rounds)
        for layer in (made, DenseLinear(quantise(random(rows, width), 4), None, by_native=False)):
            with Living() as living:
                layer(x)
            assert living.most <= product_bytes(count, (rows, width), x.device) + 2 * count * rows, type(layer)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_products_are_planned_where_weights_become_numbers(backend: str, tmp_path: Path) -> None:
    config = heads(4, 2, 32)
    save_checkpoint(tmp_path / "source", biased_model(config, F32), config)
    for scheme in ("auto", "int4"):
        checkpoint = Checkpoint.open(
            str(tmp_path / "source"), weights=scheme, dtype="bfloat16", device="cpu", backend=backend, offline=True
        )
        plan = CachePlan.of(checkpoint.config, budget=32, whole=64, dtype=checkpoint.dtype)
        vars(checkpoint)["base"] = 0
        parts = checkpoint.memory_plan(plan).parts
        assert ("workspace products" in parts) == (scheme == "int4" and (backend == "reference" or not has_int8()))
