"""`minillm bench`: what it counts is right, what it times is positive and adds up.  No timing is ever compared."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from minillm import machine
from minillm.backends.linear import Linear, has_int8
from minillm.bench import Bench, Case, live_bytes, weight_bytes
from minillm.breakdown import Spent, shares, watched
from minillm.budget import CachePlan
from minillm.cli import main as cli
from minillm.cli.bench import COLUMNS
from minillm.config import ModelConfig
from minillm.hub import ALIASES
from minillm.inventory import weights_of
from minillm.loader import random_model
from minillm.machine import Others, cpu_name
from minillm.model import Transformer
from minillm.shapes import SHAPES, Shape, shape_config

from .helpers import make_cache, run, tiny_config
from .test_cli_basics import one_line

# As published with the models.
PARAMETERS = {
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "tinyllama": 1_100_048_384,
    "llama-2-7b": 6_738_415_616,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "mistral-7b": 7_248_023_552,
    "mistral-nemo": 12_247_782_400,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920,
    "qwen3-8b": 8_190_735_360,
}


@pytest.fixture
def _small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "BUFFERS", 1)
    monkeypatch.setattr(machine, "BUFFER_NUMBERS", 1 << 20)


# --- the command line ----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_small_buffers")
def test_a_table_and_json_in_the_last_line(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--context", "16", "40", "--rows", "1", "2", "--tokens", "4", "--rounds", "2", "--budget", "24"]
    assert cli.main(["bench", "--shape", "tinyllama", "--layers", "1", "--weights", "int8", *options]) == 0
    *text, last = capsys.readouterr().out.splitlines()
    found = json.loads(last)
    assert "1 of 22 layers" in text[0]
    weights = "int8" if has_int8() else "int8-a16"
    assert (found["weights"], found["layers"], found["tokens"], found["rounds"]) == (weights, 1, 4, 2)
    assert found["cache"]["policy"] == "hashevict-plus"
    cases = found["cases"]
    assert [(case["context"], case["rows"]) for case in cases] == [(16, 1), (16, 2), (40, 1), (40, 2)]
    for case in cases:
        assert case["slots"] == 24
        assert min(value for value in case.values() if isinstance(value, (int, float))) > 0
        assert sum(case["shares"].values()) == pytest.approx(1)
        assert case["token_s"] <= case["token_p95_s"]
        assert (case["shares"]["hashing"] > 0) == (case["context"] == 40)  # 16 + 4 tokens fit into 24 slots
    assert [(cost["context"], cost["rows"], cost["than"]) for cost in found["rows_cost"]] == [(16, 2, 1), (40, 2, 1)]
    assert min(found["bandwidth"], found["peak"], found["planned_bytes"], found["weight_bytes"]) > 0
    table = text.index("  ".join(COLUMNS))
    assert [line.split()[:3] for line in text[table + 1 : table + 5]] == [
        [str(case["rows"]), str(case["context"]), "24"] for case in cases
    ]
    assert any("a step of 2 rows takes" in line for line in text)


@pytest.mark.usefixtures("_small_buffers")
def test_the_demo_and_only_json(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--context", "20", "20", "--tokens", "1", "--rounds", "1", "--kv-dtype", "int8", "--seed", "7"]
    assert cli.main(["bench", "--json", "--backend", "reference", *options]) == 0
    answer = capsys.readouterr().out
    assert answer.count("\n") == 1
    found = json.loads(answer)
    assert (found["model"], found["backend"], found["seed"]) == ("minillm-demo", "reference", 7)
    assert found["cache"] == {"policy": "full", "budget": "everything", "kv_dtype": "int8"}
    (case,) = found["cases"]  # a context that is named twice is one
    assert case["slots"] == 21
    assert found["rows_cost"] == []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--shape", "tinylama"], "tinyllama"),
        (["--shape", "tinyllama", "--layers", "23"], "22"),
        (["--layers", "1"], "--shape"),
        (["--shape", "tinyllama", "--model", "minillm-demo"], "--model"),
        (["--shape", "tinyllama", "--offline"], "--offline"),
        (["--shape", "tinyllama", "--dtype", "float16", "--backend", "cpu"], "--backend reference"),
        (["--budget", "0"], "budget 0"),
        (["--budget", "16", "--policy", "full"], "never evicts"),
        (["--policy", "no-such-policy"], "no-such-policy"),
        (["--context", "0"], "--context"),
        (["--rows", "1", "x"], "--rows"),
        (["--seed", str(1 << 70)], "seed"),
        (["--shape", "mistral-7b", "--rows", "1000000"], "are needed"),
    ],
)
def test_mistakes_are_one_line_before_anything_is_loaded(
    options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", *options]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert said in one_line(captured.err)


# --- what is counted -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_are_those_of_the_models_that_have_the_name(name: str) -> None:
    assert name in ALIASES
    config = shape_config(name)
    assert weights_of(None, config).nbytes(torch.bfloat16) == 2 * PARAMETERS[name]
    assert shape_config(name, 2).num_hidden_layers == 2


@pytest.mark.parametrize("weights", ["auto", "int8", "int4"])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("name", ["smollm2-135m", "qwen2.5-0.5b"])
def test_a_step_reads_all_weights_but_the_embedding(name: str, backend: str, weights: str) -> None:
    shape = Shape.of(name, 1, dtype="float32", device="cpu", weights=weights, backend=backend)
    embedding = 0 if weights == "auto" else 4 * shape.config.vocab_size * shape.config.hidden_size  # tied: the output
    assert weight_bytes(shape.load_model()) == pytest.approx(shape.weight_bytes() - embedding, rel=0.01)


def test_live_bytes_are_keys_and_values_of_what_is_seen() -> None:
    config = tiny_config()
    model = random_model(config, dtype=torch.float32, backend="reference")
    tokens = torch.randint(97, (2, 40), dtype=torch.int32)
    full = make_cache(model, "full", slots=64, rows=2)
    run(model, full, tokens, chunk=16)
    slot = 2 * config.head_dim * 4
    assert live_bytes(full) == 2 * 40 * 2 * 2 * slot  # rows, tokens, layers, KV heads
    bounded = make_cache(model, "window", slots=16, rows=2, evict_every=4)
    run(model, bounded, tokens, chunk=16)
    assert live_bytes(bounded) == 2 * 16 * 2 * 2 * slot
    plan = CachePlan.of(config, budget=None, whole=40, dtype=torch.float32, rows=2, kv_dtype="int8")
    small = plan.allocate(torch.device("cpu"))
    run(model, small, tokens, chunk=16)
    assert live_bytes(small) == 2 * 40 * 2 * 2 * (2 * config.head_dim + 2 * 4)  # and two scales


# --- where the time goes -------------------------------------------------------------------------------------------


@pytest.fixture(params=["fused", "fused, qk_norm", "reference"])
def model(request: pytest.FixtureRequest) -> Transformer:
    config = tiny_config(qk_norm="qk_norm" in request.param)
    return random_model(config, dtype=torch.float32, backend="cpu" if "fused" in request.param else "reference")


@pytest.mark.usefixtures("_small_buffers")
@pytest.mark.parametrize("policy", ["full", "window", "hashevict-plus", "h2o", "snapkv", "fastgen"])
def test_every_policy_is_measured_and_taken_apart(model: Transformer, policy: str) -> None:
    budget = None if policy == "full" else 32
    cases = [
        Case(
            rows, 40, CachePlan.of(model.config, budget=budget, whole=48, dtype=torch.float32, policy=policy, rows=rows)
        )
        for rows in (3, 1)
    ]
    seen: list[tuple[int, int]] = []
    report = Bench(model, tokens=8, rounds=2, chunk=16).run(cases, lambda done, total: seen.append((done, total)))
    assert seen[-1] == (576, 576)  # 3 rounds of 4 rows of 48 tokens
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    for figures in report.cases:
        assert list(figures.shares) == ["linears", "attention", "hashing", "rest"]
        assert sum(figures.shares.values()) == pytest.approx(1)
        assert min(figures.shares["linears"], figures.prefill_tokens_per_s, figures.decode_tokens_per_s) > 0
        assert (figures.shares["hashing"] > 0) == (policy != "full")
    assert [(cost.rows, cost.than) for cost in report.rows_cost] == [(3, 1)]


def test_watching_leaves_the_model_as_it_was(model: Transformer) -> None:
    tokens = torch.randint(97, (1, 9), dtype=torch.int32)
    before = run(model, make_cache(model, "full"), tokens, chunk=1)
    layers = [module for module in model.modules() if "attend" in vars(module)]
    attends = [layer.attend for layer in layers]
    with suppress(RuntimeError), watched(model) as spent:
        assert torch.equal(run(model, make_cache(model, "full"), tokens, chunk=1), before)
        assert spent.linears > 0
        assert spent.attend > 0
        raise RuntimeError
    assert [layer.attend for layer in layers] == attends
    assert len(attends) == 2
    linears = [module for module in model.modules() if isinstance(module, (Linear, torch.nn.Linear))]
    assert linears
    assert not any(linear._forward_hooks or linear._forward_pre_hooks for linear in linears)


def test_shares_add_up_where_nothing_was_evicted(model: Transformer) -> None:
    cache = make_cache(model, "window", slots=64)
    with watched(model) as spent:
        run(model, cache, torch.randint(97, (1, 32), dtype=torch.int32), chunk=1)
    steps = [(0.015, 0.005)] * 32
    spent = Spent(linears=0.352, attend=0.096, asked=spent.asked)
    assert shares(spent, steps, cache) == pytest.approx(
        {"linears": 0.8, "attention": 0.15, "hashing": 0.0, "rest": 0.05}
    )


def test_evictions_are_counted_and_spread_over_the_tokens_that_share_them(model: Transformer) -> None:
    cache = make_cache(model, "hashevict-plus", slots=16, evict_every=4)
    tokens = torch.randint(97, (1, 30), dtype=torch.int32)
    run(model, cache, tokens[:, :20], chunk=20)
    with watched(model) as spent:
        run(model, cache, tokens[:, 20:], chunk=1)
    assert spent.evictions == {0: 3, 1: 3}  # at positions 20, 24 and 28
    assert shares(Spent(0.0, 0.0, asked=spent.asked), [(0.0, 0.0)] * 10, cache)["hashing"] == 1


def test_a_shape_is_planned_like_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shape = Shape.of("smollm2-360m", dtype="auto", device="cpu", weights="int8", backend="auto")
    assert isinstance(shape.config, ModelConfig)
    assert shape.backend == "cpu"
    memory = shape.memory_plan(shape.plan(budget=64, context=256))
    assert memory.parts["weights"] == shape.weight_bytes()
    assert memory.parts["base"] > 0


def test_the_machine_has_a_name_and_knows_who_is_busy() -> None:
    assert cpu_name()
    others = Others()
    sum(range(1 << 20))
    cores = others.cores()
    assert cores is None or 0 <= cores <= (os.cpu_count() or 1) + 1
