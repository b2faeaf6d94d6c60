"""Several processes compute what one does: the same logits, the same kept tokens, the same text, with their share."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from minillm.backends.linear import has_int8
from minillm.checkpoint import Checkpoint
from minillm.cli.main import main
from minillm.config import ModelConfig
from minillm.errors import ConfigError
from minillm.headers import stored_tensors
from minillm.inventory import weights_of
from minillm.policies import POLICIES
from minillm.quant import Scheme
from minillm.shard import Team, cut, require_groups

from . import rank_cases
from .every_policy import EVERY_POLICY
from .helpers import tiny_config
from .rank_cases import BIASED, KV_HEADS, WEIGHTS, everything
from .ranks import ROOT, finish, start

Found = dict[str, Any]
PATIENCE = 2  # seconds that processes wait for one that says nothing, where they run this instead of the command
HASTY = f"""
import sys
from contextlib import contextmanager
from datetime import timedelta
from torch.distributed import distributed_c10d
from minillm import parallel
from minillm.cli.main import main

@contextmanager
def hasty(patient=parallel.connected):
    with patient() as team:
        distributed_c10d._set_pg_timeout(timedelta(seconds={PATIENCE}))
        yield team

parallel.connected = hasty
sys.exit(main())
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("ranks")
    rank_cases.write(made)
    return made


@pytest.fixture(scope="module")
def alone(folder: Path) -> Found:
    """What one process finds."""
    return everything(folder, Team())


@pytest.fixture(scope="module", params=(2, 4))
def ranks(request: pytest.FixtureRequest, folder: Path) -> list[Found]:
    """What each of several finds."""
    count = request.param
    for status, _, errors in finish(start(count, "tests.rank_cases", str(folder), module=True), 90):
        assert status == 0, errors
    return [torch.load(folder / f"rank {rank} of {count}.pt", weights_only=False) for rank in range(count)]


