"""Tokens that are fed before they are known: the same answers, and the same caches, as by generate.py.

Here attention in a recorded step is the reference's, row by row, and a recorded step is run again: all but the kernels
and the graphs.  test_triton.py has the kernels.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from minillm.ahead import generate_ahead
from minillm.backends import reference
from minillm.backends.graph import Eager, Steps
from minillm.cache import KVCache
from minillm.engine import Engine, rows_alike
from minillm.errors import CheckpointError, ContextFullError
from minillm.eviction import Retention
from minillm.fused import FusedLayer
from minillm.generate import generate
from minillm.model import Attention, Transformer
from minillm.policies import make_policy
from minillm.sampling import Sampler, SamplingParams
from minillm.slots import NOTHING, LayerRows, LayerSlots, Span

from .helpers import tiny_config, tiny_model
from .test_cpu_backend import fuse, random_model
from .test_engine import VOCAB, Job, Reads64, alone, cache_for, job, run

POLICIES = ["window", "hashevict", "hashevict-plus", "keydiff"]


def attend_recorded(
    layer: LayerSlots, q: Tensor, k: Tensor, v: Tensor, span: Span, q_far: Tensor | None = None
) -> Tensor:
    """The reference, also for a recorded step: where the rows stand this CPU may be asked."""
    if not isinstance(layer, LayerRows) or layer.views:
        return reference.attend_(layer, q, k, v, span, q_far)
    result, fixed = torch.zeros_like(q), frozenset(layer.whole.policy.constants(tiny_config(), 0))
    for place, (row, position) in enumerate(zip(layer.rows.tolist(), span.positions[:, 0].tolist(), strict=True)):
        if position != NOTHING:
            view, at, host = layer.whole.row(row, fixed), slice(place, place + 1), torch.tensor([[position]])
            view.flagged = True
            far = None if q_far is None or not view.asks_from_afar(position) else q_far[at]
            result[at] = reference.attend_(view, q[at], k[at], v[at], Span(host, host, (position,), 1), far)
    return result


def recordable(model: Transformer) -> Transformer:
    for module in model.modules():
        if isinstance(module, (Attention, FusedLayer)):
            module.attend = attend_recorded
    return model


def held(cache: KVCache) -> list[Tensor]:
    """Everything in a cache, slots that hold nothing cleared, as a session would be saved."""
    cache.take_back_()
    found = []
    for layer in cache.layers:
        empty = layer.positions == NOTHING  # [B, Hkv, S]
        for name, tensor in layer.tensors().items():
            slotwise = tensor.shape[:3] == empty.shape and name not in ("free", *cache.fixed)
            shape = (*empty.shape, *[1] * (tensor.ndim - 3))
            found.append(tensor.masked_fill(empty.view(shape), 0) if slotwise else tensor.clone())
    return found


def same(cache: KVCache, other: KVCache) -> bool:
    return cache.seen == other.seen and all(map(torch.equal, held(cache), held(other)))


def sampler(**rules: Any) -> Sampler:
    return Reads64(SamplingParams(**{"seed": 3, **rules}), VOCAB, VOCAB, (2,), torch.device("cpu"))


class Pair:
    """A sequence told by generate.py, and the same by recorded steps."""

    def __init__(self, policy: str, mode: Any = "absolute", dtype: torch.dtype = torch.float64, **rules: Any) -> None:
        self.model = recordable(tiny_model(tiny_config(max_position_embeddings=20), dtype))
        options = {"slots": 16, "position_mode": mode}
        self.caches = [cache_for(self.model, policy, 1, **options) for _ in range(2)]
        self.steps = Steps(self.model, self.caches[1], Eager())
        self.samplers = [sampler(**rules), sampler(**rules)]

    def tell(self, prompt: list[int], max_tokens: int = 99, listen: int = 99) -> list[int]:
        """An answer, of which `listen` tokens are looked at; the same from both."""
        told = []
        for number, cache in enumerate(self.caches):
            options: Any = {"max_tokens": max_tokens, "chunk": 8, "pins": [(3, 5)] if cache.seen == [0] else ()}
            arguments = (self.model, cache, torch.tensor(prompt), self.samplers[number])
            samples = generate_ahead(self.steps, *arguments, **options) if number else generate(*arguments, **options)
            told.append([sample for sample, _ in zip(samples, range(listen), strict=False)])
        assert told[0] == told[1]
        assert same(*self.caches)
        states = [one.state() for one in self.samplers]
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
        return [sample.token_id for sample in told[0]]


@pytest.mark.parametrize(
    ("policy", "mode"), [*((policy, "window") for policy in POLICIES), ("hashevict-key", "absolute")]
)
def test_an_answer_may_end_at_any_token(policy: str, mode: str) -> None:
    """By a stop token, by its length, or because nobody listens, in every phase of evict_every; and the next one."""
    rules: dict[str, Any] = {"temperature": 0.9, "ignore_eos": True, "logprobs": 2, "repetition_penalty": 1.1}
    prompt = list(range(3, 14))  # in 16 slots, of which three go at once: before the 6th, 9th and 12th token drawn
    ids = Pair(policy, mode, **rules).tell(prompt, 14)
    for last in range(4, 13):
        for ending in ("length", "nobody listens", "stop token"):
            stop = (ids[last],) if ending == "stop token" else ()
            pair = Pair(policy, mode, **rules, stop_token_ids=stop)
            told = pair.tell(prompt, last if ending == "length" else 99, last if ending == "nobody listens" else 99)
            assert told == ids[: ids.index(ids[last]) + 1 if stop else last]
            pair.tell([5, 6], 4)


def test_sixteen_bits_and_what_is_not_evicted() -> None:
    Pair("hashevict-plus", "window", torch.bfloat16).tell([4, 5, 6], 30)
    pair = Pair("full")
    assert len(pair.tell([4, 5, 6], 14)) == 14  # positions 3 to 15, and one that is not fed
    for cache, decode in zip(pair.caches, (generate, None), strict=True):
        prompt: Any = (pair.model, cache, torch.tensor([7]), sampler())
        with pytest.raises(ContextFullError):
            list(decode(*prompt, max_tokens=5) if decode else generate_ahead(pair.steps, *prompt, max_tokens=5))


def test_a_cache_that_is_looked_at_meanwhile() -> None:
    """It has not seen what was fed ahead; a copy does not have it, and the answer goes on as if nobody had looked."""
    pair = Pair("hashevict", ignore_eos=True)
    plain, cache = pair.caches
    arguments: Any = (torch.tensor([4, 5, 6]), pair.samplers[0])
    expected = generate(pair.model, plain, *arguments, max_tokens=12)
    arguments = (torch.tensor([4, 5, 6]), pair.samplers[1])
    for number, sample in enumerate(generate_ahead(pair.steps, pair.model, cache, *arguments, max_tokens=12)):
        assert sample == next(expected)
        assert (cache.seen, cache.kept(), cache.oldest()) == (plain.seen, plain.kept(), plain.oldest())
        if number % 3 == 0:
            assert cache.ahead == (number < 11 and not cache.due)
            copy = cache_for(pair.model, "hashevict", 1, slots=16)
            copy.copy_(cache)
            assert not cache.ahead
            assert same(copy, plain)


def test_what_was_fed_ahead_is_taken_back_by_whatever_comes_next() -> None:
    cache = cache_for(tiny_model(), "window", 1)
    for act in (lambda: cache.append(1), cache.reset, cache.take_back_, cache.feed_ahead):
        cache.feed_ahead()
        cache.layers[0].positions[0, :, cache.seen[0]] = cache.seen[0]
        act()
        assert int(cache.layers[0].positions.amax()) == NOTHING
    cache.keep()
    assert (cache.seen, cache.ahead) == ([1], False)


# --- many rows --------------------------------------------------------------------------------------------------------


def engine_of(model: Transformer, policy: str, rows: int, spare: int = 0, **options: Any) -> Engine:
    cache, fewest = cache_for(model, policy, rows + spare, **options), max(rows_alike(model, rows))
    steps = Steps(model, cache, Eager(), rows=rows, fewest=fewest)
    return Engine(model, cache, chunk=16, rows=rows, steps=steps)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("fused", [False, True], ids=["reference", "cpu"])
def test_rows_get_what_generate_gives_them(policy: str, fused: bool) -> None:
    """Rows that come and go, some of which nobody waits for; pins; a row that is not the engine's."""
    model = random_model(tiny_config(max_position_embeddings=64, sliding_windows=(None, 30)), torch.float64)
    model = recordable(fuse(model) if fused else model)
    engine = engine_of(model, policy, 3, spare=1, position_mode="window")
    lengths = enumerate((5, 40, 90, 1, 16, 23, 100))
    jobs = [job(n, length, start_at=3 * n, pins=((2, 4),) if n % 2 else ()) for n, length in lengths]
    left = [job(50 + n, 9 + n, start_at=2 * n, leave_after=1 + n) for n in range(6)]
    run(engine, [*left[:3], *jobs, *left[3:]])
    for one in jobs:
        assert one.ended == [None]
        assert one.ids == alone(model, policy, one, 16, position_mode="window")
    assert engine.cache.row(3).layers[0].positions.amax() == NOTHING


