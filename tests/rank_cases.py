"""What test_parallel.py computes in one process and in several: models, caches and tokens that are drawn alike."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minillm.cache import KVCache
from minillm.checkpoint import Checkpoint
from minillm.config import ModelConfig
from minillm.eviction import Retention
from minillm.llm import LLM
from minillm.loader import load_model, save_checkpoint, save_quantised
from minillm.parallel import connected
from minillm.quant import Scheme
from minillm.shard import Team

from .every_policy import EVERY_POLICY
from .helpers import kept_positions, make_cache, run, tiny_config, tiny_model

TOKENS, SLOTS, KV_HEADS = 46, 16, (4, 2, 1)
CPU = torch.device("cpu")
WEIGHTS = (None, "int8", "int8-a16", "int4")  # quantised while loading
BIASED = {  # folder, dtype, weights, backend
    "float32": ("biased", "float32", "auto", "cpu"),
    "int8-a16": ("biased-int8", "float32", "int8-a16", "cpu"),
    "int4": ("biased-int4", "float32", "int4", "cpu"),
    "int8-a16, unfused": ("biased-int8", "float32", "int8-a16", "reference"),
    "int4, unfused": ("biased-int4", "float32", "int4", "reference"),
    "int8": ("biased-int8", "float32", "int8", "cpu"),
    "bfloat16": ("biased", "bfloat16", "auto", "cpu"),
    "bfloat16, int8": ("biased-int8", "bfloat16", "int8", "cpu"),
    "bfloat16, int8-a16": ("biased-int8", "bfloat16", "int8-a16", "cpu"),
    "bfloat16, int4": ("biased-int4", "bfloat16", "int4", "cpu"),
}
TEXT = "Once upon a time there was a little dog. He liked to play in the park with his friends."


def shape(kv_heads: int) -> ModelConfig:
    """Eight query heads, biases everywhere, one layer with a window, trained for fewer tokens than it reads."""
    return tiny_config(
        num_attention_heads=8,
        num_key_value_heads=kv_heads,
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        vocab_size=100,
        dtype="float64",
        sliding_windows=(None, 12),
        max_position_embeddings=36,
    )


def wide() -> ModelConfig:
    """Matrices whose parts are whole groups of 32 columns on 4 ranks, and a shared embedding."""
    fields = {"hidden_size": 64, "head_dim": 32, "intermediate_size": 256, "vocab_size": 128}
    return tiny_config(**fields, tie_word_embeddings=True)


def write(folder: Path) -> None:
    """The checkpoints."""
    for kv_heads in KV_HEADS:
        write_biased(folder / f"{kv_heads}", shape(kv_heads), 0.1)
    save_checkpoint(folder / "wide", tiny_model(wide()), wide())
    biased = replace(wide(), qkv_bias=True, o_bias=True, mlp_bias=True)
    write_biased(folder / "biased", biased, 0.5)
    for scheme in ("int8", "int4"):
        save_quantised(folder / "wide", wide(), folder / scheme, Scheme(scheme))
        save_quantised(folder / "biased", biased, folder / f"biased-{scheme}", Scheme(scheme))


def write_biased(folder: Path, config: ModelConfig, std: float) -> None:
    """Random weights, and biases that are not 0."""
    model = tiny_model(config)
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            torch.nn.init.normal_(parameter, std=std)
    save_checkpoint(folder, model, config, dtype=getattr(torch, str(config.dtype)))


def tokens(vocabulary: int = 100) -> Tensor:
    return torch.randint(vocabulary, (1, TOKENS), generator=torch.Generator().manual_seed(5))  # [1, n]


def by_policy(folder: Path, kv_heads: int, team: Team) -> Iterator[tuple[str, Any]]:
    """For every policy: logits [1, n, V], and the kept positions of the heads that are here."""
    config = shape(kv_heads)
    part = team.part_of(config)
    model = team.join_(load_model(folder / f"{kv_heads}", part, dtype=torch.float64, device=CPU))
    kinds = (torch.arange(config.vocab_size) % 7 == 0).to(torch.uint8) * 2  # some tokens are special
    for name, entry in EVERY_POLICY.items():
        retention = Retention.of(SLOTS, sinks=2, recent=4, evict_every=6)
        cache = KVCache(part, entry.policy, retention, dtype=torch.float64, position_mode="window")
        cache.kinds = kinds if entry.policy.needs_kinds else None
        yield f"{name}, {kv_heads} KV heads", (run(model, cache, tokens(), 64), kept_positions(cache))


def by_weights(folder: Path, team: Team) -> Iterator[tuple[str, Any]]:
    """Logits [1, n, V] for every way to keep weights, and the bytes that were asked of the files."""
    for source, schemes in {"wide": WEIGHTS, "int8": ("int8-a16",), "int4": ("int4",)}.items():
        for scheme in schemes:
            for fused in (False, True):
                config = team.part_of(replace(wide(), stored_scheme=None if source == "wide" else source))
                before = bytes_read()
                model = load_model(
                    folder / source,
                    config,
                    dtype=torch.float32,
                    device=CPU,
                    scheme=None if scheme is None else Scheme(scheme),
                    backend="cpu" if fused else "reference",
                )
                read = bytes_read() - before
                cache = make_cache(team.join_(model), "window", SLOTS)
                yield f"{source} as {scheme}{', fused' if fused else ''}", (run(model, cache, tokens(128), 64), read)


def by_biases(folder: Path, team: Team) -> Iterator[tuple[str, Any]]:
    """Logits [1, n, V] of a model with biases everywhere: many tokens at once, then one at a time."""
    for name, (source, dtype, weights, backend) in BIASED.items():
        checkpoint = Checkpoint.open(str(folder / source), dtype=dtype, weights=weights, backend=backend, team=team)
        model = checkpoint.load_model()
        cache = make_cache(model, "window", SLOTS)
        read, drawn = tokens(128).split((TOKENS - 8, 8), 1)  # [1, n - 8], [1, 8]
        yield f"biased, {name}", torch.cat((run(model, cache, read, 64), run(model, cache, drawn, 1)), 1).float()


def bytes_read() -> int:
    """That this process has asked the system for, mapped pages not included."""
    lines = Path("/proc/self/io").read_text("utf-8").splitlines()
    return int(lines[0].partition(": ")[2])


def by_text(team: Team) -> Iterator[tuple[str, Any]]:
    """What the demo says, what is kept of it, and what its plan says."""
    llm = LLM.load(budget=32, policy="h2o", dtype="float32", team=team)
    for sampling in ({"seed": 7, "temperature": 0.9}, {"seed": 7, "temperature": 0.9, "top_p": 0.8, "logprobs": 2}):
        result = llm.generate("Once upon a time", max_tokens=44, **sampling)
        yield f"text{len(sampling)}", (result.text, result.usage, llm.cache.nbytes, llm.plan.nbytes)
    yield "draws without a seed", llm.generate("The dog", max_tokens=8, temperature=1.0).text
    brain = LLM.load(dtype="bfloat16", team=team)
    yield "bfloat16", brain.score(brain.encode(TEXT)).nats_per_token


def everything(folder: Path, team: Team) -> dict[str, Any]:
    """All of it."""
    found: dict[str, Any] = {}
    for kv_heads in KV_HEADS:
        found |= by_policy(folder, kv_heads, team)
    return found | dict(by_weights(folder, team)) | dict(by_biases(folder, team)) | dict(by_text(team))


if __name__ == "__main__":
    torch.set_num_threads(1)
    with connected() as here:
        torch.save(everything(Path(sys.argv[1]), here), Path(sys.argv[1]) / f"rank {here.rank} of {here.ranks}.pt")
