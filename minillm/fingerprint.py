"""Everything that an answer depends on, beside the tokens: a saved session goes on only where all of it is the same."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .budget import CachePlan
from .config import ModelConfig
from .errors import SessionError
from .headers import stored_tensors
from .version import __version__

if TYPE_CHECKING:
    from .checkpoint import Checkpoint

SAMPLE, SAMPLES = 4096, 256  # bytes, and how many of them of each file


def model_digest(folder: Path, config: ModelConfig) -> str:
    """16 hex digits for the weights in a folder: from what config.json means, from the headers, and from samples.

    The samples are spread evenly over each file of weights: 1 MiB is read of it, whatever its size.  A fine-tuned copy
    differs nearly everywhere; one number changed by hand may go unnoticed.
    """
    digest = sha256(json.dumps(config.to_hf(), sort_keys=True).encode())
    stored = stored_tensors(folder)
    for name, entry in sorted(stored.items()):
        digest.update(f"{name} {entry.dtype} {entry.shape} {entry.file.name} {entry.begin}\n".encode())
    for file in sorted({entry.file for entry in stored.values()}):
        size = file.stat().st_size
        with file.open("rb") as opened:
            for at in range(SAMPLES):
                opened.seek(max(0, size - SAMPLE) * at // (SAMPLES - 1))
                digest.update(opened.read(SAMPLE))
    return digest.hexdigest()[:16]


def fingerprint(checkpoint: Checkpoint, plan: CachePlan, *, chunk: int) -> dict[str, str]:
    """By name, in words: the model (`model_digest`), the cache, and how and by what it is computed."""
    layers = [asdict(retention) for retention in plan.retentions]
    layout = {name: _once([str(layer[name]) for layer in layers]) for name in layers[0]}
    options = {name: str(value) for name, value in asdict(plan.policy).items()}  # type: ignore[call-overload]
    dtype = str(plan.dtype).removeprefix("torch.")
    return {
        "model": checkpoint.digest,
        "dtype": dtype,
        "weights": "as they are" if checkpoint.scheme is None else checkpoint.scheme.name,
        "kv-dtype": "int8" if plan.int8 else dtype,
        "policy": plan.policy.name,
        **{name.replace("_", "-"): value for name, value in (options | layout).items()},
        "context": str(plan.whole),
        "positions": plan.position_mode,
        "chunk": str(chunk),
        "device": _device(checkpoint.device),
        "backend": checkpoint.computed_by,
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "minillm": __version__,
    }


def check_fingerprint(path: Path, saved: Mapping[str, str], ours: Mapping[str, str]) -> None:
    """Raise SessionError, naming every field that differs with both values."""
    names = {**ours, **saved}
    if saved.get("policy") != ours.get("policy"):  # which says why the one has options that the other has not
        names = {name: "" for name in names if name in ours and name in saved}
    differing = [
        f"{name} {saved.get(name, 'none')} (here {ours.get(name, 'none')})"
        for name in names
        if saved.get(name) != ours.get(name)
    ]
    if differing:
        raise SessionError(
            f"{path} was saved with {', '.join(differing)}: it goes on exactly, or not at all; use the same settings, "
            "or start a new session"
        )


def _once(values: list[str]) -> str:
    """What all layers share, or all the values."""
    return values[0] if len(set(values)) == 1 else " ".join(values)


def _device(device: torch.device) -> str:
    """The kind of processor: another one rounds differently."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu {torch.backends.cpu.get_cpu_capability()}" if device.type == "cpu" else device.type