def test_no_bit_depends_on_the_neighbours() -> None:
    """Nor on how many there are, where fewer rows round alike: 2, 4 and 8 at a time."""
    model = recordable(fuse(random_model(tiny_config(vocab_size=VOCAB), torch.float32)))
    found = []
    for crowd in ([], [job(50 + n, 10 * n + 1, start_at=2 * n, leave_after=n % 4 or None) for n in range(16)]):
        engine = engine_of(model, "hashevict-plus", 8)
        assert engine.steps is not None
        assert list(engine.steps._replays) == [2, 4, 8]
        jobs = [job(n, 30 + n, start_at=n) for n in range(3)]
        run(engine, [*crowd, *jobs], random.Random(0))
        found.append([(one.ids, one.scores) for one in jobs])
    assert found[0] == found[1]


@pytest.mark.parametrize("policy", ["window", "hashevict-plus"])
def test_rows_are_left_as_the_eager_engine_leaves_them(policy: str) -> None:
    """After every step, whoever has ended, left or broken in it."""
    model = recordable(tiny_model(tiny_config()))
    engines = [engine_of(model, policy, 3), Engine(model, cache_for(model, policy, 3), chunk=16)]
    asked = []
    for engine in engines:
        jobs = [job(n, length, max_tokens=9 + 2 * n) for n, length in enumerate((20, 25, 3))]
        jobs[2].sampler = Broken(SamplingParams(), VOCAB, VOCAB, (2,), torch.device("cpu"))
        for number, one in enumerate(jobs):
            engine.start(number, one)
        asked.append(jobs)
    for step in range(20):
        for engine, jobs in zip(engines, asked, strict=True):
            engine.step()
            if step == 8:
                engine.stop(0)
                jobs[0].ended.append(None)
        for ours, theirs in zip(*(engine.rows for engine in engines), strict=True):
            assert same(ours.cache, theirs.cache), step
    assert [one.ids for one in asked[0]] == [one.ids for one in asked[1]]
    assert [list(map(str, one.ended)) for one in asked[0]] == [list(map(str, one.ended)) for one in asked[1]]
    assert "not finite" in str(asked[0][2].ended[0]) or "hold" in str(asked[0][2].ended[0])


