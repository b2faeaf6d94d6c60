"""The Triton kernels beside the reference: compiled where there is a GPU, else interpreted (conftest.py)."""

from __future__ import annotations

import json
from collections import defaultdict
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from minillm import LLM
from minillm.ahead import generate_ahead
from minillm.backends import reference
from minillm.backends.graph import Eager, Steps, recorder_for, refusal
from minillm.budget import CachePlan
from minillm.cache import CacheRows, KVCache, PositionMode
from minillm.cli.main import main
from minillm.config import ModelConfig
from minillm.engine import Engine
from minillm.eviction import Retention
from minillm.generate import generate
from minillm.model import Transformer, rotate
from minillm.planner import CUT_MANY, kernel_bytes, recording_bytes
from minillm.policies import make_policy
from minillm.sampling import Sampler, SamplingParams
from minillm.slots import PINNED, LayerCache, Span

from .helpers import kept_positions, make_cache, run, tiny_config, tiny_model
from .test_cpu_backend import fuse
from .test_engine import VOCAB, alone, cache_for, job
from .test_engine import run as run_jobs
from .test_memory_plan import Living
from .tiny_checkpoint import write_checkpoint

pytest.importorskip("triton", reason="triton is not installed; there are wheels for Linux on x86-64")
from minillm.backends import kernels, kernels_attend, kernels_between, triton

INTERPRETED = triton.missing(torch.device("cpu")) is None
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
CLOSE = 2e-6 if INTERPRETED else 2e-5
TRAINED = 18


def layer_of(
    policy: str,
    retention: Retention,
    *,
    heads: tuple[int, int, int] = (4, 2, 16),
    rows: int = 1,
    dtype: torch.dtype = torch.float32,
    int8: bool = False,
    window: int | None = None,
    from_afar: bool = False,
    **options: int | bool | None,
) -> LayerCache:
    """One layer's slots.  heads: H, Hkv, D.  from_afar: the trained length is a window, sinks stay visible."""
    config = tiny_config(
        num_hidden_layers=1,
        num_attention_heads=heads[0],
        num_key_value_heads=heads[1],
        head_dim=heads[2],
        sliding_windows=(window,),
        max_position_embeddings=TRAINED,
    )
    mode = "window" if from_afar else "absolute"
    rule = make_policy(policy, **options)
    return KVCache(
        config, rule, retention, rows=rows, dtype=dtype, int8=int8, position_mode=mode, device=DEVICE
    ).layers[0]


