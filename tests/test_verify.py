"""What `verify` says a budget costs, against the same thing computed naively, one token at a time."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from minillm import BudgetError, ContextFullError, PromptError
from minillm.answer import LOGIT_ROWS
from minillm.cache import KVCache
from minillm.checkpoint import Checkpoint
from minillm.cli.main import main
from minillm.generate import feed
from minillm.lab.verify import full_plan, verify
from minillm.llm import LLM
from minillm.model import Attention
from minillm.policies.full import Full
from minillm.slots import LayerCache

from .helpers import run, tiny_model
from .tiny_checkpoint import write_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("models") / "tiny")


def double(folder: Path, config: dict[str, Any] | None = None, **options: Any) -> LLM:
    """A tiny model in float64, with `config` changed and the cache's `options`."""
    checkpoint = Checkpoint.open(str(folder))
    checkpoint = replace(checkpoint, dtype=torch.float64, config=replace(checkpoint.config, **(config or {})))
    return LLM(checkpoint, tiny_model(checkpoint.config, torch.float64), checkpoint.plan(**options), chunk=16)


def text_of(length: int, vocabulary: int = 290) -> Tensor:
    return torch.randint(vocabulary, (length,), generator=torch.Generator().manual_seed(1))


# --- against naive computation -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recording(Full):
    """The full cache, noting the attention weights that the backend itself computed."""

    needs_attention = True
    weights: dict[int, Tensor] = field(default_factory=dict)  # of the latest query, per layer: [Hkv, G, S']

    def observe_attention_(self, layer: LayerCache, weights: Tensor, positions: Tensor) -> None:  # noqa: ARG002
        self.weights[layer.index] = weights[0, :, :, -1]


@torch.inference_mode()
def naive_losses(llm: LLM, full: KVCache, tokens: Tensor, ends: list[int]) -> list[list[list[tuple[float, float]]]]:
    """(lost, least possible) for each query at `ends`, layer and KV head, in plain Python."""
    bounded, found = llm.plan.allocate(torch.device("cpu")), []
    policy = full.policy
    assert isinstance(policy, Recording)
    sides = (feed(llm.model, cache, tokens[None, :-1], 1) for cache in (full, bounded))
    for now, _ in enumerate(zip(*sides, strict=True)):
        if now not in ends:
            continue
        found.append([])
        for index, layer in enumerate(bounded.layers):
            found[-1].append([])
            for head, positions in enumerate(layer.positions[0].tolist()):
                sees = {p for p in positions if p >= 0 and (layer.window is None or p > now - layer.window)}
                sees |= {p for p in positions if 0 <= p < layer.retention.sinks and layer.far}
                group = policy.weights[index][head].mean(0).tolist()  # the weight of each token up to now
                lost = sum(weight for token, weight in enumerate(group) if token not in sees)
                found[-1][-1].append((lost, sum(sorted(group, reverse=True)[len(sees) :])))
    return found