class Broken(Reads64):
    """Its fifth logits are no numbers."""

    def draw(self, logits: Tensor) -> Tensor:
        return super().draw(logits * float("nan") if self._count == 4 else logits)


def test_a_prompt_is_read_between_steps() -> None:
    """A row that has just read its prompt takes part in the next recorded step, beside rows that were fed ahead."""
    model = recordable(tiny_model(tiny_config()))
    engine, jobs = (
        engine_of(model, "window", 2),
        [Job(job(n, 4 + 36 * n).prompt, sampler(ignore_eos=True)) for n in (0, 1)],
    )
    engine.start(0, jobs[0])
    for step in range(5):
        engine.step()
        assert engine.rows[0].cache.seen == [4 + step + 1]
        if step == 1:
            engine.start(1, jobs[1])
    assert len(jobs[1].ids) == 1
    assert engine.rows[1].cache.seen == [41]
    assert not any(row.cache.ahead for row in engine.rows)


# --- the recordings ---------------------------------------------------------------------------------------------------


def test_batches_are_powers_of_two_between_the_fewest_and_the_most() -> None:
    model = recordable(tiny_model())
    cache = cache_for(model, "window", 7)
    for rows, fewest, batches in ((7, 1, [1, 2, 4, 7]), (7, 3, [3, 4, 7]), (7, 7, [7]), (4, 1, [1, 2, 4])):
        assert list(Steps(model, cache, Eager(), rows=rows, fewest=fewest)._replays) == batches