def drawn(
    layer: LayerCache, heads: int, tokens: int, seed: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """q [B, H, T, D], k and v [B, Hkv, T, D], alike in part, as real keys are."""
    rows, kv_heads, _, dim = layer.keys.shape
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(rows, heads, tokens, dim, generator=generator)
    k, v = torch.randn(2, rows, kv_heads, tokens, dim, generator=generator)
    return q.to(DEVICE, dtype), (k + 0.5).to(DEVICE, dtype), v.to(DEVICE, dtype)


def span_of(first: list[int], flags: Tensor | None = None, length: int = 1) -> Span:
    host = torch.tensor(first)[:, None] + torch.arange(length)  # [B, T]
    return Span(host.to(DEVICE), host, tuple(first), length, None if flags is None else flags.to(DEVICE))


def same(layer: LayerCache, other: LayerCache) -> None:
    """Every tensor, bit for bit; the sum of directions but for the order of sums.

    torch on a GPU divides by a number as it multiplies by its inverse: scales may differ there, and so what they scale.
    Kernels divide by their own approximation there, so a novelty may be the next bfloat16.
    """
    for name, tensor in layer.tensors().items():
        scaled = layer.scales is not None and name in ("keys", "values", "scales")
        if name == "total" or ((scaled or name == "novelty") and not INTERPRETED):
            steps = 1 if tensor.dtype == torch.int8 else 1e-6
            torch.testing.assert_close(
                other.tensors()[name], tensor, rtol=2**-7 if name == "novelty" else 1e-6, atol=steps
            )
        else:
            assert torch.equal(other.tensors()[name], tensor), name


def compare(
    first: list[int], steps: int, policy: str = "hashevict", *,
    retention: Retention = Retention.of(16, sinks=2, recent=4, evict_every=3),  # noqa: B008
    heads: tuple[int, int, int] = (4, 2, 16), pins: tuple[int, ...] = (), dtype: torch.dtype = torch.float32,
    tolerance: float = CLOSE, **options: object,
) -> None:  # fmt: skip
    """The same tokens through the reference and the kernels, one a row and step, after so many that lie there."""
    layers = [layer_of(policy, retention, heads=heads, rows=len(first), dtype=dtype, **options) for _ in range(2)]  # type: ignore[arg-type]
    _, k, v = drawn(layers[0], heads[0], max(first), 99, dtype)
    for layer in layers:
        fill_(layer, k, v, first, pins)
    for step in range(steps):
        q, k, v = drawn(layers[0], heads[0], 1, 1000 + step, dtype)  # not the seed of a projection
        now = [start + step for start in first]
        q_far = None
        if layers[0].far and max(now) >= TRAINED:  # as the model does: rows that are not there yet are asked as ever
            q_far = torch.where(torch.tensor(now, device=DEVICE).view(-1, 1, 1, 1) >= TRAINED, q.roll(1, 3), q)
        flags = torch.tensor([[PINNED if at in pins else 0] for at in now], dtype=torch.uint8) if pins else None
        expected = reference.attend_(layers[0], q, k, v, span_of(now, flags), q_far)
        found = triton.attend_(layers[1], q, k, v, span_of(now, flags), q_far)
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    same(*layers)


def compare_block(
    first: list[int], lengths: list[int], policy: str = "hashevict", *,
    retention: Retention = Retention.of(16, sinks=2, recent=4, evict_every=3),  # noqa: B008
    heads: tuple[int, int, int] = (4, 2, 16), pins: tuple[int, ...] = (), padding: int = 0, **options: object,
) -> None:  # fmt: skip
    """The same, several tokens of each row at a time: what a query sees between two evictions, and what stays."""
    layers = [layer_of(policy, retention, heads=heads, rows=len(first), **options) for _ in range(2)]  # type: ignore[arg-type]
    _, k, v = drawn(layers[0], heads[0], max(first), 99)
    for layer in layers:
        fill_(layer, k, v, first, pins)
    for step, length in enumerate(lengths):
        wide = length + padding
        q, k, v = drawn(layers[0], heads[0], wide, 1000 + step)
        now = [start + sum(lengths[:step]) for start in first]
        host = torch.tensor(now)[:, None] + torch.arange(wide)  # [B, T]
        host[:, length:] = -1
        flags = torch.isin(host, torch.tensor(pins, dtype=torch.int64)).to(torch.uint8) if pins else None
        q_far = None
        if layers[0].far and max(now) + length > TRAINED:
            q_far = torch.where((host >= TRAINED)[:, None, :, None].to(DEVICE), q.roll(1, 3), q)
        on_device = None if flags is None else flags.to(DEVICE)
        span = Span(host.to(DEVICE), host, tuple(now), length, on_device)
        expected = reference.attend_(layers[0], q, k, v, span, q_far)
        found = triton.attend_(layers[1], q, k, v, span, q_far)
        torch.testing.assert_close(found, expected, rtol=CLOSE, atol=CLOSE)
    same(*layers)


def fill_(layer: LayerCache, k: Tensor, v: Tensor, first: list[int], pins: tuple[int, ...] = ()) -> None:
    """Tokens 0, 1, ..., so many in every row, in the slots of their positions: k, v [B, Hkv, n, D]."""
    for row, count in enumerate(first):
        one = layer.row(row, frozenset(layer.state) - frozenset(layer.slot_state))
        one.flagged = layer.flagged = bool(pins)
        flags = torch.tensor([[PINNED if at in pins else 0 for at in range(count)]], dtype=torch.uint8)
        mine = slice(row, row + 1)
        one.write_(k[mine, :, :count], v[mine, :, :count], span_of([0], flags, count), 0, count)


EVERY_RULE = ["window", "hashevict", "hashevict-key", "hashevict-plus"]


@pytest.mark.parametrize("policy", EVERY_RULE)
def test_rows_in_different_phases(policy: str) -> None:
    """Some not full, one past its first eviction, one due when the others are not."""
    compare([15, 3, 16], 6, policy)


def test_nothing_is_evicted_without_a_policy_for_it() -> None:
    compare([0, 6], 3, "full")


@pytest.mark.parametrize(
    "heads", [(1, 1, 32), (6, 2, 80), (8, 1, 64), (10, 2, 128), (3, 3, 256), (16, 1, 32), (4, 2, 8)], ids=str
)
def test_groups_and_widths(heads: tuple[int, int, int]) -> None:
    compare([15], 5, "hashevict-plus", heads=heads)
    compare([16], 2, "hashevict", heads=heads)


@pytest.mark.parametrize("policy", ["hashevict", "hashevict-key"])
@pytest.mark.parametrize("bits", [16, 24, 40, 64, 96, 128])
def test_bits(policy: str, bits: int) -> None:
    compare([16], 4, policy, hash_bits=bits, per_head=bits == 40, orthogonal=bits == 64)


@pytest.mark.parametrize("policy", ["hashevict", "hashevict-plus"])
def test_eight_bits(policy: str) -> None:
    compare([15, 7], 5, policy, int8=True)


@pytest.mark.parametrize("policy", ["window", "hashevict", "hashevict-plus"])
def test_a_sliding_window(policy: str) -> None:
    """What lies outside of it goes first."""
    compare([15, 5], 6, policy, window=9)


@pytest.mark.parametrize("pins", [(), (1, 6, 7)], ids=["", "pinned"])
@pytest.mark.parametrize("int8", [False, True], ids=["", "int8"])
def test_sinks_and_pins_asked_from_afar(pins: tuple[int, ...], int8: bool) -> None:
    """Past the trained length, while another row is not there yet."""
    compare([16, 14], 6, "hashevict", from_afar=True, pins=pins, int8=int8)


def test_pins_without_a_window() -> None:
    compare([15, 4], 6, "hashevict-plus", pins=(3, 5, 10, 17))


@pytest.mark.parametrize("policy", EVERY_RULE)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bits(policy: str, dtype: torch.dtype) -> None:
    """The interpreter cuts bfloat16 off where a GPU rounds, hence the tolerance.  The victims are the same."""
    compare([16], 4, policy, heads=(4, 2, 64), dtype=dtype, tolerance=0.03)


def test_sixteen_bits_over_eight() -> None:
    compare([16], 4, heads=(4, 2, 64), dtype=torch.bfloat16, tolerance=0.05, int8=True)


def test_many_slots_that_fill_no_block() -> None:
    """Several cuts, the last one not whole; one row full, one nearly empty, one with less than a cut."""
    retention = Retention.of(triton.CUT * 2 + 37, sinks=4, recent=16, evict_every=5)
    layers = [layer_of("hashevict-plus", retention, rows=3) for _ in range(2)]
    _, k, v = drawn(layers[0], 4, retention.slots, seed=1)
    for layer in layers:
        fill_(layer, k, v, [retention.slots, 2, 200])
    for step in range(2):
        q, k, v = drawn(layers[0], 4, 1, seed=2 + step)
        now = [retention.slots + step, 2 + step, 200 + step]
        expected = reference.attend_(layers[0], q, k, v, span_of(now))
        torch.testing.assert_close(triton.attend_(layers[1], q, k, v, span_of(now)), expected, rtol=CLOSE, atol=CLOSE)
    same(*layers)


# --- blocks of tokens -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", EVERY_RULE)
def test_a_block_in_which_rows_evict_at_different_times(policy: str) -> None:
    """A full row, one that fills on the way, one that does not; tokens come and go within the block; padding."""
    compare_block([16, 11, 0], [9, 5], policy, heads=(2, 1, 16), padding=3)


@pytest.mark.parametrize("every", [1, 2, 5])
@pytest.mark.parametrize("policy", ["window", "hashevict-plus"])
def test_a_block_by_how_often_it_evicts(policy: str, every: int) -> None:
    """With evict_every = 1 and few recent tokens most of a block leaves again before it ends."""
    compare_block([7], [16], policy, retention=Retention.of(8, sinks=1, recent=2, evict_every=every), heads=(2, 1, 16))


@pytest.mark.parametrize("length", [1, 2, 16, 33])
def test_a_block_from_an_empty_row(length: int) -> None:
    compare_block([0], [length, 3], "hashevict-key")


@pytest.mark.parametrize("policy", ["hashevict", "hashevict-plus"])
def test_a_block_in_eight_bits(policy: str) -> None:
    """What is carried out keeps its scales."""
    compare_block([15], [9], policy, int8=True)


@pytest.mark.parametrize("policy", EVERY_RULE)
def test_a_block_under_a_sliding_window(policy: str) -> None:
    compare_block([15, 5], [12], policy, window=9)


@pytest.mark.parametrize("pins", [(), (1, 6, 7, 20)], ids=["", "pinned"])
def test_a_block_asked_from_afar(pins: tuple[int, ...]) -> None:
    """It begins before the trained length, and ends behind it."""
    compare_block([14], [4, 9], "hashevict-plus", from_afar=True, pins=pins, int8=True)


@pytest.mark.parametrize("bits", [24, 128])
def test_a_block_by_bits(bits: int) -> None:
    compare_block([16], [7], "hashevict", hash_bits=bits, heads=(6, 2, 24))


@pytest.mark.parametrize("policy", ["keydiff", "random"])
def test_a_block_whose_victims_eviction_py_chooses(policy: str) -> None:
    compare_block([14], [9], policy, padding=2)


@pytest.mark.parametrize(("policy", "slots"), [("hashevict-plus", 120), ("window", 1100)])
def test_more_at_once_than_a_kernel_takes(policy: str, slots: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over 32 go at once, over 64 queries attend, and more slots are searched than are compared at a time."""
    monkeypatch.setattr(triton, "RUNS", 16)  # 64, as so many may go; of 16 slots
    retention = Retention.of(slots, sinks=4, recent=30, evict_every=40)
    compare_block([slots - 10], [75], policy, retention=retention, heads=(2, 1, 16))


def test_more_slots_than_victims_can_be_chosen_from() -> None:
    """eviction.py does it then, and no step can be recorded."""
    layer = layer_of("window", Retention.of(triton.MOST_SLOTS + 1), heads=(1, 1, 16))
    assert triton.rule_of(layer) is None
    assert not triton.serves_step(layer, torch.float32)


# --- what stands between products -------------------------------------------------------------------------------------


BETWEEN = pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 0.02)], ids=str)


@BETWEEN
@pytest.mark.parametrize("grows", [False, True], ids=["", "grows"])
def test_norms(dtype: torch.dtype, tolerance: float, grows: bool) -> None:
    """Of a width that is no power of two; x itself grows."""
    x, delta = torch.randn(2, 3, 72, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    weight = (torch.arange(72, device=DEVICE) / 72 + 0.5).to(dtype)
    expected = x + delta if grows else x.clone()
    found = triton.rms_norm(x, weight, 1e-5, delta if grows else None)
    close = {"rtol": tolerance, "atol": tolerance}
    torch.testing.assert_close(x, expected, **close)
    torch.testing.assert_close(found, torch.nn.functional.rms_norm(expected, (72,), weight, 1e-5), **close)


@BETWEEN
def test_gates(dtype: torch.dtype, tolerance: float) -> None:
    """More numbers than a program passes on; large ones, both ways."""
    x = torch.randn(2, 2 * 1100, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    x[0, 0], x[0, 1] = 100, -100
    gate, up = x.chunk(2, -1)
    expected = torch.nn.functional.silu(gate) * up
    torch.testing.assert_close(triton.gated(x), expected, rtol=tolerance, atol=tolerance)


@BETWEEN
@pytest.mark.parametrize("dim", [16, 24])
def test_rotations(dtype: torch.dtype, tolerance: float, dim: int) -> None:
    """Of the first heads of what a product gave, more than a program turns, and where they have to lie afterwards."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 3, 14, dim, generator=generator).to(DEVICE, dtype)
    cos, sin = torch.randn(2, 2, 1, 3, dim, generator=generator).to(DEVICE, dtype)
    found = triton.rotate(x[:, :, :11], cos, sin)  # [2, 11, 3, D]
    expected = rotate(x[:, :, :11].transpose(1, 2), (cos, sin))
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=5 * tolerance)


# --- a whole model ----------------------------------------------------------------------------------------------------


def model_of(config: ModelConfig | None = None) -> Transformer:
    return tiny_model(config).to(DEVICE)


def cache_of(model: Transformer, policy: str, slots: int = 64, **options: Any) -> KVCache:
    made = make_cache(model, policy, slots, **options)
    return KVCache(
        model.config,
        made.policy,
        made.retentions,
        rows=made.rows,
        device=DEVICE,
        position_mode="absolute" if made.trained is None else "window",
    )


def on_triton(model: Transformer) -> Transformer:
    """The same weights, computed by kernels wherever there is no product."""
    return fuse(model, backend="triton")


@pytest.mark.parametrize("policy", [*EVERY_RULE, "keydiff", "h2o"])
def test_a_prompt_in_chunks(policy: str) -> None:
    """Two rows; stretches go through torch's kernel, lone tokens through ours; no kernel, or none at all: as ever."""
    tokens = torch.randint(97, (2, 30), generator=torch.Generator().manual_seed(1))
    config, found, kept = tiny_config(num_hidden_layers=1), [], []
    for model, chunk in ((model_of(config), 30), (on_triton(model_of(config)), 19)):
        cache = cache_of(model, policy, slots=16, rows=2, evict_every=4)
        found.append(torch.cat([run(model, cache, tokens[:, :28], chunk), run(model, cache, tokens[:, 28:], 1)], 1))
        kept.append(kept_positions(cache))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-5)
    assert kept[0] == kept[1]


