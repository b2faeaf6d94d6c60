"""Weights in 8 and 4 bits: the numbers, the layers that multiply them, the folders they lie in, and what they cost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from minillm import LLM, CheckpointError, ConfigError, ModelNotFoundError, SessionError, quant
from minillm.backends import linear, native
from minillm.backends.linear import DenseLinear, Int4Linear, Int4NativeLinear, Int8RoundedLinear, Linear, make_linear
from minillm.checkpoint import Checkpoint, choose_scheme
from minillm.cli.main import main
from minillm.cli.score import encode_documents
from minillm.config import SCHEMES, ModelConfig
from minillm.eviction import Retention
from minillm.loader import load_model, random_model, read_config, save_checkpoint, save_quantised
from minillm.model import Transformer
from minillm.quant import Quantised, Scheme, blocks, pack_nibbles, quantise, unpack_nibbles

from .helpers import run, tiny_config, tiny_model
from .test_cpu_backend import SHAPES, cache_of, distance, fuse, heads, run_mixed, tokens_of
from .test_cpu_backend import random_model as biased_model
from .tiny_checkpoint import write_checkpoint

CPU, BF16, F32 = torch.device("cpu"), torch.bfloat16, torch.float32
WIDE = heads(4, 2, 32, qkv_bias=True, o_bias=True)
needs_native = pytest.mark.skipif(native.missing() is not None, reason=f"native.c does not run: {native.missing()}")
each_scheme = pytest.mark.parametrize("scheme", SCHEMES)


def random(*shape: int, scale: float = 1.0, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


# --- the numbers ------------------------------------------------------------------------------------------------------


def test_nibbles_there_and_back() -> None:
    numbers = torch.randint(16, (7, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    codes = pack_nibbles(numbers)
    assert codes.shape == (7, 32)
    assert codes.dtype == torch.uint8
    assert torch.equal(unpack_nibbles(codes), numbers)
    assert codes[0, 5] == numbers[0, 10] + 16 * numbers[0, 11], "the even one is the low nibble"
    every = torch.arange(256, dtype=torch.uint8)[None]
    assert torch.equal(pack_nibbles(unpack_nibbles(every)), every)


def test_examples_of_the_docstrings() -> None:
    assert pack_nibbles(torch.tensor([[0x0A, 0x0B]], dtype=torch.uint8)).tolist() == [[0xBA]]
    row = torch.zeros(1, 32)
    row[0, :2] = torch.tensor([-8.0, 7.0])
    found = quantise(row, 4)
    assert found.codes[0, :2].tolist() == [0xF0, 0x88]
    assert found.scales.tolist() == [[1.0]]
    assert torch.equal(found.dense(F32), row)
    assert quantise(torch.tensor([[0.5, -1.0]]), 8).codes.tolist() == [[64, -127]]


@pytest.mark.parametrize("scale", [1e-20, 1e-3, 1.0, 1e4])
def test_int8_is_off_by_half_a_step_at_most(scale: float) -> None:
    weight = random(30, 100, scale=scale)
    found = quantise(weight, 8)
    assert (found.bits, found.shape, found.nbytes) == (8, (30, 100), 30 * 100 + 30 * 4)
    assert found.codes.abs().amax(1).tolist() == [127] * 30, "the largest weight of a row uses the whole range"
    error = (found.dense(torch.float64) - weight.double()).abs()
    assert bool((error <= 0.5001 * found.scales.double()).all())


def test_int4_takes_the_scale_that_is_best_for_its_codes() -> None:
    """No worse than the plain scale, the largest weight / 8, in any group; no other scale is better."""
    weight = random(20, 320)
    found = quantise(weight, 4)
    assert (found.bits, found.shape, found.nbytes) == (4, (20, 320), 20 * 160 + 20 * 10 * 2)
    groups = weight.view(20, 10, 32)
    low, high = groups.aminmax(dim=2)
    plain = torch.where(-low >= high, low, high) / -8  # [20, 10]
    codes = unpack_nibbles(found.codes).view(20, 10, 32).float() - 8

    def error(scales: Tensor) -> Tensor:
        return (codes * scales.unsqueeze(2) - groups).square().sum(2)  # [20, 10]

    ours = error(found.scales.float())
    rounding = (found.scales.float() * 2**-8).square() * codes.square().sum(2)  # of the scale, to bfloat16
    assert bool((ours <= error(plain) * 1.0001 + rounding).all())
    assert float(ours.sum()) < 0.99 * float(error(plain).sum())
    assert float(ours.sum()) < float(error(found.scales.float() * 1.02).sum())
    assert float(ours.sum()) < float(error(found.scales.float() * 0.98).sum())
    assert torch.equal(codes.amin(2), torch.full((20, 10), -8.0)), "the largest weight, with its sign, is -8"
    step = plain.abs().unsqueeze(2)
    off = (codes * plain.unsqueeze(2) - groups).abs()
    assert bool((off <= step * 0.5001).logical_or(codes == 7).all()), "only what would be 8 is off by more"
    four, eight = (distance(made.dense(F32), weight) for made in (found, quantise(weight, 8)))
    print(f"relative error of normal weights: 4 bits {four:.3f}, 8 bits {eight:.4f}")
    assert four < 0.1
    assert eight < four / 8


@pytest.mark.parametrize("dtype", [F32, BF16, torch.float16])
def test_zeros_stay_zeros(dtype: torch.dtype) -> None:
    weight = random(6, 64).to(dtype)
    weight[0] = 0
    weight[1, :32] = 0
    for count in (8, 4):
        dense = quantise(weight, count).dense(dtype)  # type: ignore[arg-type]
        assert bool(dense.isfinite().all())
        assert not dense[0].any()
        assert not dense[1, :32].any()
        assert dense[1, 32:].any()


def test_a_row_is_quantised_alone() -> None:
    """In whatever block of rows it comes, and joined with others."""
    weight = random(50, 96)
    for count in (8, 4):
        whole = quantise(weight, count)  # type: ignore[arg-type]
        parts = [quantise(part, count) for part in weight.split([1, 20, 29])]  # type: ignore[arg-type]
        joined = Quantised.join(parts)
        assert torch.equal(joined.codes, whole.codes)
        assert torch.equal(joined.scales, whole.scales)
        assert joined.shape == (50, 96)
        shapes = quant.shapes(50, 96, count)  # type: ignore[arg-type]
        assert {name: (tuple(t.shape), t.dtype) for name, t in vars(joined).items()} == shapes
    assert Quantised.join(parts[:1]) is parts[0]


def test_blocks_cover_the_rows_once() -> None:
    assert list(blocks(10, 4, 12)) == [(0, 3), (3, 6), (6, 9), (9, 10)]
    assert list(blocks(2, 100, 12)) == [(0, 1), (1, 2)]
    assert list(blocks(3, 4)) == [(0, 3)]


def test_which_layer_has_how_many_bits() -> None:
    for name in ("int8", "int8-a16"):
        assert {Scheme(name).bits(module, 64) for module in ("lm_head", "a.q_proj")} == {8}
    assert Scheme("int4").bits("model.layers.0.mlp.up_proj", 64) == 4
    assert Scheme("int4").bits("lm_head", 64) == 8, "it decides between tokens"
    assert Scheme("int4").bits("model.layers.0.mlp.up_proj", 65) == 8, "it does not divide into groups"
    assert [Scheme(name).rounds_activations for name in SCHEMES] == [True, False, False]
    with pytest.raises(ConfigError, match="weights are 'int3'; choose one of auto, int8, int8-a16, int4"):
        Scheme("int3")


# --- the layers -------------------------------------------------------------------------------------------------------

WIDTHS = [(16, 32), (48, 96), (50, 64), (192, 160), (33, 100), (64, 32)]  # [N, K]
BITS_AND_WIDTHS = [(bits, *shape) for bits in (8, 4) for shape in WIDTHS if bits == 8 or shape[1] % 32 == 0]
COUNTS = [1, 2, 3, 8, 9, 40]  # rows of activations


def bias_of(rows: int, biased: bool, dtype: torch.dtype) -> Tensor | None:
    return random(rows, seed=5).to(dtype) if biased else None


def check(layer: Linear, dense: Tensor, bias: Tensor | None, dtype: torch.dtype, share: float = 0.0) -> None:
    """Beside x W^T + bias in float64: the rounding of the dtype, and `share` of the sum of |x W| for that of x."""
    rows, width = dense.shape
    assert (layer.out_features, layer.in_features) == (rows, width)
    right = dense.double()
    for count in COUNTS:
        x = random(count, width, seed=count).to(dtype)
        exact = x.double() @ right.T + (0 if bias is None else bias.double())
        found = layer(x)
        assert (found.shape, found.dtype) == ((count, rows), dtype)
        unit = {F32: 1e-6, BF16: 2**-8}[dtype]
        size = x.double().abs() @ right.abs().T
        allowed = 3 * unit * (exact.abs() + (0 if bias is None else bias.double().abs())) + (share + unit) * size
        assert bool(((found.double() - exact).abs() <= allowed).all()), count
        assert distance(found, exact) < 3 * unit + 3 * share
        assert torch.equal(layer(x.view(1, count, width)), found.view(1, count, rows))


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(("rows", "width"), WIDTHS)
def test_layers_of_numbers(rows: int, width: int, dtype: torch.dtype, biased: bool) -> None:
    weight, bias = random(rows, width, scale=0.1).to(dtype), bias_of(rows, biased, dtype)
    kinds = [linear.PlainLinear] + ([linear.OneDNNLinear] if linear.can_pack(dtype) else [])
    assert type(make_linear(weight, bias, dtype=dtype)) is kinds[-1]
    for kind in kinds:
        layer = kind(weight.clone(), bias)
        assert layer.nbytes == weight.nbytes
        check(layer, weight, bias, dtype)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(("count", "rows", "width"), BITS_AND_WIDTHS)
def test_dense_blocks(
    count: quant.Bits, rows: int, width: int, dtype: torch.dtype, biased: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(linear.DENSE_NUMBERS, "cpu", 20 * width)  # several blocks, the last one shorter
    weight, bias = quantise(random(rows, width, scale=0.1), count), bias_of(rows, biased, dtype)
    layer = DenseLinear(weight, bias)
    assert (layer.form is not None) == (
        count == 8 and width % 32 == 0 and native.missing() is None and (bias is None or dtype == BF16)
    )
    assert layer.nbytes == weight.nbytes
    check(layer, weight.dense(torch.float64), bias, dtype)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(("rows", "width"), [(64, 32), (192, 160)])
def test_4_bits_by_torchs_operator(rows: int, width: int, dtype: torch.dtype) -> None:
    weight = quantise(random(rows, width, scale=0.1), 4)
    for biased in (False, True):
        bias = bias_of(rows, biased, dtype)
        check(Int4Linear(weight, bias, dtype), weight.dense(torch.float64), bias, dtype)


@needs_native
@pytest.mark.parametrize("way", ["amx", "panels", "few at a time"])
@pytest.mark.parametrize(("rows", "width"), [(16, 32), (48, 96), (192, 160), (80, 64)])
def test_4_bits_by_native_c(rows: int, width: int, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By AMX where N is a multiple of 32; else a block of rows at a time in oneDNN's order; bit for bit as packed."""
    if way == "amx" and not native.has_amx():
        pytest.skip("this CPU, or its system, offers no AMX")
    monkeypatch.setattr(native, "has_amx", lambda: way == "amx")
    monkeypatch.setattr(linear, "PANEL_NUMBERS", 64 * width)
    if way == "few at a time":
        monkeypatch.setattr(linear, "packs_panels", lambda *_: False)
    weight = quantise(random(rows, width, scale=0.1), 4)
    for biased in (False, True):
        bias = bias_of(rows, biased, BF16)
        layer = Int4NativeLinear(weight, bias)
        assert layer.nbytes == weight.nbytes
        check(layer, weight.dense(torch.float64), bias, BF16)


