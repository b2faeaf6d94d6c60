"""The Triton kernels beside the reference: compiled on a GPU (`pytest tests/triton_cases.py`), else interpreted.

Interpreted by test_triton.py, in a process of its own with TRITON_INTERPRET=1.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from minillm import LLM, CheckpointError, ConfigError, ContextFullError
from minillm.backends import reference, triton
from minillm.backends.graph import Cuda, Eager, Recorder, Steps
from minillm.cache import CacheRows, KVCache, PositionMode
from minillm.config import ModelConfig
from minillm.eviction import Retention
from minillm.model import Attention, Transformer
from minillm.policies import make_policy
from minillm.slots import PINNED, LayerCache, Span

from .helpers import kept_positions, make_cache, run, tiny_config, tiny_model

INTERPRETED = triton.missing(torch.device("cpu")) is None
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
CLOSE = 2e-6 if INTERPRETED else 2e-5
TRAINED = 18
pytestmark = pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="no GPU; TRITON_INTERPRET=1")


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
    """
    for name, tensor in layer.tensors().items():
        scaled = layer.scales is not None and name in ("keys", "values", "scales")
        if name == "total" or (scaled and not INTERPRETED):
            steps = 1 if tensor.dtype == torch.int8 else 1e-6
            torch.testing.assert_close(other.tensors()[name], tensor, rtol=1e-6, atol=steps)
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
def test_more_at_once_than_a_kernel_takes(policy: str, slots: int) -> None:
    """Over 32 go at once, over 64 queries attend, and over 1,024 slots are searched."""
    retention = Retention.of(slots, sinks=4, recent=30, evict_every=40)
    compare_block([slots - 10], [75], policy, retention=retention, heads=(2, 1, 16))


def test_more_slots_than_victims_can_be_chosen_from() -> None:
    """eviction.py does it then, and no step can be recorded."""
    layer = layer_of("window", Retention.of(triton.MOST_SLOTS + 1), heads=(1, 1, 16))
    assert triton.rule_of(layer) is None
    assert not triton.serves_step(layer, torch.float32)


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
    for module in model.modules():
        if isinstance(module, Attention):
            module.attend = triton.attend_
    return model


@pytest.mark.parametrize("policy", [*EVERY_RULE, "keydiff", "h2o"])
def test_a_prompt_in_chunks(policy: str) -> None:
    """Two rows; stretches go through torch's kernel, lone tokens through ours; no kernel, or none at all: as ever."""
    tokens = torch.randint(97, (2, 44), generator=torch.Generator().manual_seed(1))
    found, kept = [], []
    for model, chunk in ((model_of(), 44), (on_triton(model_of()), 19)):
        cache = cache_of(model, policy, slots=24, rows=2, evict_every=4)
        found.append(torch.cat([run(model, cache, tokens[:, :42], chunk), run(model, cache, tokens[:, 42:], 1)], 1))
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


def recorder(rows: int) -> Recorder:
    return Eager() if INTERPRETED else Cuda(rows)


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
    """Three rows in batches of 1, 2 and 3, read one step late: what each would have said alone, and the same cache."""
    config = tiny_config(max_position_embeddings=20)
    model, options = on_triton(model_of(config)), {"slots": 16, "rows": 3, "evict_every": 2, "position_mode": mode}
    cache, alone = (cache_of(model, "hashevict-plus", **options) for _ in range(2))  # type: ignore[arg-type]
    steps = Steps(model, cache, recorder(3))
    addresses = [tensor.data_ptr() for tensor in (steps._tokens, steps._positions, steps._rows, steps._drawn)]
    answers: dict[int, list[int]] = {}
    for row, length, following in ((2, 15, 2), (0, 18, 2), (1, 3, 3)):
        view = cache.row(row)
        answers[row] = [read_prompt(model, view, length)]
        steps.enter(row, view, answers[row][0])
        for _ in range(following):
            for other, token in steps.step().items():
                answers[other].append(token)
        if row == 0:
            steps.leave(2)
    for other, token in steps.finish().items():
        answers[other].append(token)
    for row, length, drawn, said in ((2, 15, 5, 4), (0, 18, 6, 6), (1, 3, 4, 4)):  # row 2 left with one unread
        assert len(answers[row]) == said
        assert answers[row] == told_alone(alone, row, length, drawn)[:said]
    assert kept_positions(cache) == kept_positions(alone)
    assert addresses == [tensor.data_ptr() for tensor in (steps._tokens, steps._positions, steps._rows, steps._drawn)]


def test_what_a_row_drew_before_it_left_is_not_its_successors() -> None:
    model = on_triton(model_of())
    cache = cache_of(model, "window", slots=16, rows=2)
    steps, view = Steps(model, cache, recorder(2)), cache.row(1)
    steps.enter(1, view, 5)
    assert steps.step() == {}
    steps.leave(1)
    view.reset()
    steps.enter(1, view, 6)
    assert steps.step() == {}
    assert set(steps.finish()) == {1}


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
def test_no_host_value_in_a_step(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that fill, settle, evict and idle; lists and numbers that dispatch would not see are refused by name."""
    model = on_triton(model_of(tiny_config(max_position_embeddings=20)))
    cache = cache_of(model, policy, slots=16, rows=3, evict_every=2, position_mode="window")
    steps = Steps(model, cache, recorder(3))
    for row, length in ((0, 16), (1, 3)):
        if policy != "full" or length < 16:
            view = cache.row(row)
            steps.enter(row, view, read_prompt(model, view, length))

    def refuse(*_: object) -> None:
        raise AssertionError("the host asks for a value")

    with monkeypatch.context() as patched, torch.inference_mode(), NoHost():
        for name in ("tolist", "item", "numpy", "__bool__", "__int__", "__float__", "__index__", "cpu"):
            patched.setattr(torch.Tensor, name, refuse)
        for _ in range(3):
            steps._step(3)


def test_recording_leaves_no_trace() -> None:
    model = on_triton(model_of())
    cache = cache_of(model, "hashevict", slots=16, rows=2)
    before = [tensor.clone() for layer in cache.layers for tensor in layer.tensors().values()]
    Steps(model, cache, recorder(3))
    after = [tensor for layer in cache.layers for tensor in layer.tensors().values()]
    assert all(map(torch.equal, before, after))


def test_what_cannot_be_recorded_is_refused() -> None:
    model = on_triton(model_of())
    for policy in ("h2o", "keydiff"):
        with pytest.raises(ConfigError, match=f"policy '{policy}' .* needs the host in every step"):
            Steps(model, cache_of(model, policy), recorder(3))


def test_a_full_cache_and_broken_logits_are_said() -> None:
    model = on_triton(model_of())
    cache = cache_of(model, "full", slots=16)
    steps, view = Steps(model, cache, recorder(3)), cache.row(0)
    steps.enter(0, view, read_prompt(model, view, 15))
    steps.step()
    with pytest.raises(ContextFullError, match="never evicts"):
        steps.step()
    model.model.norm.weight.fill_(float("nan"))
    cache.reset()
    steps = Steps(model, cache, recorder(3))
    steps.enter(0, cache.row(0), 5)
    steps.step()
    with pytest.raises(CheckpointError, match="not finite"):
        steps.finish()
