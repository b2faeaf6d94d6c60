"""How well do hash codes of keys know attention?  No cache and no eviction: only real queries and real keys.

For sampled queries, all earlier keys are ranked by their codes, as HashEvict would rank them, and by what the query
truly thinks of them.  Two questions: how alike are the rankings, and how bad a choice is the key that the codes would
evict first?  The true cosine and the true q . k, in place of the codes, say what infinitely many bits could reach.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import pstdev
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from .. import lsh
from ..answer import Progress
from ..errors import ConfigError, PromptError
from ..generate import feed
from ..llm import LLM
from ..policies.hashevict import CENTRE_KEYS, HashEvict
from ..slots import LayerCache
from .attention import last_queries
from .diagnose import QUERIES, Heads, average
from .verify import full_plan

BITS = (4, 8, 16, 24, 32, 64, 128)
FEWEST_KEYS = 32  # a ranking of fewer says little
VARIANTS: Mapping[str, Mapping[str, bool]] = {
    "plain": {},
    "orthogonal": {"orthogonal": True},
    "centred": {"centred": True},
    "centred, norms": {"centred": True, "norm_weighted": True},
}
REFERENCES = ("q . k", "cosine", "random")


@dataclass(frozen=True)
class HashQuality:
    """How codes of so many bits rank keys: means over the sampled queries and seeds, for each layer and KV head.

    bits: 0 for the references, which need none.  correlation: Spearman's, with the true q . k (mean over the group);
    correlation_cosine: with the true cosine (likewise).  victim, victim_cosine: at which percentile of the true q . k,
    and of the true cosine, the key stands that would be evicted first: 0 = truly the lowest, 50 = as good as random.
    by_seed: the mean correlation of each seed.
    """

    variant: str
    bits: int
    seeds: list[int]
    correlation: Heads
    correlation_cosine: Heads
    victim: Heads
    victim_cosine: Heads
    by_seed: list[float]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@torch.inference_mode()
def hash_quality(
    llm: LLM,
    tokens: Tensor,
    *,
    bits: Sequence[int] = BITS,
    seeds: Sequence[int] = (0, 1, 2),
    progress: Progress | None = None,
) -> list[HashQuality]:
    """The references, then every variant at every code length, on token ids [n].  `llm` lends its model alone.

    Sinks are no candidates, nor is what lies outside a sliding window.  Memory: the full cache, and a few matrices of
    QUERIES by n for each KV head of one layer.  Raises PromptError for a text that is too short, ConfigError for code
    lengths out of range, or no seed.
    """
    if not seeds:
        raise ConfigError("hash_quality needs at least one seed, such as seeds=(0,)")
    rules = {
        (name, size): [HashEvict(hash_bits=size, policy_seed=seed, **options) for seed in seeds]
        for name, options in VARIANTS.items()
        for size in bits
    }
    full = full_plan(llm.plan, len(tokens)).allocate(llm.checkpoint.device)
    sinks = full.layers[0].retention.sinks
    if len(tokens) <= sinks + FEWEST_KEYS:
        raise PromptError(
            f"a text of {len(tokens)} tokens leaves too few keys to rank: give more than {sinks + FEWEST_KEYS}"
        )
    asked: list[dict[int, Tensor]] = []
    ends: list[int] = []
    with last_queries(llm.model, full) as queries:
        for _ in feed(llm.model, full, tokens[None], -(-len(tokens) // QUERIES)):
            llm.check_memory()
            if full.seen[0] > sinks + FEWEST_KEYS:
                ends.append(full.seen[0] - 1)
                asked.append({index: own for index, (own, _) in queries.items()})
    measures: dict[tuple[str, int], list[Tensor]] = {key: [] for key in (*((name, 0) for name in REFERENCES), *rules)}
    for layer in full.layers:
        judge = _Judge(
            layer,
            torch.stack([one[layer.index] for one in asked]),  # [m, H, D]
            torch.tensor(ends, device=llm.checkpoint.device),
        )
        for name, scores in zip(REFERENCES, (judge.products, judge.cosines, judge.noise), strict=True):
            measures[name, 0].append(judge.measure(scores)[None])  # [1, 4, Hkv]
        for key, by_seed in rules.items():
            rows = [rule.constants(llm.checkpoint.config, layer.index)["projection"] for rule in by_seed]
            scored = [judge.liking(rule, one.to(judge.keys.device)) for rule, one in zip(by_seed, rows, strict=True)]
            measures[key].append(torch.stack([judge.measure(scores) for scores in scored]))  # [seeds, 4, Hkv]
        if progress is not None:
            progress(layer.index + 1, len(full.layers))
    return [_quality(*key, list(seeds) if key[1] else [], torch.stack(found, 1)) for key, found in measures.items()]


def _quality(variant: str, bits: int, seeds: list[int], found: Tensor) -> HashQuality:
    """found [seeds, L, 4, Hkv]."""
    by_seed = found[:, :, 0].mean((1, 2)).tolist()  # [seeds]
    correlation, cosine, victim, victim_cosine = found.mean(0).transpose(0, 1).tolist()  # [L, Hkv] each
    return HashQuality(variant, bits, seeds, correlation, cosine, victim, victim_cosine, by_seed)


class _Judge:
    """One layer's sampled queries [m, H, D] at positions [m], its n keys, and what they truly think of each other.

    Scores are [Hkv, m, n]; `among` [Hkv, m, n] says which keys a query has to choose from.
    """

    def __init__(self, layer: LayerCache, queries: Tensor, positions: Tensor) -> None:
        keys, sinks = layer.keys[0].to(queries.dtype), layer.retention.sinks  # [Hkv, n, D]
        self.keys, self.queries = keys, queries.unflatten(1, (len(keys), -1)).transpose(0, 1)  # [Hkv, m, G, D]
        first = keys[:, sinks:CENTRE_KEYS]  # as the policy freezes it
        self.centre = (first if first.shape[1] else keys).mean(1, keepdim=True)  # [Hkv, 1, D]
        at = torch.arange(keys.shape[1], device=keys.device)  # [n]
        earlier = (at >= sinks) & (at < positions[:, None])  # [m, n]
        self.among = layer.can_see(positions[None])[0] & earlier  # [Hkv, m, n]
        self.products = self.queries.mean(2) @ keys.transpose(1, 2) * keys.shape[2] ** -0.5  # [Hkv, m, n]
        directions = normalize(self.queries, dim=3).mean(2)  # [Hkv, m, D]
        self.cosines = directions @ normalize(keys, dim=2).transpose(1, 2)  # [Hkv, m, n]
        self.noise = torch.rand(self.among.shape, generator=torch.Generator().manual_seed(layer.index)).to(keys)
        self._truths = [centred_ranks(truth, self.among) for truth in (self.products, self.cosines)]

    def measure(self, scores: Tensor) -> Tensor:
        """Means over the queries of both correlations, and of both percentiles of the first key to go: [4, Hkv]."""
        ranks = centred_ranks(scores, self.among)
        victims = scores.masked_fill(~self.among, torch.inf).argmin(-1, keepdim=True)  # [Hkv, m, 1]; ties: the oldest
        found = [correlation(ranks, truth) for truth in self._truths]
        found += [percentile(victims, truth, self.among) for truth in (self.products, self.cosines)]
        return torch.stack(found).to("cpu", torch.float64).mean(-1)  # [4, Hkv, m] -> [4, Hkv]

    def liking(self, rule: HashEvict, rows: Tensor) -> Tensor:
        """The scores of a policy with projection `rows` [1, P, D]: [Hkv, m, n]."""
        keys = self.keys - self.centre if rule.centred else self.keys  # [Hkv, n, D]
        found = agreement(self.queries, keys, rows)
        return found * keys.norm(dim=2).to(torch.bfloat16).to(found).unsqueeze(1) if rule.norm_weighted else found


def agreement(queries: Tensor, keys: Tensor, rows: Tensor) -> Tensor:
    """P - 2 Hamming between codes of queries [Hkv, m, G, D] and keys [Hkv, n, D], summed over G: [Hkv, m, n].

    That is the dot product of codes read as +1 and -1.  rows: the projection [1, P, D].
    """
    asking, asked = (lsh.unpack(lsh.encode(x, rows), rows.shape[1]).to(torch.float32) * 2 - 1 for x in (queries, keys))
    return asking.sum(2) @ asked.transpose(1, 2)  # [Hkv, m, P] @ [Hkv, P, n]: sums of whole numbers, so exact


def centred_ranks(scores: Tensor, among: Tensor) -> Tensor:
    """Ranks of the scores [..., n] that are `among` the candidates, their mean taken off; 0 for the others.

    Ties share the mean of their ranks.  Example: 3, 5, 5, 9 have ranks 1, 2.5, 2.5, 4, so -1.5, 0, 0, 1.5.
    """
    scores = scores.masked_fill(~among, torch.inf)
    ordered = scores.sort(-1).values
    below = torch.searchsorted(ordered, scores, out_int32=True)  # how many are less
    up_to = torch.searchsorted(ordered, scores, out_int32=True, right=True)  # how many are not greater
    return (below + up_to - among.sum(-1, keepdim=True)) / 2 * among


def correlation(a: Tensor, b: Tensor) -> Tensor:
    """Spearman's rank correlation from centred ranks [..., n]: [...], -1 to 1; 0 where all of one tie."""
    lengths = a.norm(dim=-1) * b.norm(dim=-1)
    found: Tensor = (a * b).sum(-1) / lengths.clamp(min=torch.finfo(a.dtype).tiny)
    return found


