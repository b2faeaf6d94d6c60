"""A real trained model, against what transformers said of it (golden.json), and past the length it was trained on."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch

from minillm import LLM
from minillm.cli.score import encode_documents

from .helpers import kept_positions, make_cache, run


@pytest.fixture(scope="module")
def folder(shared_data: Path) -> str:
    return str(shared_data / "models" / "stories260K")


@pytest.fixture(scope="module")
def stories(shared_data: Path, folder: str) -> torch.Tensor:
    text = (shared_data / "text" / "tinystories.txt").read_text("utf-8")
    return encode_documents(LLM.load(folder).checkpoint.tokenizer, [text[:200_000]], "<|endoftext|>")


def test_greedy_equals_golden(shared_data: Path, folder: str) -> None:
    llm = LLM.load(folder)
    for case in json.loads((shared_data / "models" / "golden.json").read_text("utf-8"))["stories260K"]:
        result = llm.generate(case["prompt_ids"], max_tokens=256, ignore_eos=True, logprobs=5)
        assert result.token_ids == case["greedy_ids"]
        assert result.logprobs is not None
        assert [token for token, _ in result.logprobs[0].top] == [token for token, _ in case["first_step_top5"]]
        gaps = [score - case["first_step_top5"][0][1] for _, score in case["first_step_top5"]]
        assert [score - result.logprobs[0].top[0][1] for _, score in result.logprobs[0].top] == pytest.approx(
            gaps, abs=1e-4
        )
        if case["prompt"]:
            assert llm.encode(case["prompt"]).tolist() == case["prompt_ids"]
            assert case["text"] == case["prompt"] + result.text


@pytest.mark.parametrize("policy", ["window", "hashevict", "hashevict-key"])
def test_cutting_the_input_on_a_trained_model(folder: str, stories: torch.Tensor, policy: str) -> None:
    """float32: logits within 1e-5 of their size while the kept positions agree; the agreement is printed."""
    model = LLM.load(folder, dtype="float32").model
    tokens, rows = stories[: 6 * 400].view(6, 400), range(6)
    caches = [make_cache(model, policy, 64, rows=6) for _ in range(2)]
    ones, many = (run(model, cache, tokens, chunk) for cache, chunk in zip(caches, (1, 64), strict=True))  # [6, n, V]
    kept, others = ([[layer[row] for layer in kept_positions(cache)] for row in rows] for cache in caches)
    alike = [row for row in rows if kept[row] == others[row]]
    agree = len(alike)
    worst = max((float((ones[row] - many[row]).abs().max() / ones[row].abs().max()) for row in alike), default=0.0)
    print(f"{policy}: kept positions agree in {agree} of 6 rows, largest relative difference {worst:.1e}")
    assert agree > 0
    assert worst < 1e-5


@pytest.mark.slow
def test_past_the_trained_length_a_window_holds_where_extrapolation_breaks(folder: str, stories: torch.Tensor) -> None:
    """Rows of 3,072 tokens on a model trained on 512: nats per token by position.  Why "window" is the default."""
    rows = stories[: 2 * 3072].view(2, 3072)
    model, last = LLM.load(folder, dtype="float32").model, {}
    for policy, slots, mode in (
        ("full", 3072, "absolute"),
        *(("window", 128, mode) for mode in ("absolute", "window")),
        *(("hashevict", 128, mode) for mode in ("absolute", "window")),
    ):
        cache = make_cache(model, policy, slots, rows=2, position_mode=mode)  # type: ignore[arg-type]
        logits = run(model, cache, rows, 256)[:, :-1]  # [2, 3071, V]
        nats = torch.nn.functional.cross_entropy(logits.transpose(1, 2), rows[:, 1:].long(), reduction="none")
        parts = [float(nats[:, begin:end].mean()) for begin, end in itertools.pairwise((128, 512, 1024, 2048, 3071))]
        print(f"{policy:>10} {slots:>5} slots {mode:>8}: " + " ".join(f"{part:.3f}" for part in parts))
        last[policy, mode] = parts[-1]
    assert min(nats for (_, mode), nats in last.items() if mode == "absolute") > 1.9
    assert max(nats for (_, mode), nats in last.items() if mode == "window") < 1.7