def test_a_prompt_past_the_trained_length() -> None:
    tokens = torch.randint(97, (1, 40), generator=torch.Generator().manual_seed(1))
    config, found = tiny_config(max_position_embeddings=24), []
    for model in (model_of(config), on_triton(model_of(config))):
        cache = cache_of(model, "hashevict", slots=16, evict_every=3, position_mode="window")
        found.append(torch.cat([run(model, cache, tokens[:, :38], 13), run(model, cache, tokens[:, 38:], 1)], 1))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-5)


@torch.inference_mode()
def test_rows_of_an_engine_with_some_idle() -> None:
    """Rows 2 and 0 of three take a step, in a batch of four: the two that fill up see nothing and write nothing."""
    found, kept = [], []
    for model in (model_of(), on_triton(model_of())):
        cache = cache_of(model, "hashevict", slots=16, rows=3, evict_every=2)
        views = [cache.row(row) for row in (2, 0)]
        for view, count in zip(views, (17, 5), strict=True):
            run(model, view, torch.arange(count)[None] + 7, 16)
        together = CacheRows(cache, [2, 0], views, batch=4)
        for step in range(3):
            tokens = torch.tensor([[3 + step], [9], [0], [0]], device=DEVICE)
            hidden = model(tokens, together.append(), together)  # [4, 1, hidden]
        found.append(model.logits(hidden[:2]))
        kept.append(kept_positions(cache))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-5)
    assert kept[0] == kept[1]


