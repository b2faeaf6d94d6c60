"""native.c: every function beside the torch expression that it stands for, what it is built of, and life without it."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from minillm import quant
from minillm.backends import cpu, linear, native
from minillm.cache import KVCache
from minillm.cli.main import main
from minillm.config import SCHEMES
from minillm.eviction import Retention
from minillm.model import rope
from minillm.policies import make_policy
from minillm.quant import GROUP, Quantised, Scheme

from .conftest import ROOT
from .helpers import run
from .test_cpu_backend import SHAPES, cache_of, distance, fuse, random_model, run_mixed, tokens_of
from .test_cpu_backend import heads as shape_of

sys.path.insert(0, str(ROOT / "tools"))
from build_native import SOURCE, build

needs_native = pytest.mark.skipif(native.missing() is not None, reason=f"native.c does not run: {native.missing()}")
BF16 = torch.bfloat16


@pytest.fixture(params=["avx512", "amx"])
def with_amx(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Both ways that a CPU with AMX can go."""
    if request.param == "amx" and not native.has_amx():
        pytest.skip("this CPU, or its system, offers no AMX")
    monkeypatch.setattr(native, "has_amx", lambda: request.param == "amx")
    return bool(request.param == "amx")


def random(*shape: int, scale: float = 1.0, seed: int = 0) -> Tensor:
    """Normal numbers in bfloat16."""
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(BF16)


def close(found: Tensor, exact: Tensor, *, steps: float = 1, atol: float = 1e-6) -> None:
    """Within `steps` times what rounding to bfloat16 costs."""
    assert found.dtype == BF16
    torch.testing.assert_close(found.double(), exact.double(), rtol=steps * 2**-8, atol=atol)


def bits(x: Tensor) -> Tensor:
    return x.view(torch.int16)


# --- weights ----------------------------------------------------------------------------------------------------------


def awkward_weights(rows: int, width: int) -> Tensor:
    """Rows and groups of zeros, of one sign, with equal extremes, tiny, huge, and with ties between two codes."""
    weight = random(rows, width, scale=0.05)
    weight[1] = 0
    weight[2, :GROUP] = 0
    weight[3] = weight[3].abs()
    weight[4] = -weight[4].abs()
    weight[5, :2] = torch.tensor([3.0, -3.0])
    weight[6] *= 1e-20
    weight[7] *= 1e20
    weight[8] = (torch.arange(width) % 17 - 8) / 2  # halves of whole steps
    weight[9, 1:] = 0
    return weight


@needs_native
@pytest.mark.parametrize("width", [32, 96, 1056])
def test_quantise_is_that_of_quant_py(width: int) -> None:
    weight = awkward_weights(40, width)
    for count in (8, 4):
        ours, theirs = native.quantise(weight, count), quant.quantise(weight, count)  # type: ignore[arg-type]
        assert torch.equal(ours.codes, theirs.codes)
        assert ours.scales.dtype == theirs.scales.dtype
        if count == 8:
            assert torch.equal(ours.scales, theirs.scales)
        else:  # sums in another order: the last bit may differ
            assert int((bits(ours.scales).int() - bits(theirs.scales).int()).abs().max()) <= 1