@pytest.mark.skipif(not linear.has_int8(), reason="oneDNN's 8-bit products overflow on this CPU, or are not there")
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(("rows", "width"), WIDTHS)
def test_rounded_activations(rows: int, width: int, dtype: torch.dtype, biased: bool) -> None:
    """Exactly the products of whole numbers, so within half a step of each activation of what is exact."""
    weight, bias = quantise(random(rows, width, scale=0.1), 8), bias_of(rows, biased, dtype)
    layer = Int8RoundedLinear(weight, bias)
    assert layer.nbytes == weight.nbytes
    for count in COUNTS:
        x = random(count, width, seed=count).to(dtype)
        x[0, :8] *= 10
        codes, scales = linear.round_rows(x)
        whole = (codes.double() - linear.ZERO) @ weight.codes.double().T  # [M, N]
        product = whole * weight.scales.double().flatten() * scales.double()
        expected = product + (0 if bias is None else bias.double())
        found = layer(x)
        assert found.dtype == dtype
        unit = {F32: 1e-6, BF16: 2**-8}[dtype]
        size = product.abs() + (0 if bias is None else bias.double().abs())
        assert bool(((found.double() - expected).abs() <= 4 * unit * size + 1e-7).all())
        dense = weight.dense(torch.float64)
        exact = x.double() @ dense.T + (0 if bias is None else bias.double())
        off = 0.501 * scales.double() * dense.abs().sum(1)  # half a step of every activation
        assert bool(((found.double() - exact).abs() <= off + 4 * unit * size + 1e-7).all())