def test_the_embedded_model() -> None:
    """By name, through the front door."""
    told = [
        LLM.load(backend=backend, dtype="float32", device=DEVICE.type, budget=24).generate("Once", max_tokens=3).text
        for backend in ("reference", "triton")
    ]
    assert told[0] == told[1]


# --- recorded steps ---------------------------------------------------------------------------------------------------


def steps_of(model: Transformer, cache: KVCache, **options: int) -> Steps:
    return Steps(model, cache, recorder_for(DEVICE, cache.rows), **options)


def read_prompt(model: Transformer, view: KVCache, length: int) -> int:
    return int(run(model, view, torch.arange(length)[None] + 7, 16)[0, -1].argmax())


def told_alone(cache: KVCache, row: int, length: int, count: int) -> list[int]:
    """A prompt of so many tokens and the answer to it, one token after the other by the reference."""
    model, view = model_of(cache.config), cache.row(row)
    answer = [read_prompt(model, view, length)]
    while len(answer) < count:
        answer.append(int(run(model, view, torch.tensor([answer[-1:]]), 1)[0, -1].argmax()))
    return answer


@pytest.mark.parametrize("mode", ["absolute", "window"])
def test_rows_that_come_and_go(mode: PositionMode) -> None:
    """Three rows in batches of 1, 2 and 3: what each would have said alone, and the same cache."""
    config = tiny_config(num_hidden_layers=1, max_position_embeddings=20)
    model, options = on_triton(model_of(config)), {"slots": 16, "rows": 3, "evict_every": 2, "position_mode": mode}
    cache, alone = (cache_of(model, "hashevict-plus", **options) for _ in range(2))  # type: ignore[arg-type]
    steps, views = steps_of(model, cache), [cache.row(row) for row in range(3)]
    assert list(steps._replays) == [1, 2, 3]
    addresses = [tensor.data_ptr() for tensor in steps.buffers]
    answers: dict[int, list[int]] = {}
    lengths = {2: 15, 0: 18, 1: 3}
    for drawing in ([2], [2], [2, 0], [2, 0], [0, 1], [0, 1], [1, 0]):
        for row in drawing:
            answers[row] = answers.get(row) or [read_prompt(model, views[row], lengths[row])]
        positions = [views[row].feed_ahead()[0] for row in drawing]
        drawn = [torch.tensor([float(answers[row][-1])], device=DEVICE) for row in drawing]
        for row, logits in zip(drawing, steps.feed(drawing, positions, drawn), strict=True):
            views[row].keep()
            answers[row].append(int(logits.argmax()))
    for row, length in lengths.items():
        count = len(answers[row])
        assert answers[row] == told_alone(alone, row, length, count)
    assert kept_positions(cache) == kept_positions(alone)
    assert addresses == [tensor.data_ptr() for tensor in steps.buffers]