def test_recording_leaves_no_trace_and_buffers_stay_where_they_are() -> None:
    model = recordable(tiny_model())
    cache, view = cache_for(model, "hashevict", 2, slots=16), None
    before = [tensor.clone() for layer in cache.layers for tensor in layer.tensors().values()]
    steps = Steps(model, cache, Eager())
    assert all(map(torch.equal, before, (tensor for layer in cache.layers for tensor in layer.tensors().values())))
    places = [tensor.data_ptr() for tensor in steps.buffers]
    view = cache.row(1)
    logits = steps.feed([1], view.feed_ahead(), [torch.tensor([5.0])])
    assert logits.data_ptr() == steps.buffers[3].data_ptr()
    assert places == [tensor.data_ptr() for tensor in steps.buffers]


class CutOff(Eager):
    """Ctrl-C comes when a step has just run."""

    comes = False

    def record(self, step: Callable[[], None]) -> Callable[[], None]:
        def replay() -> None:
            step()
            if self.comes:
                raise KeyboardInterrupt

        return super().record(replay)


def test_a_step_that_was_cut_off_is_forgotten() -> None:
    """The next sequence stands where that one was about to be."""
    recorder = CutOff()
    cache = cache_for(tiny_model(), "window", 1, slots=16)
    steps, drawn = Steps(recordable(tiny_model()), cache, recorder), [torch.tensor([5.0])]
    cache.append(3)
    steps.feed([0], cache.feed_ahead(), drawn)
    cache.keep()
    recorder.comes = True
    with pytest.raises(KeyboardInterrupt):
        steps.feed([0], cache.feed_ahead(), drawn)
    recorder.comes = False
    cache.reset()
    cache.append(4)
    steps.feed([0], cache.feed_ahead(), drawn)
    assert [int(layer.positions.amax()) for layer in cache.layers] == [4, 4]


def test_layers_with_other_slots_are_due_at_other_times() -> None:
    retentions = [Retention.of(8, evict_every=3), Retention.of(12, evict_every=2)]
    cache = KVCache(tiny_config(), make_policy("window"), retentions)
    due = []
    for _ in range(20):
        if cache.due:
            due.append(cache.seen[0])
        cache.append(1)
    assert due == [8, 11, 12, 14, 16, 17, 18]


def test_broken_logits_are_said_after_the_step_was_launched() -> None:
    pair = Pair("window")
    broken = Broken(SamplingParams(ignore_eos=True), VOCAB, VOCAB, (2,), torch.device("cpu"))
    samples = generate_ahead(pair.steps, pair.model, pair.caches[1], torch.tensor([4, 5]), broken, max_tokens=9)
    with pytest.raises(CheckpointError, match="damaged or overflow"):
        list(samples)
    assert pair.caches[1].ahead