@pytest.mark.parametrize(
    ("config", "options"),
    [
        ({}, {"budget": 24}),
        ({}, {"budget": 24, "policy": "window", "sinks": 2}),
        ({}, {"budget": 24, "kv_dtype": "int8"}),
        ({}, {"budget": 40, "layer_budget": "3,1", "evict_every": 3}),
        ({"sliding_windows": (16, None)}, {"budget": 24}),
        ({"max_position_embeddings": 60}, {"budget": 40, "positions": "window", "sinks": 3}),
        ({"max_position_embeddings": 60}, {"budget": 24, "positions": "absolute"}),
    ],
    ids=str,
)
def test_everything_equals_a_naive_computation(folder: Path, config: dict[str, Any], options: dict[str, Any]) -> None:
    llm, tokens, ends = double(folder, config, **options), text_of(150), []
    found = verify(llm, tokens, progress=lambda done, total: ends.append(done - 1))  # noqa: ARG005
    assert ends[-1] == 148
    assert len(ends) >= 32

    plan = replace(full_plan(llm.plan, 150), policy=Recording())
    full = plan.allocate(torch.device("cpu"))
    losses = naive_losses(llm, full, tokens, ends)
    full.reset()
    p, q = (
        run(llm.model, cache, tokens[None, :-1], 1)[0, :, : llm.real_vocab].log_softmax(-1)
        for cache in (full, llm.plan.allocate(torch.device("cpu")))
    )
    first = llm.plan.retention.slots
    assert found.after_eviction is not None
    for part, start in ((found.overall, 0), (found.after_eviction, first)):
        rows = zip(p.tolist(), q.tolist(), strict=True)
        kl = [sum(math.exp(a) * (a - b) for a, b in zip(*row, strict=True)) for row in rows]
        assert part.positions == 149 - start
        assert part.kl == pytest.approx(sum(kl[start:]) / len(kl[start:]), abs=1e-9)
        assert part.kl_worst == pytest.approx(max(kl[start:]), abs=1e-9)
        assert kl[part.kl_worst_position] == pytest.approx(part.kl_worst, abs=1e-9)
        for logs, nats in ((p, part.full_nats_per_token), (q, part.budget_nats_per_token)):
            came = [-float(row[token]) for row, token in zip(logs, tokens[1:].tolist(), strict=True)][start:]
            assert nats == pytest.approx(sum(came) / len(came), abs=1e-9)
        differ = [at for at in range(start, 149) if p[at].argmax() != q[at].argmax()]
        assert part.agreement == pytest.approx(1 - len(differ) / part.positions)
        assert part.first_divergence is not None
        assert part.first_divergence.position == differ[0]
        words = part.first_divergence.full, part.first_divergence.budget, part.first_divergence.text
        ids = int(p[differ[0]].argmax()), int(q[differ[0]].argmax()), int(tokens[differ[0] + 1])
        tokenizer = llm.checkpoint.tokenizer
        assert words == tuple(tokenizer.decode([i]) or tokenizer.piece(i) for i in ids)

        chosen = [loss for end, loss in zip(ends, losses, strict=True) if end >= start]
        assert part.queries == len(chosen)
        for layer, mass in enumerate(part.lost_mass):
            heads = [[loss[layer][head] for loss in chosen] for head in range(2)]
            lost = [sum(one for one, _ in head) / len(head) for head in heads]
            least = [sum(one for _, one in head) / len(head) for head in heads]
            assert mass.mean == pytest.approx(sum(lost) / 2, abs=1e-9)
            assert (mass.lowest, mass.highest) == pytest.approx((min(lost), max(lost)), abs=1e-9)
            assert mass.ideal == pytest.approx(sum(least) / 2, abs=1e-9)
            assert mass.mean >= mass.ideal - 1e-9
    assert any(mass.mean > 0.01 for mass in found.overall.lost_mass)
    assert found.full_bytes == full.nbytes
    assert found.budget_bytes == llm.cache.nbytes
    assert found.saved == pytest.approx(1 - llm.cache.nbytes / full.nbytes)
    assert found.usage.seen_tokens == 149


@pytest.mark.parametrize(
    ("config", "options"),
    [
        ({}, {"budget": 150}),
        ({}, {"budget": 200, "policy": "window"}),
        ({"max_position_embeddings": 60}, {"budget": 150, "positions": "window"}),
        ({"max_position_embeddings": 60}, {"budget": 150, "positions": "absolute"}),
    ],
    ids=str,
)
def test_a_budget_that_holds_everything_costs_nothing(
    folder: Path, config: dict[str, Any], options: dict[str, Any]
) -> None:
    found = verify(double(folder, config, **options), text_of(150))
    assert found.after_eviction is None
    assert found.overall.agreement == 1
    assert found.overall.first_divergence is None
    assert found.overall.kl_worst < 1e-9
    assert found.overall.full_nats_per_token == pytest.approx(found.overall.budget_nats_per_token, abs=1e-9)
    assert [(mass.highest, mass.ideal) for mass in found.overall.lost_mass] == [(0, 0)] * 2


def test_eight_bits_alone_lose_no_attention_but_a_little_precision(folder: Path) -> None:
    llm = double(folder, kv_dtype="int8")
    found = verify(llm, text_of(150))
    assert found.after_eviction is None
    assert 1e-9 < found.overall.kl < 0.01
    assert found.overall.agreement > 0.9
    assert [mass.highest for mass in found.overall.lost_mass] == [0, 0]


def test_the_text_may_be_verified_twice_and_chunks_change_only_the_sampled_queries(folder: Path) -> None:
    llm, tokens = double(folder, budget=24), text_of(150)
    first = verify(llm, tokens)
    assert verify(llm, tokens) == first
    finer = verify(LLM(llm.checkpoint, llm.model, llm.plan, chunk=1), tokens).overall
    assert finer.queries == 149
    assert finer.kl == pytest.approx(first.overall.kl, abs=1e-9)
    assert finer.first_divergence == first.overall.first_divergence


# --- manners -------------------------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """Notes the most elements that any operation gave back."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_no_tensor_grows_with_the_text_but_the_full_cache(folder: Path) -> None:
    vocabulary, length = 4000, 600
    llm = double(folder, {"vocab_size": vocabulary, "max_position_embeddings": 1024}, budget=32)
    with Largest() as largest:
        verify(llm, text_of(length))
    print(f"largest tensor: {largest.elements:,} elements; text x vocabulary {length * vocabulary:,}")
    assert largest.elements <= LOGIT_ROWS * vocabulary < length * vocabulary / 10
    assert largest.elements < length * length, "no matrix of queries by tokens"