@needs_native
@pytest.mark.parametrize(("rows", "width"), [(16, 32), (64, 64), (160, 224)])
def test_int4_panels_bit_for_bit(rows: int, width: int) -> None:
    weight = quant.quantise(awkward_weights(rows, width), 4)
    codes, scales = native.pack_int4(weight)
    assert codes.shape == (rows // 16, width // 8, 16, 4)
    assert scales.shape == (rows // 16, width // 32, 16)
    expected = weight.dense(BF16)
    for start, stop in ((0, rows), (rows - 16, rows), (0, 16)):
        panels = -(-(stop - start) // 64)
        out = torch.full((panels, width // 2, 64, 2), 7.0, dtype=BF16)
        native.int4_panels(codes, scales, start, stop, out.data_ptr())
        found = out.transpose(1, 2).reshape(panels * 64, width)
        assert torch.equal(bits(found[: stop - start] + 0.0), bits(expected[start:stop] + 0.0))  # zeros have no sign
        assert bool((found[stop - start :] == 7).all()), "nothing else is written"


@needs_native
@pytest.mark.parametrize("width", [32, 64, 352])
@pytest.mark.parametrize("rows", [16, 48, 80])
def test_int4_linear(rows: int, width: int) -> None:
    weight = quant.quantise(random(rows, width, scale=0.1), 4)
    (codes, scales), dense = native.pack_int4(weight), weight.dense(torch.float64)
    form = native.form("nibbles", (rows, width), codes.data_ptr(), scales)
    assert form is not None
    for count in range(1, native.MOST_ROWS + 1):
        x = random(count, width, seed=count)
        close(native.linear(form, x), x.double() @ dense.T, atol=1e-5)


@needs_native
@pytest.mark.parametrize("width", [32, 352])
@pytest.mark.parametrize("count", [1, 9, 31, 32, 33, 70])
def test_int4_many(count: int, width: int) -> None:
    if not native.has_amx():
        pytest.skip("this CPU, or its system, offers no AMX")
    weight, x = quant.quantise(random(96, width, scale=0.1), 4), random(count, width, seed=1)
    close(native.int4_many(x, *native.pack_int4(weight)), x.double() @ weight.dense(BF16).double().T, atol=1e-5)


@needs_native
@pytest.mark.parametrize("width", [32, 96, 1056])
def test_int8_linear(width: int) -> None:
    weight = quant.quantise(random(37, width, scale=0.1), 8)
    form = native.form("whole", (37, width), weight.codes.data_ptr(), weight.scales)
    assert form is not None
    for count in range(1, native.MOST_ROWS + 1):
        x = random(count, width, seed=count)
        close(native.linear(form, x), x.double() @ weight.dense(torch.float64).T, atol=1e-5)


# --- attention --------------------------------------------------------------------------------------------------------


class Slots:
    """Two rows of slots in random order, some empty, and queries at the end of one and in the middle of the other."""

    def __init__(self, heads: int, kv_heads: int, dim: int, slots: int, *, scale: float = 1.0, seed: int = 0) -> None:
        dice = torch.Generator().manual_seed(seed)
        self.q, self.far = (random(2, 1, heads, dim, scale=scale, seed=seed + i).transpose(1, 2) for i in (1, 2))
        self.keys, self.values = (random(2, kv_heads, slots, dim, scale=s, seed=seed + 3) for s in (scale, 1.0))
        order = torch.stack([torch.randperm(slots, generator=dice) for _ in range(2 * kv_heads)])
        self.positions = order.view(2, kv_heads, slots).to(torch.int32)
        self.positions[torch.rand(self.positions.shape, generator=dice) < 0.2] = -1
        self.now = torch.tensor([[slots - 1], [slots // 2]])

    def with_sinks(self, sinks: int) -> Slots:
        """The first tokens in the first slots, where they stay."""
        self.positions[self.positions < sinks] = -1
        self.positions[:, :, :sinks] = torch.arange(sinks, dtype=torch.int32)
        return self

    def native(self, *, reach: int, window: int = 1 << 31, sinks: int = 0, far: bool = False) -> Tensor:
        asked = self.far if far else None
        slots = self.keys, self.values, self.positions
        return native.attend(self.q, asked, *slots, self.now, reach=reach, window=window, sinks=sinks)

    def plain(self, *, reach: int, window: int = 1 << 31, sinks: int = 0, far: bool = False) -> Tensor:
        """The same in float64; zeros where nothing is seen."""
        at = self.positions[:, :, None, :reach].long()  # [B, Hkv, 1, S]
        now = self.now[:, None, None]  # [B, 1, 1, 1]
        seen = (at >= 0) & (at <= now) & ((at > now - window) | (at < sinks))
        q, q_far = (x.double().squeeze(2).unflatten(1, (self.keys.shape[1], -1)) for x in (self.q, self.far))
        keys, values = self.keys[:, :, :reach].double(), self.values[:, :, :reach].double()
        scores, of_far = (x @ keys.transpose(2, 3) * self.keys.shape[3] ** -0.5 for x in (q, q_far))  # [B, Hkv, G, S]
        if far:
            scores[..., :sinks] = of_far[..., :sinks]
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num()  # [B, Hkv, G, S]
        return (weights @ values).flatten(1, 2).unsqueeze(2)


@needs_native
@pytest.mark.parametrize("dim", [32, 64, 96, 128, 256])
@pytest.mark.parametrize("group", range(1, 13))
def test_attend_in_every_group_and_head(group: int, dim: int, with_amx: bool) -> None:
    slots = Slots(2 * group, 2, dim, 300)
    for reach, options in ((300, {}), (41, {"window": 30}), (280, {"window": 100, "sinks": 3, "far": True})):
        given = slots.with_sinks(3) if options.get("far") else slots
        expected = given.plain(reach=reach, **options)  # type: ignore[arg-type]
        found = given.native(reach=reach, **options)  # type: ignore[arg-type]
        assert found.shape == (2, 2 * group, 1, dim)
        close(found, expected, atol=6e-3 if with_amx else 1e-3)


@needs_native
@pytest.mark.parametrize("reach", [1, 2, 15, 16, 17, 31, 33, 255, 256, 257, 500, 512, 700])
def test_attend_over_any_number_of_slots(reach: int, with_amx: bool) -> None:
    """Also where the last slots are the last of the allocation: whatever lies behind is not ours."""
    slots = Slots(8, 2, 64, 700).with_sinks(1)
    slots.now[:] = 700
    close(slots.native(reach=reach), slots.plain(reach=reach), atol=6e-3 if with_amx else 1e-3)
    short = Slots(8, 2, 64, reach).with_sinks(1)
    close(short.native(reach=reach), short.plain(reach=reach), atol=6e-3 if with_amx else 1e-3)


@needs_native
@pytest.mark.parametrize("far", [False, True])
@pytest.mark.parametrize("sinks", [0, 1, 4, 16, 17, 256, 300])
@pytest.mark.parametrize("window", [1, 16, 100, 1 << 31])
def test_attend_with_windows_and_sinks(window: int, sinks: int, far: bool, with_amx: bool) -> None:
    """A sink is seen from any distance, and asked with a query of its own where there is one."""
    slots = Slots(6, 2, 64, 600, seed=window % 7).with_sinks(sinks)
    slots.now[1] = 450
    options = {"reach": 590, "window": window, "sinks": sinks, "far": far}
    expected = slots.plain(**options)  # type: ignore[arg-type]
    close(slots.native(**options), expected, atol=6e-3 if with_amx else 1e-3)  # type: ignore[arg-type]


@needs_native
def test_what_is_out_of_sight_does_not_matter(with_amx: bool) -> None:
    """Whatever numbers a slot holds that is empty, outside the window, or of a later token."""
    slots = Slots(8, 2, 128, 400)
    slots.now[:] = 350
    clean = slots.native(reach=400, window=200)
    hidden = (slots.positions < 151) | (slots.positions > 350)
    slots.keys[hidden], slots.values[hidden] = 1e30, -3e38
    assert torch.equal(slots.native(reach=400, window=200), clean)
    assert bool(clean.isfinite().all())
    assert with_amx == native.has_amx()


@needs_native
def test_a_query_that_sees_nothing_gives_zeros(with_amx: bool) -> None:
    slots = Slots(12, 2, 64, 300)
    slots.positions[0] = -1
    slots.positions[1, 0] = 299  # later than now
    slots.now[:] = 100
    found = slots.native(reach=300)
    assert torch.equal(found[0], torch.zeros_like(found[0]))
    assert torch.equal(found[1, :6], torch.zeros_like(found[1, :6]))
    assert bool(found[1, 6:].any())
    close(found, slots.plain(reach=300), atol=6e-3 if with_amx else 1e-3)


@needs_native
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_extreme_scores(sign: float, with_amx: bool) -> None:
    """Scores of +-10,000: the softmax is all on one token, and nothing overflows."""
    slots = Slots(8, 2, 64, 520)
    slots.q[:] = 1.0
    slots.keys[:] = -sign * 1000.0
    slots.keys[:, :, 300] = sign * 1250.0
    slots.positions[:, :, 300] = 0
    found, expected = slots.native(reach=520), slots.plain(reach=520)
    assert bool(found.isfinite().all())
    if sign > 0:
        assert torch.equal(found, slots.values[:, :, 300].repeat_interleave(4, 1).unsqueeze(2))
    close(found, expected, atol=6e-3 if with_amx else 1e-3)


# --- weights that oneDNN packed ---------------------------------------------------------------------------------------


@needs_native
@pytest.mark.parametrize("width", [32, 64, 96, 160])
@pytest.mark.parametrize("rows", [64, 128, 320])
def test_panels_are_recognised(rows: int, width: int) -> None:
    """And only they: another weight, another order and rows that do not fill a panel are not."""
    numbers = random(rows, width)
    codes = native.quantise(numbers, 8).codes
    for weight, pack in (
        (numbers, lambda x: torch.ops.mkldnn._reorder_linear_weight(x, 32)),
        (codes, lambda x: torch.ops.onednn.qlinear_prepack(x, None)),
    ):
        packed, other = pack(weight), weight.clone()
        if native.panels(packed, weight) is None:
            pytest.skip("oneDNN packs in another order here")
        other[-1, -1] += 1
        assert native.panels(packed, other) is None
        assert native.panels(weight.to_mkldnn() if weight is numbers else pack(weight[:64]), other) is None
        assert native.panels(pack(weight[:48]), weight[:48]) is None


@needs_native
def test_few_rows_do_not_take_onednns_way() -> None:
    """What a CPU spends most of its time on; the numbers are compared in test_quant.py."""
    numbers = random(128, 64)
    layers = linear.OneDNNLinear(numbers, None), linear.Int8RoundedLinear(native.quantise(numbers, 8), None)
    for layer in layers:
        if layer.form is None:
            pytest.skip("oneDNN packs in another order here")
        with torch.profiler.profile() as seen:
            layer(random(8, 64))
        assert not [event.name for event in seen.events() if "linear" in event.name]
        with torch.profiler.profile() as seen:
            layer(random(9, 64))
        assert [event.name for event in seen.events() if "linear" in event.name]


# --- around the linear layers -----------------------------------------------------------------------------------------

ROWS = [1, 3, 8, 9, 17]


@needs_native
@pytest.mark.parametrize("size", [16, 48, 1040])
@pytest.mark.parametrize("rows", ROWS)
def test_rms_norm(rows: int, size: int) -> None:
    x, weight, delta = random(1, rows, size), random(size, seed=1), random(1, rows, size, seed=2)
    x[0, -1] = 0
    for added in (None, delta):
        given, eps = x.clone(), 1e-5
        found = native.rms_norm(given, weight, eps, added)
        grown = x if added is None else x + added  # rounded to bfloat16, as the stream is
        assert torch.equal(given, grown)
        exact = F.rms_norm(grown.double(), (size,), weight.double(), eps)
        close(found, exact, atol=1e-4)
        if added is None:
            assert torch.equal(found[0, -1], torch.zeros(size, dtype=BF16))


@needs_native
def test_cpu_py_takes_the_same_norm_either_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place and all, with and without native.c; a width that does not suit it goes to torch."""
    for size in (64, 60):
        x, weight, delta = random(2, 5, size), random(size, seed=1), random(2, 5, size, seed=2)
        mine, theirs = x.clone(), x.clone()
        found = cpu.rms_norm(mine, weight, 1e-6, delta)
        with monkeypatch.context() as patch:
            patch.setattr(native, "missing", lambda: "not here")
            expected = cpu.rms_norm(theirs, weight, 1e-6, delta)
        assert torch.equal(mine, theirs)
        close(found, expected, steps=2)


@needs_native
@pytest.mark.parametrize("rows", ROWS)
def test_gated(rows: int) -> None:
    x = random(1, rows, 2 * 48, scale=3)
    x[0, 0, :12] = torch.tensor([0.0, -0.0, 1e30, -1e30, 88.0, -88.0, 104.0, -104.0, 1e-30, -1e-30, 700.0, -700.0])
    x[0, 0, 48:60] = 2.0
    found = native.gated(x)
    gate, up = x.double().chunk(2, -1)
    assert found.shape == (1, rows, 48)
    assert bool(found.isfinite().all())
    close(found, F.silu(gate) * up, atol=1e-30)


@needs_native
@pytest.mark.parametrize("dim", [32, 64, 96, 128])
@pytest.mark.parametrize("tokens", [1, 8, 9, 20])
def test_rotate(tokens: int, dim: int) -> None:
    """Heads that are a part of a wider row, two rows at positions of their own."""
    wide = random(2, tokens, 7, dim)
    at = torch.stack((torch.arange(tokens), torch.arange(tokens) + 5000))  # [2, T]
    cos, sin = (x.to(BF16) for x in rope(at, 10000.0 ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)))
    for x in (wide, wide[:, :, :5]):
        found = native.rotate(x, cos, sin)
        y = x.transpose(1, 2).double()
        exact = y * cos.double() + y.roll(dim // 2, -1) * sin.double()
        assert found.shape == (2, x.shape[2], tokens, dim)
        close(found, exact, atol=1e-6)
        assert bool((found.norm(dim=3) / x.transpose(1, 2).norm(dim=3) - 1).abs().max() < 0.02), "a rotation"


@needs_native
@pytest.mark.parametrize("rows", ROWS)
def test_round_rows(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x = random(rows, 160) * torch.logspace(-20, 20, rows).to(BF16)[:, None]
    x[-1] = 0
    codes, scales = native.round_rows(x)
    assert (codes.dtype, scales.dtype, scales.shape) == (torch.uint8, torch.float32, (rows, 1))
    codes = codes.int() - 128
    error = (codes.double() * scales.double() - x.double()).abs()
    assert bool((error <= 0.5001 * scales.double()).all())
    assert codes.abs().amax(1)[:-1].tolist() == [127] * (rows - 1)
    assert not codes[-1].any()
    monkeypatch.setattr(native, "missing", lambda: "not here")
    theirs, their_scales = linear.round_rows(x)
    assert torch.equal(their_scales, scales)
    theirs = theirs.int() - 128
    assert int((theirs - codes).abs().max()) <= 1, "a tie may be broken in either way"
    assert float((theirs != codes).float().mean()) < 0.02


# --- a whole step -----------------------------------------------------------------------------------------------------


def stepped(
    *, rows: int, heads: int, kv_heads: int, dim: int, slots: int, now: tuple[int, ...], sinks: int
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """By `native.step`, and by `rotate`, `write_` and `attend`: both results [B, H * D], and what both caches hold."""
    config = shape_of(heads, kv_heads, dim, max_position_embeddings=200)
    caches = []
    for _ in range(2):
        cache = KVCache(
            config, make_policy("window"), Retention(slots, sinks, 5, 4), rows=rows, dtype=BF16, position_mode="window"
        )
        layer = cache.layers[0]
        for name, seed in (("keys", 1), ("values", 2)):
            layer.tensors()[name].copy_(random(*layer.keys.shape, seed=seed))
        layer.free.copy_(torch.tensor([7, 11, 2 + sinks, 20]))
        for row, at in enumerate(now):
            layer.positions[row].copy_(torch.arange(slots).where(torch.arange(slots) < at, torch.tensor(-1)))
        cache.seen = list(now)
        caches.append(cache)
    qkv = random(rows, (heads + 2 * kv_heads) * dim, seed=3)
    near, far = ((random(rows, 1, 1, dim, seed=seed), random(rows, 1, 1, dim, seed=seed + 1)) for seed in (4, 6))
    spans = [cache.append(1) for cache in caches]
    mine, theirs = (cache.layers[0] for cache in caches)
    reach = min(max(now) + 1, slots)
    one = native.step(qkv, near, far, mine, spans[0].positions, heads=heads, reach=reach)
    joined = qkv.view(rows, 1, -1, dim)
    turned = native.rotate(joined[:, :, : heads + kv_heads], *near)
    q_far = native.rotate(joined[:, :, :heads], *far)
    theirs.write_(turned[:, heads:], joined[:, :, heads + kv_heads :].transpose(1, 2), spans[1], 0, 1)
    window = theirs.window
    assert window is not None
    two = native.attend(
        turned[:, :heads],
        q_far,
        theirs.keys,
        theirs.values,
        theirs.positions,
        spans[1].positions,
        reach=reach,
        window=window,
        sinks=sinks,
    )
    tensors = [layer.tensors()[name] for layer in (mine, theirs) for name in ("keys", "values", "positions")]
    return one, two.flatten(1), tensors


@needs_native
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 2, 32), (12, 2, 64), (8, 8, 128), (3, 1, 96)])
@pytest.mark.parametrize("now", [(5, 0), (310, 40), (299, 300), (303, 301)])
def test_a_step_is_rotate_write_and_attend(heads: int, kv_heads: int, dim: int, now: tuple[int, int]) -> None:
    one, two, tensors = stepped(rows=2, heads=heads, kv_heads=kv_heads, dim=dim, slots=300, now=now, sinks=2)
    assert torch.equal(one, two)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(tensors[:3], tensors[3:], strict=True))


def whole(scheme: Scheme | None, shape: str, *, rows: int, by_parts: bool) -> list[Tensor]:
    """A decode step of rows at different positions of 48 slots: hidden states, and all that the cache holds."""
    model = fuse(random_model(SHAPES[shape], BF16), scheme)
    held = KVCache(model.config, make_policy("window"), Retention(48, 2, 5, 4), rows=rows, dtype=BF16)
    model(tokens_of(40, rows), held.append(40), held)
    held.seen = [40 + row for row in range(rows)]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(cpu, "layer_", (lambda *_: False) if by_parts else _must)
        found = model(tokens_of(1, rows), held.append(1), held)
    return [found] + [tensor for layer in held.layers for tensor in layer.tensors().values()]


_LAYER = cpu.layer_


def _must(*arguments: Any) -> bool:
    assert _LAYER(*arguments), "it can be done in one call"
    return True


@needs_native
@pytest.mark.parametrize("rows", [1, 2, 5, 8])
@pytest.mark.parametrize("shape", ["8 over 2 of 64"])
@pytest.mark.parametrize("scheme", [None, *SCHEMES])
def test_a_layer_in_one_call_is_its_parts_bit_for_bit(scheme: str | None, shape: str, rows: int) -> None:
    given = Scheme(scheme) if scheme else None
    if scheme == "int4" and native.has_amx() and rows > native.MOST_ROWS // 2:
        pytest.skip("by AMX, and so in parts")
    together, apart = (whole(given, shape, rows=rows, by_parts=by_parts) for by_parts in (False, True))
    for mine, theirs in zip(together, apart, strict=True):
        assert torch.equal(mine, theirs)


# --- threads ----------------------------------------------------------------------------------------------------------


def _attend() -> Tensor:
    return Slots(12, 2, 64, 700).with_sinks(3).native(reach=690, window=400, sinks=3, far=True)


def _norm() -> Tensor:
    x = random(1, 33, 64)
    return torch.stack((native.rms_norm(x, random(64, seed=1), 1e-5, random(1, 33, 64, seed=2)), x))


def _rotate() -> Tensor:
    return native.rotate(random(1, 33, 3, 64), random(1, 1, 33, 64, seed=1), random(1, 1, 33, 64, seed=2)).contiguous()


def _quantised(count: quant.Bits, rows: int = 96) -> Quantised:
    return native.quantise(awkward_weights(rows, 96), count)


def _int4_panels() -> Tensor:
    out = torch.zeros(2 * 64, 96, dtype=BF16)
    native.int4_panels(*native.pack_int4(_quantised(4)), 0, 96, out.data_ptr())
    return out


def _int4_many() -> Tensor:
    return native.int4_many(random(40, 96), *native.pack_int4(_quantised(4))) if native.has_amx() else torch.zeros(1)


@cache
def _linears(rows: int, width: int) -> list[linear.Linear]:
    """One of every form, with biases.  Made once: how oneDNN packs so few rows depends on the threads, too."""
    numbers, bias = random(rows, width, scale=0.1), random(rows, seed=1)
    made: list[linear.Linear] = [linear.OneDNNLinear(numbers, bias)]
    made += [kind(quant.quantise(numbers, 8), bias) for kind in (linear.Int8RoundedLinear, linear.DenseLinear)]
    return [*made, linear.Int4NativeLinear(quant.quantise(numbers, 4), bias)]


def _whole_step() -> list[Tensor]:
    return whole(Scheme("int4"), "8 over 2 of 64", rows=2, by_parts=False)


def _step() -> Tensor:
    return stepped(rows=2, heads=12, kv_heads=2, dim=64, slots=300, now=(310, 40), sinks=3)[0]


THREADED: dict[str, Callable[[], Tensor]] = {
    "attend": _attend,
    "step": _step,
    "rms_norm": _norm,
    "gated": lambda: native.gated(random(33, 64)),
    "rotate": _rotate,
    "round": lambda: native.round_rows(random(33, 64))[0],
    "quantise8": lambda: _quantised(8).codes,
    "quantise4": lambda: torch.cat((_quantised(4).codes, _quantised(4).scales.view(torch.uint8)), 1),
    "linear": lambda: torch.cat([layer(random(5, 64)) for layer in _linears(128, 64)]),
    "layer": lambda: _whole_step()[0],
    "int4_pack": lambda: native.pack_int4(_quantised(4))[0],
    "int4_panels": _int4_panels,
    "int4_many": _int4_many,
}


@needs_native
@pytest.mark.parametrize("name", THREADED)
def test_the_number_of_threads_changes_no_bit(name: str, with_amx: bool) -> None:
    assert with_amx == native.has_amx()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)  # conftest.py puts it back
        results.append(THREADED[name]().view(torch.uint8))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_every_function_is_tried_with_threads() -> None:
    assert set(THREADED) == set(native._ARGUMENTS)


# --- the library: built, absent, damaged ------------------------------------------------------------------------------


@contextmanager
def library(file: Path) -> Iterator[None]:
    """In here the library is that file, or there is none."""
    caches, before = (native._library, native.has_amx, native._function), native.FILE
    try:
        native.FILE = file
        for function in caches:
            function.cache_clear()
        yield
    finally:
        native.FILE = before
        for function in caches:
            function.cache_clear()


def _fields(text: str, name: str) -> list[tuple[str, str]]:
    """Of a structure of native.c: what they are called, and as what ctypes should know them."""
    body = re.sub(r"//.*", "", re.findall(r"typedef struct {([^}]*)} (\w+);", text)[_names(text).index(name)][0])
    kinds = {"int64_t": "c_long", "float": "c_float", "Linear": "Linear"}
    found = []
    for line in filter(None, map(str.strip, body.split(";"))):
        first, *more = line.removeprefix("const ").split(",")
        kind, first = first.split(maxsplit=1)
        found += [(part.strip(" *"), "c_void_p" if "*" in part else kinds[kind]) for part in (first, *more)]
    return found


def _names(text: str) -> list[str]:
    return [name for _, name in re.findall(r"typedef struct {([^}]*)} (\w+);", text)]


def test_the_arguments_are_those_of_the_source() -> None:
    """ctypes takes our word for them: pointers, int64 and float in the order of native.c."""
    kinds = {"int64_t": "i", "float": "f"}
    found = {
        name: "".join("p" if "*" in argument else kinds[argument.split()[-2]] for argument in arguments.split(","))
        for name, arguments in re.findall(r"\nKERNEL void minillm_(\w+)\(([^)]*)\)", SOURCE.read_text("utf-8"))
    }
    assert found == native._ARGUMENTS
    text = SOURCE.read_text("utf-8")
    for structure in (native.Slots, native.Linear, native.Layer):
        fields = [(name, kind.__name__) for name, kind in structure._fields_]
        assert fields == _fields(text, structure.__name__)
    assert re.search(rf"^enum {{ {', '.join(native.FORMS).upper()} }};", text, re.MULTILINE)
    for name, value in {
        "TILE": native.TILE,
        "PANEL": native.PANEL,
        "GROUP": GROUP,
        "BLOCK": native.SLOTS_AT_ONCE,
    }.items():
        assert re.search(rf"^#define {name} +{value}\b", text, re.MULTILINE), name


def test_it_is_built_and_runs(tmp_path: Path) -> None:
    problem = build(tmp_path / "_native.so")
    if problem is not None:
        assert native.missing() is not None or "compiler" in problem, problem
        pytest.skip(problem)
    assert [path.name for path in tmp_path.iterdir()] == ["_native.so"], "nothing is left lying about"
    x, here = random(1, 3, 64), native.missing()
    expected = None if here else native.gated(x)
    with library(tmp_path / "_native.so"):
        assert native.missing() in (None, "this CPU lacks AVX512-BF16 or AVX512-VNNI")
        if expected is not None:
            assert torch.equal(native.gated(x), expected)


@pytest.mark.parametrize("compiler", ["false", "/nonexistent"])
def test_a_compiler_that_does_not_work_is_a_reason_and_no_error(
    compiler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", compiler)
    problem = build(tmp_path / "_native.so")
    assert problem
    assert "\n" not in problem
    assert list(tmp_path.iterdir()) == []


def test_no_compiler_and_other_systems_are_reasons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "platform", "linux")
    for machine, said in (("x86_64", "no C compiler was found"), ("riscv64", "not linux on riscv64")):
        monkeypatch.setattr("platform.machine", lambda machine=machine: machine)
        assert said in (build(tmp_path / "_native.so") or "")
    assert list(tmp_path.iterdir()) == []


def test_without_the_library_the_same_is_computed_and_info_says_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, tokens, retention = random_model(SHAPES["8 over 2 of 64"], BF16), tokens_of(80), Retention.of(32)
    differences = {}
    for scheme in (None, Scheme("int8"), Scheme("int8-a16"), Scheme("int4")):
        fused = fuse(model, scheme)
        expected = run_mixed(fused, cache_of(fused, "window", retention), tokens)
        with library(tmp_path / "_native.so"):
            plain = fuse(model, scheme)
            assert "Int4NativeLinear" not in {type(module).__name__ for module in plain.modules()}
            found = run_mixed(plain, cache_of(plain, "window", retention), tokens)
        differences[scheme.name if scheme else "bfloat16"] = distance(found, expected)
    assert max(differences.values()) < 0.05, differences  # int8: an activation may be rounded the other way
    with library(tmp_path / "_native.so"):
        assert main(["info", "--json"]) == 0
        facts = json.loads(capsys.readouterr().out)["backends"]
        assert facts["native.c"].startswith("does not run: it was not built")
        assert facts["linear int4"] == "torch's int4 operator"
        assert all("native.c" not in text for name, text in facts.items() if name != "native.c")
        assert main(["info"]) == 0
        assert "does not run: it was not built: no C compiler was there" in capsys.readouterr().out
    if native.missing() is None:
        assert main(["info", "--json"]) == 0
        facts = json.loads(capsys.readouterr().out)["backends"]
        assert facts["dtype auto"].startswith("float32") or facts["native.c"] == "runs here"
    print("without native.c:", ", ".join(f"{name} {change:.2%}" for name, change in differences.items()))


def test_a_damaged_library_is_as_good_as_none(tmp_path: Path) -> None:
    (tmp_path / "_native.so").write_bytes(b"\x7fELF and then nothing")
    with library(tmp_path / "_native.so"):
        assert re.fullmatch(r"it cannot be loaded \(.*\); install minillm again", native.missing() or "")
        assert not native.has_amx()
        fused = fuse(random_model(SHAPES["8 over 2 of 64"], BF16))
        assert bool(run(fused, cache_of(fused, "window", Retention.of(32)), tokens_of(40), 16).isfinite().all())
