"""`minillm info`: what this machine offers and which code would serve it."""

from __future__ import annotations

import argparse
import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from .. import __version__
from .options import add_json_option

PACKAGES = ("torch", "safetensors", "tokenizers", "sentencepiece", "huggingface-hub", "jinja2")


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `info` to the command line."""
    parser = subparsers.add_parser(
        "info", help="show devices, versions and backends", description="Show devices, versions and backends."
    )
    add_json_option(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """One line per fact, or one JSON object."""
    facts = {"versions": versions(), "devices": devices(), "backends": backends()}
    if args.json:
        print(json.dumps(facts, ensure_ascii=False))
        return 0
    for title, entries in facts.items():
        print(f"{title}:")
        width = max(len(name) for name in entries)
        for name, value in entries.items():
            print(f"  {name:<{width}}  {_in_words(value)}")
    return 0


def versions() -> dict[str, str]:
    """minillm, Python, the system, and the packages that minillm stands on."""
    found = {"minillm": __version__, "python": platform.python_version(), "system": platform.platform()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def devices() -> dict[str, Any]:
    """CPU, CUDA and MPS, each as far as torch can use it."""
    import torch

    supported = {
        "avx512": torch.cpu._is_avx512_supported(),
        "avx512_bf16": torch.cpu._is_avx512_bf16_supported(),
        "amx": torch.cpu._is_amx_tile_supported(),
        "vnni": torch.cpu._is_vnni_supported(),
    }
    cpu = {
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "kernels": torch.backends.cpu.get_cpu_capability(),
        "features": [name for name, present in supported.items() if present],
    }
    cards: list[Any] = []
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        cards.append({"name": card.name, "bytes": card.total_memory, "capability": f"{card.major}.{card.minor}"})
    return {"cpu": cpu, "cuda": cards, "mps": torch.backends.mps.is_available()}


def backends() -> dict[str, Any]:
    """Which backend serves which operation, for bfloat16 on the CPU where that is what `auto` chooses, and why."""
    import torch

    from ..backends import linear, linear_cuda, native
    from ..loader import cpu_has_bfloat16
    from ..quant import quantise

    cuda = linear_cuda.missing(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = torch.bfloat16 if cpu_has_bfloat16() else torch.float32
    why = native.missing() or ("" if dtype == torch.bfloat16 else "it computes in bfloat16 alone")
    packed = "torch, plain (oneDNN does not multiply it here)"
    int8 = "dense blocks of weights, as int8-a16 (oneDNN's 8-bit products would overflow here, or are not there)"
    sample = torch.arange(64 * 32).view(64, 32).to(dtype)  # who multiplies it, multiplies a model
    if linear.can_pack(dtype):
        packed = "oneDNN, weights packed once" + _of_few(linear.OneDNNLinear(sample, None))
    if linear.has_int8():
        rounded = linear.Int8RoundedLinear(quantise(sample, 8), None)
        int8 = "oneDNN, activations rounded to 8 bits" + ("" if why else _of_few(rounded))
    return {
        "dtype auto": f"{str(dtype).removeprefix('torch.')} for checkpoints in 16 bits: "
        + ("the CPU multiplies it" if dtype == torch.bfloat16 else "the CPU has no instructions for bfloat16"),
        "linear": packed,
        "linear int8": int8,
        "linear int8-a16": "dense blocks of weights",
        "linear int4": "native.c" if not why else "torch's int4 operator",
        "linear in 8 and 4 bits on CUDA": f"does not run: {cuda}" if cuda else "torch: int8 _int_mm, int4 tinygemm",
        "attention, one token": "native.c" if not why else "torch, matrix products over slots",
        "attention, many tokens": "torch's fused kernel over slots",
        "norm, rotary, gate": "native.c" if not why else "torch",
        "hashing, eviction": "torch, once in evict-every tokens",
        "native.c": "runs here" if not why else f"does not run: {why}",
        "reference": "every operation, wherever --backend reference says so, and on other devices",
        **triton_serves(),
    }


def triton_serves() -> dict[str, str]:
    """What runs on CUDA, and why nothing of it would here."""
    import torch

    from ..checkpoint import triton_missing

    why = triton_missing(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    if why is not None:
        return {"triton": f"does not run: {why}", "graph": "does not run: it records steps of triton"}
    one = "one token: eviction (window, hashevict, hashevict-key, hashevict-plus), writing, attention"
    graph = "decode steps of these policies and full as CUDA graphs, in every command that draws; in one process"
    return {"triton": f"{one}; of many tokens and other policies torch", "graph": graph}


def _in_words(value: Any) -> str:
    """A fact for people: lists and objects without their brackets, nothing as "none"."""
    if isinstance(value, dict):
        return "; ".join(f"{name} {_in_words(item)}" for name, item in value.items())
    if isinstance(value, list):
        return ", ".join(_in_words(item) for item in value) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)


def _of_few(layer: Any) -> str:
    return "" if layer.form is None else "; of few tokens native.c, from the same weights"