SLOW = """
import torch
from minillm.backends.linear import make_linear
from minillm.quant import quantise

weight = torch.randn(128, 192)
for dtype in (torch.bfloat16, torch.float32):
    for stored in (quantise(weight, 8), weight.to(dtype)):
        for count in (1, 40):
            make_linear(stored, None, dtype=dtype)(torch.randn(count, 192).to(dtype))
"""


@pytest.mark.skipif(not linear.has_int8(), reason="oneDNN's 8-bit products overflow on this CPU, or are not there")
def test_onednn_has_a_kernel_for_everything() -> None:
    """Where it has none, its reference multiplies a number at a time: on CPUs without AMX, all of int8 times int8."""
    command = [sys.executable, "-c", SLOW]
    told = subprocess.run(
        command, env={**os.environ, "ONEDNN_VERBOSE": "1"}, capture_output=True, text=True, check=True
    )
    done = [line for line in told.stdout.splitlines() if ",exec," in line and ",reorder," not in line]
    assert done, told.stdout
    assert not [line for line in done if "ref" in line.split(",")[6]], told.stdout


def _packed(weight: Tensor) -> Linear:
    return make_linear(weight.to(BF16), None, dtype=BF16)


def _rounded(weight: Tensor) -> Linear:
    return Int8RoundedLinear(quantise(weight, 8), None)


