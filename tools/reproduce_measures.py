"""What tools/reproduce.py measures without asking questions: codes, attention, speed; as lines, records and panels.

Nothing here prints or touches the disk.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, median
from typing import Any

import torch
from torch import Tensor

from minillm import LLM
from minillm.answer import Progress
from minillm.generate import feed
from minillm.lab import codes, diagnose
from minillm.lab.ask import reader
from minillm.lab.compare import POLICY_LIST, Contender
from minillm.lab.diagnose import average
from minillm.lab.plots import Panel, Point

DIAGNOSED = ("window", "keydiff", "exact", "tova", "h2o", "hashevict", "hashevict,hash_bits=64", "hashevict-plus")


@dataclass(frozen=True)
class Measured:
    """One experiment's result: for people, for a spreadsheet, whole, and as a picture."""

    lines: list[str]
    records: list[dict[str, Any]]
    whole: object
    panels: list[Panel]
    x_name: str
    logarithmic: bool = False


def hash_codes(llm: LLM, tokens: Tensor, bits: Sequence[int], seeds: Sequence[int], progress: Progress) -> Measured:
    """How well codes of each length rank real keys, and how bad a choice their victim is."""
    found = codes.hash_quality(llm, tokens, bits=bits, seeds=seeds, progress=progress)
    parts = ("correlation", "correlation_cosine", "victim", "victim_cosine")
    whole = [one.to_dict() for one in found]
    records = [
        {"variant": one["variant"], "bits": one["bits"], **{part: average(one[part]) for part in parts}}
        for one in whole
    ]

    def lines(part: str) -> dict[str, list[Point]]:
        of: dict[str, list[Point]] = {}
        for record in records:
            if record["bits"]:
                of.setdefault(record["variant"], []).append((record["bits"], record[part], 0.0))
        return of

    panels = [
        Panel("rank correlation with q . k", "Spearman", lines("correlation")),
        Panel("first key to go", "percentile of its q . k", lines("victim")),
    ]
    return Measured(list(codes.quality_table(found)), records, whole, panels, "hash bits", True)


def attention(llm: LLM, tokens: Tensor, slots: int, progress: Progress) -> Measured:
    """What each policy loses of the full cache's attention, output and predictions at so many slots."""
    found = diagnose.diagnose(llm, tokens, [Contender(label) for label in DIAGNOSED], slots, progress=progress)
    records = [
        {
            "policy": one.label,
            **{part: average(asdict(one)[part]) for part in ("lost", "least", "error", "error_of_best")},
            "won": found.won(one),
            "kl": one.next_tokens.kl,
            "agreement": one.next_tokens.agreement,
            "nats": one.next_tokens.budget_nats_per_token,
        }
        for one in found.findings
    ]

    def lines(part: str, best: str) -> dict[str, list[Point]]:
        of = {one.label: asdict(one)[part] for one in found.findings} | {"best": asdict(found.findings[0])[best]}
        return {label: [(layer, fmean(heads), 0.0) for layer, heads in enumerate(rows)] for label, rows in of.items()}

    panels = [
        Panel("attention lost", "share of the full cache's", lines("lost", "least")),
        Panel("output error", "||o' - o|| / ||o||", lines("error", "error_of_best")),
    ]
    return Measured(list(diagnose.table(found)), records, found.to_dict(), panels, "layer")


def speed(llm: LLM, tokens: Tensor, prompt: int, slots: Sequence[int], rounds: int, progress: Progress) -> Measured:
    """Prefill and decode of every policy at equal slots: in every round each takes its turn, so that a busy machine
    slows all of them alike; ratios are to `window` of the same round, and medians count.  `full` keeps everything."""
    labels, steps = ("full", *POLICY_LIST), len(tokens) - prompt
    lines: list[str] = []
    records: list[dict[str, Any]] = []
    done, total = 0, len(slots) * (rounds + 1) * len(labels)
    for count in slots:
        times: dict[str, list[tuple[float, float]]] = {label: [] for label in labels}
        for turn in range(rounds + 1):  # the first is a warm-up
            for label, mine in times.items():
                held = len(tokens) if label == "full" else count
                taken = _time(reader(llm, diagnose.plan_of(llm, Contender(label), held, len(tokens))), tokens, prompt)
                mine += [taken] if turn else []
                progress(done := done + 1, total)
        lines += ["", f"{count:,} slots, {prompt:,} tokens read and {steps} fed one by one; medians of {rounds} rounds"]
        lines += [f"  {'times window in brackets':<26}{'prefill tokens/s':>22}{'decode ms/token':>22}"]
        for label, mine in times.items():
            pairs = list(zip(mine, times["window"], strict=True))
            read, fed = (median(theirs[part] for theirs in mine) for part in (0, 1))
            faster = median(window[0] / theirs[0] for theirs, window in pairs)
            slower = median(theirs[1] / window[1] for theirs, window in pairs)
            records.append(
                {
                    "policy": label,
                    "slots": count,
                    "prefill_tokens_per_s": prompt / read,
                    "prefill_ratio": faster,
                    "decode_ms": 1000 * fed / steps,
                    "decode_ratio": slower,
                }
            )
            cells = (f"{prompt / read:,.0f} ({faster:.2f})", f"{1000 * fed / steps:.2f} ({slower:.2f})")
            lines.append(f"  {label:<26}" + "".join(f"{cell:>22}" for cell in cells))

    def drawn(part: str) -> dict[str, list[Point]]:
        return {
            label: [(one["slots"], one[part], 0.0) for one in records if one["policy"] == label] for label in labels
        }

    panels = [
        Panel("prefill", "tokens per second", drawn("prefill_tokens_per_s")),
        Panel("decode", "milliseconds per token", drawn("decode_ms")),
    ]
    return Measured(lines[1:], records, records, panels, "slots", True)


@torch.inference_mode()
def _time(llm: LLM, tokens: Tensor, prompt: int) -> tuple[float, float]:
    """Seconds to read a prompt, and to feed what follows it one token at a time, predicting each."""
    begun = time.perf_counter()
    for _, hidden in feed(llm.model, llm.cache, tokens[None, :prompt], llm.chunk):
        last = hidden
    llm.model.logits(last[:, -1])
    between = time.perf_counter()
    for token in tokens[prompt:]:
        for _, hidden in feed(llm.model, llm.cache, token[None, None], 1):
            llm.model.logits(hidden[:, -1])
    return between - begun, time.perf_counter() - between