@pytest.mark.parametrize("kv_heads", KV_HEADS)
def test_every_policy_computes_and_keeps_what_it_does_in_one_process(
    alone: Found, ranks: list[Found], kv_heads: int
) -> None:
    assert {entry.name for entry in EVERY_POLICY.values()} == set(POLICIES) - {"full"}
    copies = max(1, len(ranks) // kv_heads)
    for policy in EVERY_POLICY:
        case = f"{policy}, {kv_heads} KV heads"
        logits, kept = alone[case]
        for found in ranks:
            assert (found[case][0] - logits).abs().max() < 1e-12, case
        for layer, (row,) in enumerate(kept):
            of_rank = [found[case][1][layer][0] for found in ranks]  # [rank][head]
            assert [head for heads in of_rank[::copies] for head in heads] == row, case
            assert of_rank == [of_rank[rank // copies * copies] for rank in range(len(ranks))], case


def test_quantised_weights_are_cut_with_their_scales(alone: Found, ranks: list[Found]) -> None:
    """Stored ones, and groups of 32, mean the same numbers; a row's scale that is drawn from a part of it is finer, and
    activations that are rounded part by part are rounded otherwise."""
    exact = alone["wide as None"][0]
    names = [f"wide as {scheme}" for scheme in WEIGHTS] + ["int8 as int8-a16", "int4 as int4"]
    for name in (name + fused for name in names for fused in ("", ", fused")):
        logits, lost = alone[name][0], float((alone[name][0] - exact).abs().max())
        off = max(float((found[name][0] - logits).abs().max()) for found in ranks)
        print(f"{len(ranks)} ranks, {name}: {off:.1e} from one process, which is {lost:.1e} from float32")
        assert off < (1.5 * lost if name.startswith("wide as int8") else 2e-5), name


@pytest.mark.parametrize("case", BIASED)
def test_biases_of_sums_are_added_once(alone: Found, ranks: list[Found], case: str) -> None:
    """By every kind of linear layer; where rounding is coarse, both are as far from the same weights in float32."""
    source, dtype, weights, _ = BIASED[case]
    same_weights = {"biased": "float32", "biased-int8": "int8-a16", "biased-int4": "int4"}[source]
    one, exact = alone[f"biased, {case}"], alone[f"biased, {same_weights}"]
    lost, most = float((one - exact).abs().max()), float(one.abs().max())
    off = max(float((found[f"biased, {case}"] - one).abs().max()) for found in ranks)
    print(f"{len(ranks)} ranks, {case}: {off:.1e} from one process, {lost:.1e} from float32, logits up to {most:.1f}")
    rounds = dtype != "float32" or (weights == "int8" and has_int8())
    assert off < (2 * lost if rounds else 1e-5 * most)
    assert lost < 0.05 * most


def test_a_rank_reads_only_its_part_of_the_files(folder: Path, alone: Found, ranks: list[Found]) -> None:
    """Beside headers, and what is mapped: embedding and norms, whose pages come when they are asked for."""
    for source, name in {"wide": "wide as None, fused", "int4": "int4 as int4"}.items():
        stored = stored_tensors(folder / source)
        cuts = {"wide": ("_proj.weight",), "int4": ("_proj.codes", "_proj.scales")}[source]
        linear = {tensor: entry for tensor, entry in stored.items() if tensor.endswith(cuts)}
        for rank, found in enumerate(ranks):
            config, mine = Team(rank, len(ranks)).part_of(rank_cases.wide()), 0
            for tensor, entry in linear.items():
                part = cut(config, tensor, entry.shape)
                assert part is not None
                copies = len(ranks) // 2 if ".k_" in tensor or ".v_" in tensor else 1  # of a KV head
                assert entry.part(*part).nbytes == entry.nbytes * copies // len(ranks)
                mine += entry.part(*part).nbytes
            if source == "int4":  # the shared embedding is read to be quantised for the output, whole on every rank
                mine += stored["model.embed_tokens.weight"].nbytes
            print(f"{source}: rank {rank} of {len(ranks)} read {found[name][1]:,} bytes, of which tensors {mine:,}")
            assert mine < found[name][1] < mine + 8192
    assert alone["wide as None, fused"][1] > sum(entry.nbytes for entry in stored_tensors(folder / "wide").values()) / 2


def test_text_is_that_of_one_process(alone: Found, ranks: list[Found]) -> None:
    for found in ranks:
        for name in ("text2", "text4"):
            text, usage, held, planned = found[name]
            assert text == alone[name][0]
            assert usage == alone[name][1]
            assert held == planned == alone[name][2] / 2  # the demo has two KV heads
        assert abs(found["bfloat16"] - alone["bfloat16"]) < 0.02
        assert found["draws without a seed"] == ranks[0]["draws without a seed"]


def test_a_plan_is_of_one_rank() -> None:
    plans = {ranks: Checkpoint.open(team=Team(ranks=ranks), dtype="float32").plan(budget=64) for ranks in (1, 2, 4)}
    assert plans[1].nbytes == 2 * plans[2].nbytes  # 2 KV heads
    assert plans[4].nbytes == plans[2].nbytes  # and copies of them
    sizes = {ranks: weights_of(None, plan.config).nbytes(torch.float32) for ranks, plan in plans.items()}
    config = plans[1].config
    shared = 4 * config.vocab_size * config.hidden_size + 4 * config.hidden_size * (2 * config.num_hidden_layers + 1)
    assert sizes[2] - shared == (sizes[1] - shared) / 2


@pytest.mark.parametrize(
    ("changes", "ranks", "words"),
    [
        ({"num_attention_heads": 4}, 3, "4 query heads cannot be divided among 3 ranks: start 2 or 4 processes"),
        (
            {"num_attention_heads": 12, "num_key_value_heads": 4, "intermediate_size": 36},
            3,
            "4 KV heads can be neither divided among 3 ranks nor copied equally often: start 2 or 4 or 12 processes",
        ),
        ({"intermediate_size": 33}, 2, "33 feed-forward channels cannot be divided among 2 ranks: this model runs in"),
    ],
)
def test_shapes_that_cannot_be_divided_are_refused(changes: dict[str, int], ranks: int, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Team(0, ranks).part_of(tiny_config(**changes))


def test_groups_of_4_bits_are_not_split() -> None:
    config = tiny_config(head_dim=16, intermediate_size=64)
    for ranks, words in ((2, None), (4, "attention's output of 64 columns on 4 ranks gives each 16")):
        part = Team(0, ranks).part_of(config)
        require_groups(part, "int8")
        if words is None:
            require_groups(part, "int4")
        else:
            with pytest.raises(ConfigError, match=words):
                require_groups(part, "int4")
    require_groups(tiny_config(), "int4")
    assert Scheme("int4").bits("x", 48) == 8  # rows without groups are 8 bits in one process, too


def test_a_config_knows_its_part() -> None:
    config = tiny_config(num_attention_heads=8, num_key_value_heads=2)
    parts = [Team(rank, 4).part_of(config) for rank in range(4)]
    assert [part.first_kv_head for part in parts] == [0, 0, 1, 1]
    assert {part.num_attention_heads for part in parts} == {2}
    assert {part.query_group for part in parts} == {4}
    assert all(part.whole == config and replace(part, shard=None) != config for part in parts)
    assert config.whole is config
    assert "shard" not in config.to_hf()
    assert ModelConfig.from_hf(config.to_hf()) == replace(config, max_position_embeddings=512)


def test_the_command_line_prints_once_and_the_same() -> None:
    words = ["generate", "--budget", "48", "--max-tokens", "60", "--dtype", "float32"]
    words += ["--temperature", "0.9", "--seed", "3", "--json", "--memory", "400MiB"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    quiet = os.environ | {"OMP_NUM_THREADS": "1"}

    def answer(*command: str) -> tuple[dict[str, Any], str]:
        done = subprocess.run(
            [*command, "-m", "minillm", *words],
            input="Once upon a time",  # which one rank alone can read
            capture_output=True,
            text=True,
            check=True,
            cwd=ROOT,
            env=quiet,
        )
        assert done.stdout.count("\n") == 1
        return json.loads(done.stdout), done.stderr

    (one, _), (two, errors) = answer(sys.executable), answer(*launcher)
    for same in ("text", "token_ids", "usage", "seed", "finish_reason"):
        assert one[same] == two[same], same
    # Each rank has kept the promise, else there would be no answer.
    assert 2 * two["cache"]["bytes"] == one["cache"]["bytes"]
    assert two["memory"]["peak"] <= two["memory"]["planned"] < one["memory"]["planned"]
    assert errors.count("minillm: ") == 2
    assert "on each of 2 ranks" in errors


ENDLESS = ("generate", "Once", "--budget", "64", "--max-tokens", "1000000", "--ignore-eos")


def test_a_dead_rank_ends_the_others_with_one_message() -> None:
    processes = start(2, "minillm", *ENDLESS, module=True)
    assert processes[0].stdout is not None
    assert processes[0].stdout.read(40)  # it has begun to answer
    processes[1].kill()
    begin = time.monotonic()
    (status, _, errors), _ = finish(processes, 20)
    assert time.monotonic() - begin < 10
    assert status == 2
    assert errors.count("error: another process that computes this model is gone") == 1


def test_a_hung_rank_ends_the_others_with_one_message() -> None:
    """It is there and says nothing, not even who has spoken, for it is the one that keeps the store."""
    stopped, other = start(2, HASTY, *ENDLESS)
    try:
        assert stopped.stdout is not None
        assert stopped.stdout.read(40)  # it has begun to answer
        stopped.send_signal(signal.SIGSTOP)
        begin = time.monotonic()
        ((status, _, errors),) = finish([other], 30)
        assert time.monotonic() - begin > PATIENCE
    finally:
        stopped.kill()
        stopped.communicate()
    assert status == 2
    assert errors.count("error: another process that computes this model is gone or does not answer") == 1
    assert "Traceback" not in errors


def test_what_is_wrong_on_every_rank_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--ranks", "3"]) == 2
    assert "4 query heads cannot be divided among 3 ranks: start 2 or 4 processes" in capsys.readouterr().err
    for words, complaint in (
        (("chat",), "chat runs in one process, and 2 were started"),
        (("serve", "--sessions", "kept"), "--sessions saves the heads of one process"),
    ):
        done = finish(start(2, "minillm", *words, module=True))
        assert [status for status, _, _ in done] == [2, 2]
        assert sum(errors.count(f"minillm: error: {complaint}") for _, _, errors in done) == 1
