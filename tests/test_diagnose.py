"""What `diagnose` and `hash_quality` say, against the same thing computed naively, one query and one key at a time."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from minillm import LLM, BudgetError, ConfigError, ContextFullError, PromptError
from minillm.cache import KVCache
from minillm.generate import feed
from minillm.lab.attention import last_queries
from minillm.lab.codes import (
    REFERENCES,
    VARIANTS,
    HashQuality,
    agreement,
    centred_ranks,
    correlation,
    hash_quality,
    percentile,
    quality_table,
)
from minillm.lab.compare import Contender
from minillm.lab.diagnose import Diagnosis, average, diagnose, table
from minillm.lab.verify import full_plan, verify
from minillm.lsh import projection
from minillm.slots import LayerCache

from .conftest import ROOT
from .helpers import make_cache
from .test_verify import Largest, Recording, double, text_of
from .tiny_checkpoint import write_checkpoint

LABELS = ("window", "random", "exact", "hashevict", "hashevict,hash_bits=64,evict_every=3", "h2o", "fastgen")
CONTENDERS = [Contender(label) for label in LABELS]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def llm(folder: Path) -> LLM:
    return double(folder)


@pytest.fixture(scope="module")
def diagnosis(llm: LLM) -> Diagnosis:
    return diagnose(llm, text_of(300), CONTENDERS, 40)


# --- contenders, against naive computation -------------------------------------------------------------------------


def kept_by(layer: LayerCache, head: int, now: int) -> set[int]:
    """The tokens that a query at `now` sees."""
    positions = layer.positions[0, head].tolist()
    seen = {p for p in positions if p >= 0 and (layer.window is None or p > now - layer.window)}
    return seen | {p for p in positions if 0 <= p < layer.retention.sinks and layer.far}


def outputs(weights: Tensor, values: Tensor, kept: set[int]) -> Tensor:
    """The G outputs [G, D] over the kept tokens, whose weights are made to add up to 1."""
    mask = torch.tensor([float(token in kept) for token in range(weights.shape[1])], dtype=weights.dtype)
    weights = weights * mask
    return weights / weights.sum(1, keepdim=True) @ values[: weights.shape[1]]


@torch.inference_mode()
def naive(llm: LLM, bounded: KVCache, tokens: Tensor, ends: list[int]) -> Tensor:
    """lost, least, error, error_of_best for each query at `ends`, layer and KV head: [queries, L, Hkv, 4]."""
    policy = Recording()
    full, found = replace(full_plan(llm.plan, len(tokens)), policy=policy).allocate(CPU), []
    sides = (feed(llm.model, cache, tokens[None, :-1], 1) for cache in (full, bounded))
    for now, _ in enumerate(zip(*sides, strict=True)):
        for index, layer in enumerate(bounded.layers if now in ends else ()):
            for head in range(2):
                weights, values = policy.weights[index][head], full.layers[index].values[0, head]  # [G, S'], [n, D]
                kept, mean = kept_by(layer, head, now), weights.mean(0).tolist()
                best = set(sorted(range(len(mean)), key=lambda token: -mean[token])[: len(kept)])
                whole = outputs(weights, values, set(range(len(mean))))
                errors = [(outputs(weights, values, which) - whole).norm() / whole.norm() for which in (kept, best)]
                missed = [sum(w for token, w in enumerate(mean) if token not in which) for which in (kept, best)]
                found.append([*missed, *map(float, errors)])
    return torch.tensor(found, dtype=torch.float64).view(len(ends), -1, 2, 4)


@pytest.mark.parametrize(
    ("config", "label"),
    [
        ({}, "hashevict"),
        ({}, "hashevict,hash_bits=64,evict_every=3,sinks=2"),
        ({}, "window,layer_budget=pyramid"),
        ({}, "exact,kv_dtype=int8"),
        ({"sliding_windows": (16, None)}, "random"),
        ({"max_position_embeddings": 60}, "keydiff"),
    ],
    ids=str,
)
def test_losses_equal_a_naive_computation(folder: Path, config: dict[str, Any], label: str) -> None:
    llm, tokens, ends = double(folder, config, budget=24), text_of(150), []
    found = diagnose(llm, tokens, [Contender(label)], 24, progress=lambda done, _: ends.append(done - 1))
    assert ends[-1] == 148
    ends = [end for end in ends if end >= 24]
    assert (found.start, found.queries) == (24, len(ends))
    assert 40 <= len(ends) <= 64
    for one in found.findings:
        who = Contender(one.label)
        bounded = llm.checkpoint.plan(budget=24, policy=who.policy, context=150, **who.options).allocate(CPU)
        wanted = naive(llm, bounded, tokens, ends).mean(0)  # [L, Hkv, 4]
        mine = torch.tensor([one.lost, one.least, one.error, one.error_of_best], dtype=torch.float64).permute(1, 2, 0)
        torch.testing.assert_close(mine, wanted, atol=1e-9, rtol=0)
        assert average(one.lost) > 0.01
        assert average(one.error) > 0.01


def test_next_tokens_are_those_of_verify(folder: Path, diagnosis: Diagnosis) -> None:
    for label, one in zip(LABELS, diagnosis.findings, strict=True):
        who = Contender(label)
        alone = verify(double(folder, budget=40, policy=who.policy, context=300, **who.options), text_of(300))
        assert alone.after_eviction is not None
        assert one.next_tokens.positions == alone.after_eviction.positions == 259
        for name in ("kl", "kl_worst", "agreement", "budget_nats_per_token", "full_nats_per_token"):
            assert getattr(one.next_tokens, name) == pytest.approx(getattr(alone.after_eviction, name), abs=1e-9)
        assert one.next_tokens.first_divergence == alone.after_eviction.first_divergence
        for heads, layer in zip(one.lost, one.next_tokens.lost_mass, strict=True):
            assert sum(heads) / 2 == pytest.approx(layer.mean, abs=1e-12)


def test_random_and_the_least_possible_frame_the_others(diagnosis: Diagnosis) -> None:
    assert [one.label for one in diagnosis.findings] == list(LABELS), "random was named already: not twice"
    for one in diagnosis.findings:
        for lost, least in zip(one.lost, one.least, strict=True):
            assert all(0 < low <= high < 1 for low, high in zip(least, lost, strict=True))
    won = {one.label: diagnosis.won(one) for one in diagnosis.findings}
    assert won["random"] == 0
    # Where weights are random, what queries like now says nothing about what they will like.
    assert all(one is not None and abs(one) < 0.2 for one in won.values())
    assert diagnosis.random.label == "random"


def test_a_trained_model_in_bfloat16_is_diagnosed() -> None:
    """Attention that was learnt can be foreseen: the measures tell good rules from random, and codes know it."""
    llm = LLM.load(str(ROOT / "weights" / "minillm-recall"), dtype="bfloat16")
    text = (ROOT / "minillm" / "lab" / "haystack.txt").read_text("utf-8")
    tokens = torch.tensor(llm.checkpoint.tokenizer.encode(text, bos=True))[:400]
    found = diagnose(llm, tokens, [Contender("exact"), Contender("window")], 48)
    exact, window, chance = found.findings
    assert chance.label == "random"
    assert found.won(exact) > 0.3  # type: ignore[operator]
    assert found.won(window) > 0.3  # type: ignore[operator]
    assert average(exact.error) < 0.8 * average(chance.error)
    cosine, *codes = hash_quality(llm, tokens, bits=(16, 64), seeds=(0,))[1:]
    assert average(cosine.correlation) > 0.9
    plain = [one for one in codes if one.variant == "plain"]
    assert 0.3 < average(plain[0].correlation) < average(plain[1].correlation) < average(cosine.correlation)
    assert 25 > average(plain[0].victim) > average(plain[1].victim) > average(cosine.victim)


@pytest.mark.parametrize("slots", [300, 400])
def test_nothing_is_lost_where_all_is_kept(llm: LLM, slots: int) -> None:
    found = diagnose(llm, text_of(300), [Contender("exact"), Contender("full")], slots)
    assert [one.label for one in found.findings] == ["exact", "full", "random"]
    assert found.start == 0
    for one in found.findings:
        assert [one.lost, one.least, one.error, one.error_of_best] == [[[0.0, 0.0]] * 2] * 4
        assert one.next_tokens.kl_worst < 1e-9
        assert one.next_tokens.agreement == 1
        assert found.won(one) is None
    assert "-" in next(line for line in table(found) if "full " in line).split()


def test_queries_stand_at_all_distances_from_an_eviction(llm: LLM) -> None:
    ends: list[int] = []
    diagnose(llm, text_of(500), [Contender("hashevict,evict_every=6")], 40, progress=lambda at, _: ends.append(at - 1))
    assert {(end - 40) % 6 for end in ends if end >= 40} == set(range(6))


def test_the_cache_of_the_llm_is_left_alone(folder: Path) -> None:
    llm = double(folder, budget=24)
    verify(llm, text_of(60))
    before = [tensor.clone() for layer in llm.cache.layers for tensor in layer.tensors().values()]
    owner, seen = llm.owner, list(llm.cache.seen)
    diagnose(llm, text_of(100), [Contender("hashevict")], 24)
    hash_quality(llm, text_of(100), bits=(16,), seeds=(0,))
    after = [tensor for layer in llm.cache.layers for tensor in layer.tensors().values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert (llm.owner, llm.cache.seen) == (owner, seen)


def test_the_table_and_the_json_say_the_same(diagnosis: Diagnosis) -> None:
    lines = list(table(diagnosis))
    assert max(map(len, lines)) < 120
    rows = [line for line in lines if line[:2].strip().isdigit()]
    assert len(rows) == len(LABELS)
    losses = [float(row.split()[2].rstrip("%")) for row in rows]
    assert losses == sorted(losses), "the best first"
    data = json.loads(json.dumps(diagnosis.to_dict()))
    assert (data["tokens"], data["slots"], data["start"]) == (300, 40, 40)
    for one in data["findings"]:
        row = next(row for row in rows if row.split()[1] == one["label"])
        assert f"{sum(map(sum, one['lost'])) / 4:.2%}" in row
        assert f"{one['next_tokens']['kl']:.4f}" in row
    assert sum(line.startswith("layer 1 KV head 1") for line in lines) == 2


@pytest.mark.parametrize(
    ("labels", "slots", "length", "error", "said"),
    [
        ([], 24, 150, ConfigError, "nothing to diagnose"),
        (["nonsense"], 24, 150, ConfigError, "unknown policy 'nonsense'"),
        (["hashevict,hash_bits"], 24, 150, ConfigError, "is not NAME=VALUE"),
        (["hashevict,rows=2"], 24, 150, ConfigError, "has no option rows"),
        (["hashevict,hash_bits=0"], 24, 150, ConfigError, "must lie in 1..1024, not 0"),
        (["hashevict"], 0, 150, BudgetError, "budget 0 is out of range"),
        (["hashevict,recent=30"], 24, 150, BudgetError, "do not fit into 24 slots"),
        (["full"], 24, 150, ContextFullError, "never evicts"),
        (["hashevict"], 24, 1, PromptError, "nothing to compare"),
    ],
)
def test_mistakes_are_named(llm: LLM, labels: list[str], slots: int, length: int, error: type, said: str) -> None:
    with pytest.raises(error, match=said):
        diagnose(llm, text_of(length), [Contender(label) for label in labels], slots)


# --- codes ---------------------------------------------------------------------------------------------------------


def test_rank_correlation_by_hand() -> None:
    a, b = torch.tensor([9.0, 1, 2, 3, 4, 5, -9]), torch.tensor([-9.0, 5, 6, 7, 8, 7, 9])
    among = torch.tensor([False, True, True, True, True, True, False])
    x, y = centred_ranks(a, among), centred_ranks(b, among)
    assert x.tolist() == [0, -2, -1, 0, 1, 2, 0]
    assert y.tolist() == [0, -2, -1, 0.5, 2, 0.5, 0]  # ranks 1, 2, 3.5, 5, 3.5
    assert float(correlation(x, y)) == pytest.approx(8 / (10 * 9.5) ** 0.5)
    assert float(correlation(x, -x)) == pytest.approx(-1)
    assert float(correlation(x, centred_ranks(torch.zeros(7), among))) == 0, "all tie: nothing is known"


def test_percentiles_by_hand() -> None:
    truth, among = torch.tensor([-5.0, 1, 2, 3, 3, 4]), torch.tensor([False, True, True, True, True, True])
    found = [float(percentile(torch.tensor([at]), truth, among)) for at in range(1, 6)]
    assert found == [0, 25, 62.5, 62.5, 100]


def test_many_bits_approach_the_cosine_and_random_codes_know_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(1, 200, 1, 16, generator=generator)  # [Hkv, m, G, D]
    keys, among = torch.randn(1, 400, 16, generator=generator), torch.ones(1, 200, 400, dtype=torch.bool)
    unit = torch.nn.functional.normalize
    cosines = unit(queries[:, :, 0], dim=2) @ unit(keys, dim=2).transpose(1, 2)  # [Hkv, m, n]

    def quality(scores: Tensor) -> tuple[float, float]:
        victims = scores.argmin(-1, keepdim=True)
        alike = correlation(centred_ranks(scores, among), centred_ranks(cosines, among))
        return float(alike.mean()), float(percentile(victims, cosines, among).mean())

    found = [quality(agreement(queries, keys, projection(bits, 16, seed=0, layer=0))) for bits in (4, 16, 64, 1024)]
    assert found == sorted(found, key=lambda pair: pair[0])
    assert found == sorted(found, key=lambda pair: -pair[1])
    assert found[-1][0] > 0.98
    assert found[-1][1] < 1
    assert found[0][0] < 0.5
    assert quality(cosines) == (pytest.approx(1), 0)
    noise = quality(torch.rand(1, 200, 400, generator=generator))
    assert abs(noise[0]) < 0.02
    assert abs(noise[1] - 50) < 3 * 100 / 12**0.5 / 200**0.5  # three standard errors of a uniform victim


def ranks(values: list[float]) -> list[float]:
    return [sum(b < a for b in values) + (sum(b == a for b in values) + 1) / 2 for a in values]


def spearman(a: list[float], b: list[float]) -> float:
    x, y = (torch.tensor(ranks(one), dtype=torch.float64) for one in (a, b))
    return float(torch.corrcoef(torch.stack((x, y)))[0, 1])


@pytest.mark.parametrize("variant", VARIANTS)
@torch.inference_mode()
def test_quality_equals_that_of_the_policys_own_scores(llm: LLM, variant: str) -> None:
    """The scores of the policy itself, in a cache that keeps everything, ranked in plain Python."""
    tokens, found = text_of(100), []
    cache = make_cache(llm.model, "hashevict", 100, sinks=4, hash_bits=24, policy_seed=3, **VARIANTS[variant])
    with last_queries(llm.model, cache) as queries:
        for _ in feed(llm.model, cache, tokens[None], 2):
            now = cache.seen[0] - 1
            if now < 36:
                continue
            for layer in cache.layers:
                if now >= 64:
                    layer.policy.settle_(layer, torch.tensor([True]))
                found.append((now, layer.index, queries[layer.index][0]))
    wanted: dict[tuple[int, int], list[list[float]]] = {}
    for now, index, query in found:
        layer = cache.layers[index]
        layer.policy.settle_(layer, torch.tensor([True]))
        scores = layer.policy.score(layer, query[None], layer.keys[:, :, 0], torch.tensor([now]))[0]  # [Hkv, S]
        for head in range(2):
            group = query.unflatten(0, (2, -1))[head]  # [G, D]
            keys = [layer.keys[0, head, at] for at in range(4, now)]
            dots = [float((group @ key).mean()) for key in keys]
            cosines = [float(torch.cosine_similarity(group, key[None]).mean()) for key in keys]
            mine = scores[head, 4:now].tolist()
            victim, count = mine.index(min(mine)), len(keys) - 1
            lower = [100 * sum(other < one[victim] for other in one) / count for one in (dots, cosines)]
            row = [spearman(mine, dots), spearman(mine, cosines), *lower]
            wanted.setdefault((index, head), []).append(row)
    quality = next(one for one in hash_quality(llm, tokens, bits=(24,), seeds=(3,)) if one.variant == variant)
    parts = (quality.correlation, quality.correlation_cosine, quality.victim, quality.victim_cosine)
    for (index, head), rows in wanted.items():
        assert len(rows) == 32
        means = torch.tensor(rows, dtype=torch.float64).mean(0).tolist()
        assert [part[index][head] for part in parts] == pytest.approx(means, abs=1e-5)


@pytest.fixture(scope="module")
def qualities(llm: LLM) -> dict[tuple[str, int], HashQuality]:
    found = hash_quality(llm, text_of(300), bits=(4, 64, 1024), seeds=(0, 1))
    return {(one.variant, one.bits): one for one in found}


def test_references_are_perfect_or_blind(qualities: dict[tuple[str, int], HashQuality]) -> None:
    products, cosine, noise = (qualities[name, 0] for name in REFERENCES)
    for heads, value in (
        (products.correlation, 1),
        (products.victim, 0),
        (cosine.correlation_cosine, 1),
        (cosine.victim_cosine, 0),
    ):
        assert [one for row in heads for one in row] == pytest.approx([value] * 4, abs=1e-6)
    assert 0.5 < average(cosine.correlation) < 1
    assert 0 < average(cosine.victim) < 10
    assert abs(average(noise.correlation)) < 0.02
    assert abs(average(noise.victim) - 50) < 8
    assert products.seeds == []


def test_longer_codes_rank_better(qualities: dict[tuple[str, int], HashQuality]) -> None:
    for variant in VARIANTS:
        few, some, many = (qualities[variant, bits] for bits in (4, 64, 1024))
        assert average(few.correlation) < average(some.correlation) < average(many.correlation)
        assert average(few.victim) > average(some.victim) > average(many.victim)
        assert few.seeds == [0, 1]
        assert sum(few.by_seed) / 2 == pytest.approx(average(few.correlation))
        assert few.by_seed[0] != few.by_seed[1]
    assert average(qualities["plain", 1024].correlation_cosine) > 0.97
    # Centred and with lengths, codes estimate q . (k - mean), which ranks as q . k does; but angles, not cosines, are
    # what distances are proportional to, and sums of one over the group rank a little otherwise than of the other.
    assert average(qualities["centred, norms", 1024].correlation) > 0.95


def test_the_lines_of_hash_quality(qualities: dict[tuple[str, int], HashQuality]) -> None:
    found = list(qualities.values())
    lines = list(quality_table(found))
    assert max(map(len, lines)) < 120
    assert len(lines) == 1 + len(found) + 2
    for one, line in zip(found, lines[1:], strict=False):
        assert line.startswith(one.variant)
        assert f"{average(one.correlation):.3f}" in line
        assert json.loads(json.dumps(one.to_dict()))["bits"] == one.bits


def test_no_matrix_of_queries_by_tokens(folder: Path) -> None:
    length = 900
    llm = double(folder, {"max_position_embeddings": 1024})
    with Largest() as largest:
        diagnose(llm, text_of(length), [Contender("hashevict")], 64)
        hash_quality(llm, text_of(length), bits=(16,), seeds=(0,))
    print(f"largest tensor: {largest.elements:,} elements; text x text {length * length:,}")
    assert largest.elements < length * length / 4


@pytest.mark.parametrize(
    ("length", "options", "error", "said"),
    [
        (36, {}, PromptError, "leaves too few keys to rank: give more than 36"),
        (100, {"seeds": ()}, ConfigError, "at least one seed"),
        (100, {"bits": (0,)}, ConfigError, "must lie in 1..1024, not 0"),
        (100, {"bits": (2000,)}, ConfigError, "must lie in 1..1024, not 2000"),
    ],
)
def test_mistakes_about_codes_are_named(llm: LLM, length: int, options: dict[str, Any], error: type, said: str) -> None:
    with pytest.raises(error, match=said):
        hash_quality(llm, text_of(length), **options)
