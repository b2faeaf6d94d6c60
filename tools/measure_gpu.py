"""What to measure first on a GPU: a decode step by the reference, by the Triton kernels, and as a recorded CUDA graph.

    python tools/measure_gpu.py --shape llama-3.1-8b --layers 8 --rows 1 --slots 2048
    python tools/measure_gpu.py --shape llama-3.1-8b --layers 8 --rows 16 --policy hashevict --kv-dtype int8

Random weights; every row has read a prompt longer than its slots, so that steps evict.  Rounds are interleaved, and
the median is of all steps of a kind.  Whether the numbers are right is `pytest tests/triton_cases.py`'s business.
Without a GPU it runs only under TRITON_INTERPRET=1, which measures nothing but that it runs.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

from minillm.backends import reference, triton
from minillm.backends.graph import Steps, recorder_for
from minillm.cache import KVCache
from minillm.generate import feed
from minillm.model import Attention, Transformer
from minillm.shapes import SHAPES, Shape


def attending_by(model: Transformer, attend: Any) -> Transformer:
    """The same model, its layers attending by another backend."""
    for module in model.modules():
        if isinstance(module, Attention):
            module.attend = attend
    return model


def eager(model: Transformer, cache: KVCache, attend: Any) -> Callable[[], None]:
    """A step as generate.py takes one, greedy; all rows at the same position."""
    token = torch.ones(cache.rows, 1, dtype=torch.int64, device=cache.device)

    def step() -> None:
        attending_by(model, attend)
        hidden = model(token, cache.append(1), cache)  # [B, 1, hidden]
        token.copy_(model.logits(hidden[:, -1]).argmax(-1, keepdim=True))

    return step


def recorded(model: Transformer, cache: KVCache) -> Callable[[], None]:
    """The same, launched as one graph, with as little between two steps as there can be: nothing is read."""
    steps = Steps(attending_by(model, triton.attend_), cache, recorder_for(cache.device, cache.rows), fewest=cache.rows)
    drawn = torch.ones(cache.rows, device=cache.device).split(1)

    def step() -> None:
        nonlocal drawn
        logits = steps.feed(range(cache.rows), cache.feed_ahead(), drawn)  # [B, V]
        cache.keep()
        drawn = logits.argmax(-1).split(1)

    return step


@torch.inference_mode()
def main() -> None:
    """A line for each way, and JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--shape", choices=tuple(SHAPES), default="llama-3.2-1b")
    add("--layers", type=int, help="only so many layers (default: all)")
    add("--rows", type=int, default=1)
    add("--slots", type=int, default=2048)
    add("--policy", default="hashevict-plus")
    add("--kv-dtype", choices=("auto", "int8"), default="auto")
    add("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    add("--steps", type=int, default=64, help="in a round (default: 64)")
    add("--rounds", type=int, default=5)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = Shape.of(args.shape, args.layers, dtype=args.dtype, device=device, weights="auto", backend="triton")
    options = {"policy": args.policy, "kv_dtype": args.kv_dtype, "rows": args.rows}
    plan = shape.plan(budget=args.slots, context=2 * args.slots, **options)
    model, prompt = shape.load_model(), torch.arange(args.slots + 5)[None].expand(args.rows, -1) % 1000

    def read() -> KVCache:
        cache = plan.allocate(shape.device)
        for _ in feed(attending_by(model, triton.attend_), cache, prompt, 256):
            pass
        return cache

    ways = {
        "reference": eager(model, read(), reference.attend_),
        "triton": eager(model, read(), triton.attend_),
        "recorded": recorded(model, read()),
    }
    wait = torch.cuda.synchronize if device == "cuda" else (lambda: None)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(1 + args.rounds):  # the first one compiles
        for name, step in ways.items():
            wait()
            begun = time.perf_counter()
            for _ in range(args.steps):
                step()
            wait()
            seconds[name].append((time.perf_counter() - begun) / args.steps)
    found = {name: 1e3 * median(times[1:]) for name, times in seconds.items()}
    for name, milliseconds in found.items():
        print(f"{name:10} {milliseconds:9.3f} ms a step  {1e3 * args.rows / milliseconds:9.1f} tokens/s")
    card = torch.cuda.get_device_name() if device == "cuda" else "interpreted on the CPU: not a measurement"
    print(json.dumps({**vars(args), "device": card, "torch": torch.__version__, "step_ms": found}))


if __name__ == "__main__":
    main()