def _dense8(weight: Tensor) -> Linear:
    return DenseLinear(quantise(weight, 8), None)


def _native4(weight: Tensor) -> Linear:
    return Int4NativeLinear(quantise(weight, 4), None)


@pytest.mark.parametrize(
    ("make", "dtype", "counts"),
    [
        pytest.param(_packed, BF16, (1, 2, 3, 4, 5, 7, 8), id="bfloat16 of few", marks=needs_native),
        pytest.param(_rounded, BF16, (1, 2, 3, 4, 5, 7, 8), id="int8 of few"),
        pytest.param(_rounded, BF16, (9, 10, 12, 40), id="int8 of many"),
        pytest.param(_rounded, F32, (1, 2, 3, 8, 40), id="int8 in float32"),
        pytest.param(_dense8, BF16, (1, 2, 3, 5, 8), id="int8-a16", marks=needs_native),
        pytest.param(_native4, BF16, (1, 2, 3, 4), id="int4 of few", marks=needs_native),
        pytest.param(_native4, BF16, (9, 31, 33, 40), id="int4 of many", marks=needs_native),
    ],
)
def test_a_row_does_not_depend_on_its_neighbours(
    make: Callable[[Tensor], Linear], dtype: torch.dtype, counts: tuple[int, ...]
) -> None:
    """Bit for bit, whatever the others hold; few rows are multiplied in one way and many in another."""
    *fewer, most = counts
    layer, x = make(random(128, 160, scale=0.1)), random(most, 160).to(dtype)
    x[most // 2] *= 1000
    together = layer(x)
    for count in fewer:
        assert torch.equal(layer(x[:count]), together[:count])
        assert torch.equal(layer(x[-count:]), together[-count:])


def test_products_of_whole_numbers_do_not_overflow_float16() -> None:
    """512 times 127 is nearly all that float16 can hold: there the scale must not wait."""
    weight = quantise(random(8, 4096).abs() * 0.01, 8)
    x = random(3, 4096).abs().to(torch.float16) * 4
    found = DenseLinear(weight, None)(x)
    assert bool(found.isfinite().all())
    assert distance(found, x.double() @ weight.dense(torch.float64).T) < 1e-3


@pytest.mark.parametrize("has_native", [False, True])
def test_who_multiplies_what(has_native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if has_native and native.missing():
        pytest.skip(f"native.c does not run: {native.missing()}")
    if not has_native:
        monkeypatch.setattr(native, "missing", lambda: "not here")

    def kind(rows: int, count: quant.Bits, dtype: torch.dtype, rounds: bool = False) -> type[Linear]:
        return type(make_linear(quantise(random(rows, 64), count), None, dtype=dtype, rounds_activations=rounds))

    assert kind(16, 4, BF16) is (Int4NativeLinear if has_native else DenseLinear)
    assert kind(64, 4, BF16) is (Int4NativeLinear if has_native else Int4Linear)
    assert kind(64, 4, F32) is Int4Linear
    assert kind(50, 4, BF16) is kind(50, 4, F32) is DenseLinear
    assert kind(50, 8, BF16) is kind(50, 8, F32) is DenseLinear
    assert kind(50, 8, BF16, rounds=True) is (Int8RoundedLinear if linear.has_int8() else DenseLinear)
    monkeypatch.setattr(linear, "has_int8", lambda: False)
    assert kind(50, 8, BF16, rounds=True) is DenseLinear


# --- models -----------------------------------------------------------------------------------------------------------


def rounded_copy(model: Transformer, scheme: Scheme) -> Transformer:
    """A model of numbers, each of which is what the scheme makes of it."""
    copy = biased_model(model.config, torch.float64)
    copy.load_state_dict(model.state_dict())
    config = replace(model.config, tie_word_embeddings=False)
    found = biased_model(config, torch.float64)
    found.load_state_dict({"lm_head.weight": copy.model.embed_tokens.weight} | copy.state_dict())
    dtype = model.model.norm.weight.dtype
    for name, module in found.named_modules():
        if isinstance(module, nn.Linear):
            weight = quantise(module.weight.to(dtype), scheme.bits(name, module.in_features))
            module.weight.copy_(weight.dense(torch.float64))
    return found


@each_scheme
@pytest.mark.parametrize("shape", ["biases", "tied", "normed heads", "odd widths"])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_a_quantised_model_is_one_of_other_numbers(dtype: torch.dtype, shape: str, scheme: str) -> None:
    """On both backends, beside a model of the numbers that the codes stand for, in float64."""
    model, tokens, retention = biased_model(SHAPES[shape], dtype), tokens_of(36, rows=2), Retention.of(64)
    right = rounded_copy(model, Scheme(scheme))
    expected = run(right, cache_of(right, "full", retention, rows=2), tokens, 1000)
    for fused in (False, True):
        quantised = fuse(model, Scheme(scheme), backend="cpu" if fused else "reference")
        assert not any(isinstance(module, nn.Linear) for module in quantised.modules())
        found = run_mixed(quantised, cache_of(quantised, "full", retention, rows=2), tokens)
        rounds = fused and scheme == "int8" and linear.has_int8()
        limit = 0.05 if rounds else {F32: 1e-5, BF16: 0.03}[dtype]
        assert distance(found, expected) < limit, f"fused: {fused}"


@each_scheme
def test_float16_is_for_the_reference(scheme: str) -> None:
    """Slow on a CPU, and as near to float32 as float16 is."""
    model, tokens, logits = biased_model(WIDE, torch.float16), tokens_of(40), []
    for dtype in (torch.float16, F32):
        quantised = fuse(model.to(dtype), Scheme(scheme), backend="reference")
        logits.append(run(quantised, cache_of(quantised, "full", Retention.of(64)), tokens, 16))
    assert distance(*logits) < 0.01


def test_rounding_activations_is_what_int8_means_on_the_cpu() -> None:
    model, tokens, found = biased_model(heads(4, 2, 32), F32), tokens_of(50), {}
    for scheme in ("int8", "int8-a16"):
        fused = fuse(model, Scheme(scheme))
        found[scheme] = run(fused, cache_of(fused, "full", Retention.of(64)), tokens, 50)
    assert 1e-4 < distance(*found.values()) < 0.03 or not linear.has_int8()


# --- folders ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def source(tmp_path: Path) -> Path:
    save_checkpoint(tmp_path / "source", biased_model(WIDE, F32), WIDE)
    (tmp_path / "source" / "tokenizer_config.json").write_text("{}")
    return tmp_path / "source"


def quantised_folder(source: Path, scheme: str, name: str = "quantised") -> Path:
    save_quantised(source, read_config(source), source.with_name(name), Scheme(scheme))
    return source.with_name(name)


def logits_of(folder: Path, **options: Any) -> Tensor:
    model = Checkpoint.open(str(folder), device="cpu", offline=True, **options).load_model()
    return run_mixed(model, cache_of(model, "window", Retention.of(16)), tokens_of(28))


@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.parametrize("stored", [F32, BF16, torch.float16])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_quantised_while_loading_or_before_is_the_same_bit_for_bit(
    backend: str, stored: torch.dtype, scheme: str, tmp_path: Path
) -> None:
    """A checkpoint computed in its own dtype, or in a wider one."""
    save_checkpoint(tmp_path / "source", biased_model(WIDE, F32), WIDE, dtype=stored)
    folder, dtype = quantised_folder(tmp_path / "source", scheme), "bfloat16" if stored == BF16 else "float32"
    computed = {"dtype": dtype, "backend": backend}
    asked = logits_of(tmp_path / "source", weights=scheme, **computed)
    assert torch.equal(logits_of(folder, **computed), asked)
    assert torch.equal(logits_of(folder, weights=scheme, **computed), asked), "asked for what is there"
    assert not torch.equal(logits_of(tmp_path / "source", **computed), asked)


def test_the_folder_of_minillm_quantize(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = source.with_name("int4")
    (source / "pytorch_model.bin").write_bytes(b"pickle")
    assert main(["quantize", str(source), "-o", str(folder), "--weights", "int4", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["folder"] == str(folder)
    assert said["weights"] == "int4"
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer_config.json",
    ]
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization_config"] == {"quant_method": "minillm", "scheme": "int4"}
    stored, before = load_file(folder / "model.safetensors"), load_file(source / "model.safetensors")
    assert said["bytes"] == sum(tensor.nbytes for tensor in stored.values())
    assert said["bytes_before"] == sum(tensor.nbytes for tensor in before.values())
    for name, weight in before.items():
        module = name.removesuffix(".weight")
        if f"{module}.codes" not in stored:
            assert torch.equal(stored[name], weight), "embeddings, norms and biases stay as they are"
            continue
        made = quantise(weight, 8 if module == "lm_head" else 4)
        assert torch.equal(stored[f"{module}.codes"], made.codes)
        assert torch.equal(stored[f"{module}.scales"], made.scales)
    assert read_config(folder).stored_scheme == "int4"
    checkpoint = Checkpoint.open(str(folder), offline=True)
    assert checkpoint.scheme == Scheme("int4")
    assert main(["quantize", str(source), "-o", str(source.with_name("int8"))]) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "in int8, from" in captured.err


def test_layers_that_do_not_divide_into_groups_have_8_bits(tmp_path: Path) -> None:
    config = heads(4, 2, 32, hidden_size=36, intermediate_size=64)
    save_checkpoint(tmp_path / "source", biased_model(config, F32), config)
    folder = quantised_folder(tmp_path / "source", "int4")
    stored = load_file(folder / "model.safetensors")
    assert stored["model.layers.0.self_attn.q_proj.codes"].shape == (128, 36)
    assert stored["model.layers.0.self_attn.o_proj.codes"].shape == (36, 64)  # 128 weights a row
    assert stored["model.layers.0.mlp.down_proj.codes"].shape == (36, 32)
    for backend in ("cpu", "reference"):
        asked = logits_of(tmp_path / "source", weights="int4", backend=backend)
        assert torch.equal(logits_of(folder, backend=backend), asked)


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_a_tied_model_keeps_its_embedding_and_has_a_smaller_head(scheme: str, tmp_path: Path) -> None:
    config = replace(WIDE, tie_word_embeddings=True)
    model = biased_model(config, F32)
    save_checkpoint(tmp_path / "source", model, config)
    folder = quantised_folder(tmp_path / "source", scheme)
    assert not [name for name in load_file(folder / "model.safetensors") if name.startswith("lm_head")]
    loaded = Checkpoint.open(str(folder), backend="cpu", offline=True).load_model()
    assert torch.equal(loaded.model.embed_tokens.weight, model.model.embed_tokens.weight)
    assert isinstance(loaded.lm_head, Linear)
    assert loaded.lm_head.nbytes == quantise(model.model.embed_tokens.weight, 8).nbytes
    assert torch.equal(logits_of(folder), logits_of(tmp_path / "source", weights=scheme))


Tensors = dict[str, Tensor]
Q_PROJ = "model.layers.1.self_attn.q_proj"


def _without(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if key != name}


def _with(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {**tensors, name: change(tensors[name]).contiguous()}


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_without(f"{Q_PROJ}.codes"), rf"1 missing \({Q_PROJ}\.codes\)"),
        (_without(f"{Q_PROJ}.scales"), rf"1 missing \({Q_PROJ}\.scales\)"),
        (_without("model.norm.weight"), r"1 missing \(model\.norm\.weight\)"),
        (_with(f"{Q_PROJ}.scales", lambda x: x[:, :1]), r"scales is \[128, 1\] instead of \[128, 2\]"),
        (_with(f"{Q_PROJ}.codes", lambda x: x[:64]), r"codes is \[64, 32\] instead of \[128, 32\]"),
        (_with(f"{Q_PROJ}.codes", lambda x: x.to(torch.int8)), rf"unsupported dtype \({Q_PROJ}\.codes is I8\)"),
        (_with(f"{Q_PROJ}.scales", lambda x: x.to(F32)), rf"unsupported dtype \({Q_PROJ}\.scales is F32\)"),
        (lambda x: {**x, f"{Q_PROJ}.weight": torch.zeros(128, 64)}, rf"1 unexpected \({Q_PROJ}\.weight\)"),
        (lambda x: {**x, f"{Q_PROJ}.zeros": torch.zeros(128, 1)}, rf"1 unexpected \({Q_PROJ}\.zeros\)"),
    ],
)
def test_a_quantised_folder_is_read_strictly(damage: Callable[[Tensors], Tensors], said: str, source: Path) -> None:
    folder = quantised_folder(source, "int4")
    save_file(damage(load_file(folder / "model.safetensors")), folder / "model.safetensors")
    for fused in (False, True):
        with pytest.raises(CheckpointError, match=said):
            load_model(
                folder,
                read_config(folder),
                dtype=F32,
                device=CPU,
                scheme=Scheme("int4"),
                backend="cpu" if fused else "reference",
            )


def test_schemes_that_do_not_go_together(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = {scheme: quantised_folder(source, scheme, scheme) for scheme in ("int8", "int4")}
    for stored, asked in (("int8", "int4"), ("int4", "int8"), ("int4", "int8-a16")):
        with pytest.raises(ConfigError, match=f"--weights {asked} was asked for, but .* stored as {stored}"):
            Checkpoint.open(str(folders[stored]), weights=asked, offline=True)
    assert Checkpoint.open(str(folders["int8"]), weights="int8-a16", offline=True).scheme == Scheme("int8-a16")
    assert choose_scheme("auto", read_config(source), "cpu", CPU) is None
    with pytest.raises(ConfigError, match="weights are 'fp8'"):
        Checkpoint.open(str(source), weights="fp8", offline=True)
    words = ["generate", "Hi", "--model", str(folders["int8"]), "--weights", "int4", "--offline"]
    assert main(words) == 2
    assert "stored as int8" in capsys.readouterr().err
    target = source.with_name("again")
    assert main(["quantize", str(folders["int8"]), "-o", str(target)]) == 2
    assert "is quantised already; name the checkpoint that it was made from" in capsys.readouterr().err
    assert not target.exists()


def test_a_folder_that_is_not_empty_is_left_alone(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = source.with_name("target")
    target.mkdir()
    (target / "notes.txt").write_text("mine")
    for place in (target, target / "notes.txt", source):
        before = sorted(source.iterdir())
        assert main(["quantize", str(source), "-o", str(place)]) == 2
        assert "is not empty: name a new folder" in capsys.readouterr().err
        assert sorted(source.iterdir()) == before
    assert [path.name for path in target.iterdir()] == ["notes.txt"]
    (target / "notes.txt").unlink()
    assert main(["quantize", str(source), "-o", str(target)]) == 0, "an empty one will do"


@pytest.mark.parametrize("damage", [lambda data: data[:-100], lambda _: b""])
def test_a_damaged_source_leaves_nothing(
    damage: Callable[[bytes], bytes], source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, target = source / "model.safetensors", source.with_name("target")
    file.write_bytes(damage(file.read_bytes()))
    assert main(["quantize", str(source), "-o", str(target)]) == 2
    assert str(file) in capsys.readouterr().err
    assert not target.exists()


def test_what_stops_halfway_is_no_checkpoint(source: Path) -> None:
    """Whatever happens while tensors are written: no config.json, so nothing that could be loaded."""
    target = source.with_name("target")

    def stop(done: int, total: int) -> None:
        assert 0 < done <= total
        if done == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_quantised(source, read_config(source), target, Scheme("int4"), progress=stop)
    assert not target.exists()
    part = source.with_name("target.part")
    assert not (part / "config.json").exists()
    assert not (part / "model.safetensors").exists()
    with pytest.raises(ModelNotFoundError, match=r"has no config\.json"):
        Checkpoint.open(str(part), offline=True)
    save_quantised(source, read_config(source), target, Scheme("int4"))
    assert Checkpoint.open(str(target), offline=True).scheme == Scheme("int4")
    assert not part.exists()


def test_int8_says_where_nobody_rounds_activations(source: Path) -> None:
    opened = {
        backend: Checkpoint.open(str(source), weights="int8", backend=backend, offline=True)
        for backend in ("cpu", "reference")
    }
    assert opened["cpu"].scheme == Scheme("int8" if linear.has_int8() else "int8-a16")
    assert opened["reference"].scheme == Scheme("int8-a16")
    layers = [module for module in opened["reference"].load_model().modules() if isinstance(module, DenseLinear)]
    assert layers
    assert not any(layer.form for layer in layers), "the reference is torch alone"


# --- bytes and sessions -----------------------------------------------------------------------------------------------


def bytes_held(model: Transformer) -> int:
    """Of all that linear layers keep, biases and parameters."""
    layers = [module for module in model.modules() if isinstance(module, Linear)]
    biases = sum(layer.bias.nbytes for layer in layers if layer.bias is not None)
    parameters = sum(parameter.nbytes for parameter in model.parameters())
    return sum(layer.nbytes for layer in layers) + biases + parameters


@pytest.mark.parametrize(
    ("scheme", "dtype", "backend"),
    [
        *((scheme, dtype, "cpu") for scheme in ("auto", "int8", "int8-a16") for dtype in ("float32", "bfloat16")),
        ("int4", "float32", "cpu"),
        pytest.param("int4", "bfloat16", "cpu", marks=[needs_native]),
        *((scheme, dtype, "reference") for scheme in ("auto", "int8", "int4") for dtype in ("float32", "bfloat16")),
    ],
)
@pytest.mark.parametrize("tied", [False, True])
def test_planned_bytes_are_those_held(tied: bool, scheme: str, dtype: str, backend: str, tmp_path: Path) -> None:
    """From a folder of numbers and, where the scheme can be stored, from a quantised one."""
    config: ModelConfig = replace(heads(4, 2, 32, vocab_size=128, qkv_bias=True, o_bias=True), tie_word_embeddings=tied)
    save_checkpoint(tmp_path / "source", biased_model(config, F32), config)
    folders = [tmp_path / "source"]
    if scheme in ("int8", "int4"):
        folders.append(quantised_folder(folders[0], scheme))
    for folder in folders:
        options = {"weights": scheme, "dtype": dtype, "backend": backend}
        checkpoint = Checkpoint.open(str(folder), device="cpu", offline=True, **options)
        assert checkpoint.weight_bytes() == bytes_held(checkpoint.load_model())
    if scheme != "auto":
        dense = Checkpoint.open(str(folders[0]), dtype=dtype, backend=backend, device="cpu", offline=True)
        assert tied or checkpoint.weight_bytes() < dense.weight_bytes()


@each_scheme
def test_random_models_for_benchmarks(scheme: str) -> None:
    model = random_model(heads(4, 2, 32), dtype=BF16, scheme=scheme)
    logits = run(model, cache_of(model, "window", Retention.of(32)), tokens_of(40), 16)
    assert bool(logits.isfinite().all())
    assert torch.equal(run(model, cache_of(model, "window", Retention.of(32)), tokens_of(40), 16), logits)


def test_a_session_goes_on_with_the_same_weights_only(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model")

    def load(weights: str) -> LLM:
        checkpoint = Checkpoint.open(str(folder), weights=weights, device="cpu", dtype="bfloat16", offline=True)
        return LLM(checkpoint, checkpoint.load_model(), checkpoint.plan(budget=32))

    session = load("int8-a16").session(temperature=0.0)
    session.append("the dog sat on the mat")
    session.save(tmp_path / "file")
    others = {"auto": "as they are", "int4": "int4"} | ({"int8": "int8"} if linear.has_int8() else {})
    for weights, said in others.items():
        with pytest.raises(SessionError, match=rf"weights int8-a16 \(here {said}\)"):
            load(weights).session(temperature=0.0).load(tmp_path / "file")
    again = load("int8-a16").session(temperature=0.0)
    again.load(tmp_path / "file")
    expected = session.generate(max_tokens=5).finish().token_ids
    assert again.generate(max_tokens=5).finish().token_ids == expected


# --- what it costs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_nats_per_token_of_a_trained_model(backend: str, dtype: str, shared_data: Path) -> None:
    """stories260K, 1,024 tokens: 8 bits cost next to nothing, 4 bits a little, even of a model so small."""
    text = (shared_data / "text" / "tinystories.txt").read_text("utf-8")[:20_000]
    nats = {}
    for weights in ("auto", *SCHEMES):
        checkpoint = Checkpoint.open(
            str(shared_data / "models" / "stories260K"), dtype=dtype, weights=weights, backend=backend, device="cpu"
        )
        tokens = encode_documents(checkpoint.tokenizer, [text], "<|endoftext|>")
        llm = LLM(checkpoint, checkpoint.load_model(), checkpoint.plan(context=256))
        nats[weights] = llm.score(tokens, rows=4, context=256).nats_per_token
    print(f"{backend} {dtype}:", ", ".join(f"{name} {value:.4f}" for name, value in nats.items()))
    assert abs(nats["int8"] - nats["auto"]) < 0.01
    assert abs(nats["int8-a16"] - nats["auto"]) < 0.01
    assert 0.0 < nats["int4"] - nats["auto"] < 0.12


def test_the_demo_in_4_bits_still_tells_a_story() -> None:
    found = {}
    for weights in ("auto", "int8", "int4"):
        checkpoint = Checkpoint.open(weights=weights, device="cpu", offline=True)
        llm = LLM(checkpoint, checkpoint.load_model(), checkpoint.plan(context=256))
        story = "Once upon a time there was a little girl who lived in a small house with her mother and her dog. "
        tokens = llm.encode(story * 6, raw=True)
        found[weights] = llm.score(tokens).nats_per_token, checkpoint.weight_bytes()
    print(", ".join(f"{name} {nats:.4f} nats in {size:,} bytes" for name, (nats, size) in found.items()))
    assert abs(found["int8"][0] - found["auto"][0]) < 0.03
    assert abs(found["int4"][0] - found["auto"][0]) < 0.25
    assert found["int4"][1] < found["int8"][1] < found["auto"][1]


@each_scheme
def test_generate_takes_a_scheme(scheme: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--max-tokens", "12", "--temperature", "0", "--threads", "1", "--device", "cpu", "--offline", "--json"]
    assert main(["generate", "Once upon a time", "--weights", scheme, *words]) == 0
    captured = capsys.readouterr()
    assert len(json.loads(captured.out)["token_ids"]) == 12
    done = "int8-a16" if scheme == "int8" and not linear.has_int8() else scheme
    assert f" in {done} and " in captured.err


def test_tiny_models_without_any_width_of_32_can_be_asked_for_4_bits() -> None:
    """Heads of 8, rows of 36 and 44: what does not divide has 8 bits, and so everything has."""
    config = tiny_config(hidden_size=36, intermediate_size=44, head_dim=10)
    model = tiny_model(config, BF16)
    four, eight = (fuse(model, Scheme(scheme)) for scheme in ("int4", "int8-a16"))
    results = [run(m, cache_of(m, "window", Retention.of(32)), tokens_of(40), 16) for m in (four, eight)]
    assert torch.equal(*results)