class Pair:
    """The same sequence by generate.py and by recorded steps, the kernels in both; 17 tokens are read already."""

    def __init__(self, policy: str) -> None:
        config = tiny_config(num_hidden_layers=1, max_position_embeddings=20)
        self.model = on_triton(model_of(config))
        options: dict[str, Any] = {"slots": 16, "evict_every": 3, "position_mode": "window"}
        self.begun, *self.caches = (cache_of(self.model, policy, **options) for _ in range(3))
        read_prompt(model_of(config), self.begun, 17)
        self.steps = steps_of(self.model, self.caches[1])

    def tell(self, count: int, *, again: bool = True, **rules: Any) -> list[int]:
        """The same answer from both, of which `count` tokens are looked at; then the caches are the same, too."""
        told, rules = [], {"seed": 1, "temperature": 0.9, "ignore_eos": True, **rules}
        for cache in self.caches:
            if again:
                cache.copy_(self.begun)
            arguments: Any = (
                self.model,
                cache,
                torch.tensor([9]),
                Sampler(SamplingParams(**rules), 97, 97, (2,), DEVICE),
            )
            ahead = cache is self.caches[1]
            samples = (
                generate_ahead(self.steps, *arguments, max_tokens=99) if ahead else generate(*arguments, max_tokens=99)
            )
            told.append([sample for sample, _ in zip(samples, range(count), strict=False)])
            cache.take_back_()
        assert told[0] == told[1]
        ours, theirs = self.caches
        assert ours.seen == theirs.seen
        for layer, other in zip(ours.layers, theirs.layers, strict=True):
            live = layer.positions >= 0
            for name in ("positions", "free", *layer.state):
                assert torch.equal(layer.tensors()[name], other.tensors()[name]), name
            for name in ("keys", "values", "flags"):
                assert torch.equal(layer.tensors()[name][live], other.tensors()[name][live]), name
        return [sample.token_id for sample in told[0]]


