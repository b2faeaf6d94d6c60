"""Many sequences in one cache: each gets what generate.py gives it alone, whatever else is going on."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from minillm import quant
from minillm.backends import linear
from minillm.cache import KVCache
from minillm.engine import Engine
from minillm.errors import CheckpointError, MinillmError
from minillm.eviction import Retention
from minillm.generate import Pins, generate
from minillm.model import Transformer
from minillm.policies import POLICIES, make_policy
from minillm.quant import SCHEMES, Scheme
from minillm.sampling import Sample, Sampler, SamplingParams
from tests.helpers import kept_positions, tiny_config, tiny_model
from tests.test_cpu_backend import fuse, random_model

VOCAB = 97


@dataclass(eq=False)
class Job:
    """A task that keeps what it was told."""

    prompt: Tensor
    sampler: Sampler
    max_tokens: int = 20
    pins: Pins = ()
    start_at: int = 0  # the step before which it begins
    leave_after: int | None = None  # tokens, after which nobody listens any more
    ids: list[int] = field(default_factory=list)
    scores: list[float | None] = field(default_factory=list)
    chunks: list[int] = field(default_factory=list)
    ended: list[MinillmError | None] = field(default_factory=list)

    def read(self, tokens: Tensor, hidden: Tensor) -> None:
        assert hidden.shape[:2] == tokens.shape
        self.chunks.append(tokens.shape[1])

    def draw(self, sample: Sample) -> bool:
        self.ids.append(sample.token_id)
        self.scores.append(sample.logprob)
        return len(self.ids) < self.max_tokens and not self.sampler.is_stop(sample.token_id)

    def end(self, error: MinillmError | None) -> None:
        self.ended.append(error)


class Reads64(Sampler):
    """Draws from float64, too."""

    def draw(self, logits: Tensor) -> Tensor:
        return super().draw(logits.to(torch.float32))


def params(number: int) -> SamplingParams:
    """Every third is greedy, the others draw, each by other rules."""
    rules: list[dict[str, Any]] = [
        {},
        {"temperature": 0.9, "top_k": 20},
        {"temperature": 1.1, "repetition_penalty": 1.2},
    ]
    return SamplingParams(seed=number, logprobs=0, **rules[number % 3])


def job(number: int, length: int, device: torch.device = torch.device("cpu"), **options: Any) -> Job:  # noqa: B008
    prompt = torch.randint(3, VOCAB, (length,), generator=torch.Generator().manual_seed(number))
    sampler = Reads64(params(number), VOCAB, VOCAB, (2,), device)
    return Job(prompt.to(torch.int32), sampler, **options)


def cache_for(model: Transformer, policy: str, rows: int, slots: int = 24, **options: Any) -> KVCache:
    retention = Retention.of(slots, sinks=2, evict_every=3)
    dtype = model.model.embed_tokens.weight.dtype
    return KVCache(model.config, make_policy(policy), retention, rows=rows, dtype=dtype, **options)


def run(engine: Engine, jobs: list[Job], order: random.Random | None = None) -> None:
    """Give every job a row as soon as one is free, in any order, until all are done."""
    waiting, step = list(jobs), 0
    while waiting or engine.busy:
        free = [number for number, row in enumerate(engine.rows) if row.task is None]
        if order is not None:
            order.shuffle(free)
        for number in free:
            ready = [job for job in waiting if job.start_at <= step]
            if ready:
                waiting.remove(ready[0])
                engine.rows[number].cache.reset()
                engine.start(number, ready[0])
        engine.step()
        step += 1
        for number, row in enumerate(engine.rows):
            task = row.task
            if isinstance(task, Job) and task.leave_after is not None and len(task.ids) >= task.leave_after:
                engine.stop(number)


def alone(model: Transformer, policy: str, one: Job, chunk: int, **options: Any) -> list[int]:
    cache = cache_for(model, policy, 1, **options)
    sampler = Reads64(one.sampler.params, VOCAB, VOCAB, (2,), cache.device)
    samples = generate(model, cache, one.prompt, sampler, max_tokens=one.max_tokens, chunk=chunk, pins=one.pins)
    return [sample.token_id for sample in samples]


@pytest.mark.parametrize("policy", [name for name in POLICIES if name != "full"])
@pytest.mark.parametrize("fused", [False, True], ids=["reference", "cpu"])
def test_equal_to_generate_in_float64(policy: str, fused: bool) -> None:
    """Rows that come and go at different times, longer and shorter than the slots and the trained length."""
    model = random_model(tiny_config(max_position_embeddings=64, sliding_windows=(None, 30)), torch.float64)
    model = fuse(model) if fused else model
    engine = Engine(model, cache_for(model, policy, 3, position_mode="window"), chunk=16)
    jobs = [job(n, length, start_at=3 * n) for n, length in enumerate((5, 40, 90, 1, 16, 23, 100))]
    run(engine, jobs)
    for one in jobs:
        assert one.ended == [None]
        assert one.ids == alone(model, policy, one, 16, position_mode="window")


def kinds() -> Iterator[Any]:
    rows_tied = ((1, False), (3, True), (8, False), (12, False), (12, True))
    for dtype, schemes, sizes in (
        (torch.bfloat16, (None, *SCHEMES), rows_tied),
        (torch.float32, (None, "int8"), rows_tied[1::2]),
    ):
        for scheme in schemes:
            for rows, tied in sizes:
                name = f"{str(dtype)[6:]}-{scheme}-{rows}" + "-tied" * tied
                yield pytest.param(dtype, scheme, rows, tied, id=name)


@pytest.mark.parametrize(("dtype", "scheme", "rows", "tied"), list(kinds()))
def test_no_bit_depends_on_the_neighbours(dtype: torch.dtype, scheme: str | None, rows: int, tied: bool) -> None:
    """The same requests alone, and in a crowd that comes and goes: the same tokens, the same log-probabilities."""
    config = tiny_config(
        vocab_size=VOCAB, hidden_size=128, intermediate_size=192, num_attention_heads=8, num_key_value_heads=2,
        head_dim=32, tie_word_embeddings=tied,
    )  # fmt: skip
    model = fuse(random_model(config, dtype), Scheme(scheme) if scheme else None)
    found = []
    for crowded in (False, True):
        engine = Engine(model, cache_for(model, "hashevict-plus", rows), chunk=16)
        jobs = [job(n, 3 + 13 * n) for n in range(5)]
        if crowded:
            others = [
                job(100 + n, 5 + 7 * n, max_tokens=9 + n, start_at=n, leave_after=n % 5 or None) for n in range(20)
            ]
            run(engine, [*others[:10], *jobs, *others[10:]], random.Random(0))
        else:
            for one in jobs:
                run(engine, [one])
        found.append([(one.ids, one.scores) for one in jobs])
    assert found[0] == found[1]


@pytest.mark.parametrize("policy", ["hashevict", "hashevict-plus", "h2o", "snapkv"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_reference_does_not_look_at_neighbours_either(policy: str, dtype: torch.dtype) -> None:
    model = tiny_model(tiny_config(), dtype)
    found = []
    for crowd in ([], [job(50 + n, 10 * n + 1, start_at=2 * n) for n in range(6)]):
        engine = Engine(model, cache_for(model, policy, 4), chunk=16)
        jobs = [job(n, 30 + n) for n in range(3)]
        run(engine, [*crowd, *jobs])
        found.append([(one.ids, one.scores) for one in jobs])
    assert found[0] == found[1]


def test_one_chunk_a_step_and_every_prompt_has_its_turn() -> None:
    """While a prompt of 160 tokens is read, running answers get a token a step, and a short prompt does not wait."""
    model = tiny_model(tiny_config(), torch.float32)
    engine = Engine(model, cache_for(model, "window", 3), chunk=16)
    running, long, short = (job(n, length, max_tokens=30) for n, length in ((0, 4), (3, 160), (6, 20)))
    for one in (running, long, short):
        one.sampler = Sampler(SamplingParams(ignore_eos=True), VOCAB, VOCAB, (2,), torch.device("cpu"))
    engine.start(0, running)
    engine.step()
    engine.start(1, long)
    engine.start(2, short)
    for step in range(1, 5):
        engine.step()
        assert len(running.ids) == 1 + step
    assert (len(long.chunks), short.chunks, len(short.ids)) == (2, [16, 4], 1)
    assert not long.ids
    while engine.busy:
        engine.step()
    assert sum(long.chunks) == 160
    assert all(one.ended == [None] for one in (running, long, short))


def test_a_row_that_was_stopped_is_whole() -> None:
    """Stopped while reading and while drawing, a row goes on as if it had been fed so far and no further."""
    model = tiny_model(tiny_config(), torch.float64)
    engine, other = (Engine(model, cache_for(model, "hashevict", 2), chunk=16) for _ in range(2))
    for one, number in ((engine, 0), (other, 1)):
        reads = job(0, 100)
        one.start(number, reads)
        for _ in range(3):
            one.step()
        one.stop(number)
        draws = job(1, 10, max_tokens=50)
        one.start(number, draws)
        for _ in range(12):
            one.step()
        one.stop(number)
        assert not one.busy
        assert one.rows[number].cache.seen == [48 + 10 + 12]  # every token drawn was fed but for none: 12 steps
    last = [job(2, 7), job(2, 7)]
    engine.start(0, last[0])
    other.start(1, last[1])
    while engine.busy or other.busy:
        engine.step()
        other.step()
    assert last[0].ids == last[1].ids
    assert kept_positions(engine.rows[0].cache) == kept_positions(other.rows[1].cache)


def test_what_one_task_does_wrong_ends_that_task_alone() -> None:
    model = tiny_model(tiny_config(), torch.float32)
    engine = Engine(model, cache_for(model, "window", 3), chunk=16)

    class Refuses(Job):
        def read(self, tokens: Tensor, hidden: Tensor) -> None:  # noqa: ARG002
            raise CheckpointError("no")

    class Overflows(Sampler):
        def note(self, drawn: Sequence[float]) -> Sample:  # noqa: ARG002
            raise CheckpointError("NaN")

    good, refused, broken = job(0, 30), job(1, 30), job(2, 5)
    refused = Refuses(refused.prompt, refused.sampler)
    broken.sampler = Overflows(SamplingParams(), VOCAB, VOCAB, (2,), torch.device("cpu"))
    run(engine, [good, refused, broken])
    assert good.ended == [None]
    assert good.ids == alone(model, "window", good, 16)
    assert [str(one.ended[0]) for one in (refused, broken)] == ["no", "NaN"]


def test_nothing_to_draw() -> None:
    model = tiny_model(tiny_config(), torch.float32)
    engine = Engine(model, cache_for(model, "window", 2), chunk=16)
    one = job(0, 33, max_tokens=0)
    run(engine, [one])
    assert (one.ids, one.ended, one.chunks) == ([], [None], [16, 16, 1])


@pytest.mark.parametrize("rows", [2, 3, 8, 9, 16])
@pytest.mark.parametrize("width", [96, 512])
def test_products_round_alike_from_so_many_rows_on(rows: int, width: int) -> None:
    """`fewest_alike` of every kind of linear layer."""
    torch.manual_seed(0)
    made: list[tuple[linear.Linear, torch.dtype]] = []
    weight = torch.randn(128, width) * 0.1
    for dtype in (torch.float32, torch.bfloat16):
        numbers: list[Any] = [weight.to(dtype), quant.quantise(weight, 8), quant.quantise(weight, 4)]
        for given in numbers:
            for rounds in (True, False):
                layer = linear.make_linear(given, None, dtype=dtype, rounds_activations=rounds)
                made.append((layer, dtype))
        made.append((linear.PlainLinear(weight.to(dtype), None), dtype))
    for layer, dtype in made:
        x = torch.randn(rows, width).to(dtype)
        whole, fewest = layer(x), layer.fewest_alike(rows, dtype)
        assert 1 <= fewest <= rows
        for count in range(fewest, rows):
            assert torch.equal(layer(x[:count]), whole[:count]), (type(layer).__name__, dtype, count)


def test_a_model_of_plain_layers_always_takes_all_rows() -> None:
    model = tiny_model(tiny_config(), torch.float32)
    assert linear.fewest_alike(model.model, 5, torch.float32) == 5
    fused = fuse(random_model(tiny_config(), torch.float32))
    assert linear.fewest_alike(fused.model, 5, torch.float32) == 2