def percentile(victims: Tensor, truth: Tensor, among: Tensor) -> Tensor:
    """Where the truth [..., n] ranks the candidate `victims` [..., 1] among the others: [...], 0 lowest, 100 highest.

    Half of those that tie with it count as lower, so that a random victim stands at 50 on average.
    """
    own = truth.gather(-1, victims)  # [..., 1]
    lower = ((truth < own) & among).sum(-1)
    tied = ((truth == own) & among).sum(-1) - 1
    found: Tensor = 100 * (lower + tied / 2) / (among.sum(-1) - 1).clamp(min=1)
    return found


def quality_table(found: Sequence[HashQuality]) -> Iterator[str]:
    """The lines that people read: means over layers and KV heads, the spread over heads and over seeds."""
    heads = ("corr q.k", "lowest", "highest", "+-seeds", "corr cos", "victim q.k", "victim cos")
    yield f"{'codes':<16}{'bits':>5}" + "".join(f"{head:>11}" for head in heads)
    for one in found:
        values = [value for row in one.correlation for value in row]
        cells = [f"{average(one.correlation):.3f}", f"{min(values):.3f}", f"{max(values):.3f}"]
        cells += [f"{pstdev(one.by_seed):.3f}" if len(one.seeds) > 1 else "-", f"{average(one.correlation_cosine):.3f}"]
        cells += [f"{average(one.victim):.1f}", f"{average(one.victim_cosine):.1f}"]
        yield f"{one.variant:<16}{one.bits or '-':>5}" + "".join(f"{cell:>11}" for cell in cells)
    yield "corr: Spearman, mean over KV heads, from the lowest head to the highest, deviation over seeds"
    yield "victim: percentile of the first key to go, 0 = truly the lowest, 50 = as good as random"