@pytest.mark.parametrize("policy", ["hashevict", "hashevict-plus"])  # one with codes, one with a sum
def test_an_answer_may_end_at_any_token(policy: str) -> None:
    """By a stop token, or because nobody listens, in every phase of evict_every; and the sequence goes on."""
    pair = Pair(policy)
    ids = pair.tell(5)  # at positions 18 to 22: the second one pushes others out
    for last in (1, 2, 3):
        stop = (ids[last],) if (last + (policy == "hashevict")) % 2 else ()  # test_ahead.py has every combination
        told = pair.tell(99 if stop else last, stop_token_ids=stop)
        assert told == ids[: ids.index(ids[last]) + 1 if stop else last]
        pair.tell(1, again=False)


def test_an_engine_replays_what_it_draws() -> None:
    """Rows that come and go, beside a row that is not its own; greedy and drawn by lot: as generate.py gives them."""
    model = on_triton(model_of(tiny_config(vocab_size=VOCAB)))
    cache = cache_for(model, "hashevict-plus", 3, slots=16, device=DEVICE)
    engine = Engine(model, cache, chunk=16, rows=2, steps=Steps(model, cache, Eager(), rows=2, fewest=2))
    jobs = [job(n, length, DEVICE, max_tokens=6 - n, start_at=2 * n) for n, length in enumerate((14, 2, 3))]
    run_jobs(engine, [jobs[0], job(9, 3, DEVICE, leave_after=2), *jobs[1:]])
    for one in jobs:
        assert one.ids == alone(model, "hashevict-plus", one, 16, slots=16, device=DEVICE)