def test_attention_is_left_as_it_was_whatever_happens(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = double(folder, budget=24)
    attentions = [module for module in llm.model.modules() if isinstance(module, Attention)]
    before = [attention.attend for attention in attentions]

    def fail(*_: object) -> None:
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        verify(llm, text_of(150), progress=fail)
    assert [attention.attend for attention in attentions] == before
    monkeypatch.setattr(llm.model.model.layers[1].mlp, "forward", fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        verify(llm, text_of(150))
    assert [attention.attend for attention in attentions] == before


def test_what_cannot_be_compared_is_refused(folder: Path) -> None:
    with pytest.raises(PromptError, match="nothing to compare"):
        verify(double(folder, budget=24), text_of(1))
    with pytest.raises(BudgetError, match="both caches would keep everything"):
        verify(double(folder), text_of(150))
    with pytest.raises(ContextFullError, match="never evicts"):
        verify(double(folder, budget=24, policy="full"), text_of(150))


# --- the command ---------------------------------------------------------------------------------------------------


@pytest.fixture
def stories(shared_data: Path) -> list[str]:
    """The arguments that name a model and a text."""
    return [str(shared_data / "models" / "stories260K"), "--file", str(shared_data / "text" / "tinystories.txt")]


def test_the_command_in_a_process_of_its_own(stories: list[str]) -> None:
    command = [sys.executable, "-m", "minillm", "verify", *stories, "--tokens", "300", "--budget", "0.2"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "all 299 positions" in done.stdout
    assert "from the first eviction (token 60) on" in done.stdout
    assert [line.split()[:2] for line in done.stdout.splitlines() if line.startswith("  layer")] == [
        ["layer", str(index)] for index in range(5)
    ]
    assert "only the first 300 tokens of the text are taken" in done.stderr
    assert "beside it the full cache of 300 tokens" in done.stderr
    assert "minillm: seen 299, kept" in done.stderr
    as_json = subprocess.run([*command, "--json"], capture_output=True, text=True, check=True)
    found = json.loads(as_json.stdout)
    assert as_json.stdout.count("\n") == 1
    assert found["tokens"] == 300
    assert found["cache"]["slots"] == 60
    assert found["after_eviction"]["start"] == 60
    assert f"{found['overall']['kl']:.5f}" in done.stdout
    assert 0.5 < found["saved"] < 1
    assert all(0 < mass["mean"] < 1 for mass in found["after_eviction"]["lost_mass"])


@pytest.mark.parametrize("options", [("--budget", "64"), ("--kv-dtype", "int8")])
def test_nats_are_those_of_score(
    options: tuple[str, ...], stories: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    model, *file = stories
    assert main(["verify", *stories, "--tokens", "400", *options, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["overall"]
    for name, cache in (("budget", options), ("full", ())):
        rows = ["--context", "399", "--rows", "1", "--json"]
        assert main(["score", "--model", model, *file, *rows, *cache]) == 0
        score = json.loads(capsys.readouterr().out)
        assert found[f"{name}_nats_per_token"] == pytest.approx(score["nats_per_token"], abs=1e-5)
        assert found[f"{name}_perplexity"] == pytest.approx(score["perplexity"], abs=1e-3)


@pytest.fixture
def refused(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run `verify` on a file of `text`, which must fail: the one line of its error."""

    def call(text: str, *argv: str) -> str:
        (tmp_path / "text.txt").write_text(text)
        assert main(["verify", str(folder), "--file", str(tmp_path / "text.txt"), *argv]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        return err.splitlines()[-1]

    return call


def test_mistakes_are_one_line(refused: Callable[..., str], folder: Path) -> None:
    long = "the dog sat on the mat " * 200  # more than 512 tokens
    assert "there is nothing to compare" in refused("the dog")
    assert "a text of 1 tokens has nothing to compare" in refused("", "--budget", "4")
    assert "two models were named" in refused("the dog", "--model", str(folder), "--budget", "4")
    wanted = "longer than the 512 tokens that"
    answer = refused(long, "--budget", "40")
    assert wanted in answer
    assert "take only its first ones with --tokens 512, or slide over all of it with --positions window" in answer
    assert wanted in refused(long, "--budget", "40", "--tokens", "600")
    answer = refused(long, "--budget", "40", "--context", "600")
    assert "longer than the 600 tokens of --context" in answer
    assert "--tokens 600, or raise --context" in answer


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--positions", "window"), "the full cache sees a sliding window"),
        (("--context", "5000", "--positions", "absolute"), "the full cache is no yardstick"),
    ],
)
def test_beyond_the_trained_length_only_when_asked_and_never_silently(
    options: tuple[str, ...], said: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text("the dog sat on the mat " * 120)
    file = ["--file", str(tmp_path / "text.txt"), "--budget", "40", "--json"]
    assert main(["verify", str(folder), *file, *options]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["tokens"] > 512
    assert said in err