@pytest.mark.parametrize("policy", ["hashevict-plus", "h2o"])
def test_a_session_is_told_saved_and_copied_as_ever(policy: str, tmp_path: Path) -> None:
    """By the front door: text, usage, and the very bytes of a saved session; a copy has recordings of its own."""
    options: dict[str, Any] = {"backend": "triton", "dtype": "float32", "device": DEVICE.type, "policy": policy}
    llm = LLM.load(str(write_checkpoint(tmp_path / "tiny")), budget=12, evict_every=3, **options)
    assert llm.memory is not None
    planned = llm.memory.parts.get("workspace recording", 0)
    assert (llm.steps is not None, planned > 0) == ((policy == "hashevict-plus",) * 2)
    other, told = LLM(llm.checkpoint, llm.model, llm.plan), []
    other.steps = None
    for number, one in enumerate((llm, other)):
        session = one.session(seed=3, temperature=0.7, ignore_eos=True)
        stream = session.generate("the mat and", max_tokens=9, stop=("zz",))
        first = [next(stream), next(stream)]
        session.save(tmp_path / f"{number}.half")  # while it is being told
        first += list(stream)
        session.save(tmp_path / f"{number}.whole")
        copy = session.fork()
        assert copy.llm.steps is None or copy.llm.steps is not one.steps
        if copy.llm.memory is not None:
            assert copy.llm.memory.base == llm.memory.base + llm.plan.nbytes + planned
        more = [one.generate(max_tokens=2).finish() for one in (copy, session)]
        assert more[0].token_ids == more[1].token_ids
        told.append((first, stream.result.token_ids, stream.result.usage, more[1].token_ids, more[1].usage))
    assert told[0] == told[1]
    for name in ("half", "whole"):
        assert (tmp_path / f"0.{name}").read_bytes() == (tmp_path / f"1.{name}").read_bytes()


class NoHost(TorchDispatchMode):
    """Refuses what tells the host a value, makes a shape depend on one, or brings one from the host."""

    REFUSED = ("_local_scalar_dense", "item", "is_nonzero", "nonzero", "masked_select", "equal", "lift_fresh")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in self.REFUSED, f"values pass between host and device by {name}"
        return func(*args, **(kwargs or {}))


def test_the_guard_can_fail() -> None:
    for step in (lambda: torch.ones(1).item(), lambda: torch.tensor(3), lambda: torch.ones(3).nonzero()):
        with pytest.raises(AssertionError, match="between host and device"), NoHost():
            step()


@pytest.mark.parametrize("policy", [*EVERY_RULE, "full"])
def test_no_host_value_from_one_step_to_the_next(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that fill, settle, evict and idle are fed what is drawn from their logits, by every rule of sampling.

    Lists and numbers that dispatch would not see are refused by name.
    """
    model = on_triton(model_of(tiny_config(num_hidden_layers=1, max_position_embeddings=20)))
    cache = cache_of(model, policy, slots=16, rows=3, evict_every=2, position_mode="window")
    steps, starts = steps_of(model, cache), {0: 15 if policy != "full" else 9, 2: 3}
    everything: dict[str, Any] = {"temperature": 0.8, "top_k": 9, "top_p": 0.9, "min_p": 0.01, "logit_bias": {1: 1.0}}
    everything |= {"repetition_penalty": 1.1, "presence_penalty": 0.1, "frequency_penalty": 0.1, "min_tokens": 2}
    samplers = [
        Sampler(SamplingParams(seed=1, **rules), 97, 90, (2,), DEVICE) for rules in ({}, everything | {"logprobs": 3})
    ]
    for row, length in starts.items():
        read_prompt(model, cache.row(row), length)
    drawn = [torch.ones(2, device=DEVICE) for _ in starts]

    def refuse(*_: object) -> None:
        raise AssertionError("the host asks for a value")

    with monkeypatch.context() as patched, torch.inference_mode(), NoHost():
        for name in ("tolist", "item", "numpy", "__bool__", "__int__", "__float__", "__index__", "cpu"):
            patched.setattr(torch.Tensor, name, refuse)
        for step in range(4):
            positions = [length + step for length in starts.values()]
            logits = steps.feed(list(starts), positions, drawn)
            drawn = [sampler.draw(one) for sampler, one in zip(samplers, logits, strict=True)]
            steps.fetch(drawn)
    samples = [sampler.note(facts) for sampler, facts in zip(samplers, steps.fetch(drawn)(), strict=True)]
    assert [len(sample.top) for sample in samples] == [0, 3]


def test_what_is_not_recorded_is_said() -> None:
    model = model_of()
    for policy in ("h2o", "keydiff", "fastgen"):
        found = refusal(cache_of(model, policy), torch.float32)
        assert found is not None
        assert f"policy '{policy}' with its options needs the host" in found
    for policy in EVERY_RULE:
        assert refusal(cache_of(model, policy), torch.float32) is None
        assert refusal(cache_of(model, policy), torch.float64) is not None


@pytest.mark.parametrize("policy", [*EVERY_RULE, "full"])
def test_recordings_hold_what_the_plan_says(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Buffers to the byte, what is allocated for kernels to the byte, and all that lives in a step at most.

    Nothing is launched: the interpreter would copy what it is given.
    """
    launched = {
        kernels: ("enter",),
        kernels_attend: ("attend", "join"),
        kernels_between: ("rms_norm", "gated", "rotate"),
    }
    for module, name in ((module, name) for module, names in launched.items() for name in names):
        monkeypatch.setattr(module, name, defaultdict(lambda: lambda *_, **__: None))
    config = tiny_config(vocab_size=2000, head_dim=32)
    for dtype, rows, slots in product((torch.float32, torch.bfloat16), (1, 5), (40, 600)):
        budget = None if policy == "full" else slots
        plan = CachePlan.of(config, budget=budget, whole=slots, dtype=dtype, policy=policy, rows=rows)
        cache, model = plan.allocate(DEVICE), on_triton(tiny_model(config, dtype).to(DEVICE))
        steps, planned = steps_of(model, cache), recording_bytes(plan)
        assert sum(tensor.nbytes for tensor in steps.buffers) == planned["buffers"]
        with torch.inference_mode(), Living() as living:
            steps._step(rows)
        assert living.most <= planned["step"], (dtype, rows, slots)
        q, k = (torch.randn(rows, heads, 1, 32, device=DEVICE, dtype=dtype) for heads in (4, 2))
        now = torch.full((rows, 1), -1, device=DEVICE)
        with torch.inference_mode(), Living() as living:
            triton.attend_slots(cache.layers[0], q, now, None)
        attending = living.most - q.nbytes  # the result is one of the numbers of a layer
        with torch.inference_mode(), Living() as living:
            triton.enter_(cache.layers[0], q, k, k, Span(now, now, (), 1))
        spare = kernel_bytes(plan) * rows - max(attending, living.most)
        assert 0 <= spare <= (4 * rows if policy == "hashevict-key" else 0), (dtype, rows, slots)  # fewer codes


@pytest.mark.parametrize("int8", [False, True], ids=["", "int8"])
@pytest.mark.parametrize("policy", ["hashevict", "full"])
def test_chunks_take_what_the_plan_says(policy: str, int8: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What has left, and parts of the attention, to the byte."""
    for module, name in ((kernels, "enter"), (kernels_attend, "attend"), (kernels_attend, "join")):
        monkeypatch.setattr(module, name, defaultdict(lambda: lambda *_, **__: None))
    options = {"dtype": torch.float32, "policy": policy, "kv_dtype": "int8" if int8 else "auto", "evict_every": 3}
    plan = CachePlan.of(tiny_config(head_dim=32), budget=40, whole=80, **options)  # type: ignore[arg-type]
    layer = plan.allocate(DEVICE).layers[0]
    q, k = (torch.randn(1, heads, 25, 32, device=DEVICE) for heads in (4, 2))
    with torch.inference_mode(), Living() as living:
        gone = triton.enter_(layer, q, k, k, span_of([20], length=25))
        triton.attend_slots(layer, q, span_of([20], length=25).positions, None, gone)
    here = 25 * 8 * (1 + 2)  # positions, on the device and as they come
    assert abs(living.most - q.nbytes - kernel_bytes(plan, 25)) <= here
    assert CUT_MANY == triton.CUT_MANY  # nobody has so many slots here


@pytest.mark.parametrize(("policy", "replayed", "served"), [("window", 1.0, 1.0), ("keydiff", 0.0, 1 / 3)])
def test_a_benchmark_says_what_was_replayed(
    policy: str,
    replayed: float,
    served: float,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("minillm.machine.BUFFER_NUMBERS", 1 << 16)
    options = ["--dtype", "float32", "--device", DEVICE.type, "--backend", "triton", "--policy", policy, "--rows", "2"]
    options += ["--model", str(write_checkpoint(tmp_path / "tiny")), "--tokens", "2"]
    assert main(["bench", "--context", "9", "--budget", "8", "--rounds", "1", *options]) == 0
    told = capsys.readouterr().out.splitlines()
    assert any(f"{replayed:.0%} of decode steps were replayed" in line for line in told)
    case = json.loads(told[-1])["cases"][0]
    assert (case["graph_coverage"], case["kernel_coverage"]) == (replayed, pytest.approx(served))
    assert case["decode_tokens_per_s"] > 0
    assert case["shares"]["hashing"] > 0
