"""The numbers of a GPU that the README's table asks for, one experiment each, with random weights of a known shape.

    python tools/measure_gpu.py step rows hashing                # minutes on an H100
    python tools/measure_gpu.py prefill context million
    python tools/measure_gpu.py step --shape mistral-7b --kv-dtype int8 --rows 16

    step      a decode step by the reference, by the kernels, and recorded; bytes and the share of the memory's speed
    rows      64 rows beside one
    hashing   what evictions add to a step, 2,048 to 32,768 slots: the same slots before and after they are full
    prefill   prompts under a budget beside a full cache, and beside h2o
    context   a step after a long context under a budget beside a full cache, for 1 and 6 rows
    million   a million tokens under a budget: memory and speed by tenths
    peers     the step beside transformers with a static cache, compiled, where that is installed

Rounds are interleaved, so that a busy moment hits everything alike; what is printed are medians, and JSON in the last
line.  Whether the numbers are right is `pytest tests/test_triton.py`'s business.  Without a GPU this runs only under
TRITON_INTERPRET=1 (--quick), which measures nothing but that it runs.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import torch

from minillm.backends import reference, triton
from minillm.backends.graph import Steps, recorder_for
from minillm.bench import live_bytes, weight_bytes
from minillm.cache import KVCache
from minillm.fused import FusedLayer
from minillm.generate import feed
from minillm.machine import now, read_bandwidth
from minillm.memory import held
from minillm.model import Transformer
from minillm.shapes import SHAPES, Shape

Step = Callable[[], object]
Found = dict[str, Any]


class Gpu:
    """A model, and how long its steps and prompts take."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        interpreted = triton.missing(torch.device("cpu")) is None
        device = "cuda" if torch.cuda.is_available() and not interpreted else "cpu"
        self.shape = Shape.of(
            args.shape, args.layers, dtype=args.dtype, device=device, weights=args.weights, backend="triton"
        )
        self.model, self.device = self.shape.load_model(), self.shape.device

    def cache(self, slots: int, *, rows: int = 1, policy: str | None = None, **options: Any) -> KVCache:
        """An empty one; policy "full" never evicts."""
        options = {"policy": policy or self.args.policy, "kv_dtype": self.args.kv_dtype, "rows": rows, **options}
        return self.shape.plan(budget=slots, context=4 * slots, positions="absolute", **options).allocate(self.device)

    def prompt(self, tokens: int, rows: int = 1) -> torch.Tensor:
        """Any tokens: [B, n]."""
        return torch.arange(tokens)[None].expand(rows, -1) % 1000

    def read(self, cache: KVCache, tokens: int) -> float:
        """Seconds that a prompt takes."""
        begin = now(self.device)
        for _ in feed(self.model, cache, self.prompt(tokens, cache.rows), self.args.chunk):
            pass
        return now(self.device) - begin

    def filled(self, cache: KVCache, tokens: int) -> KVCache:
        """As if every row had read so many tokens, none of which has left: random keys and values."""
        for layer in cache.layers:
            layer.positions[:, :, :tokens] = torch.arange(tokens, dtype=torch.int32, device=self.device)
            for part in (layer.keys, layer.values):
                part[:, :, :tokens].copy_(torch.randn(part.shape[1], tokens, part.shape[3], device=self.device))
        cache.seen = [tokens] * cache.rows
        return cache

    def eager(self, cache: KVCache, attend: Any = triton.attend_) -> Step:
        """A step as generate.py takes one, greedy; all rows at the same position."""
        token = torch.ones(cache.rows, 1, dtype=torch.int64, device=self.device)

        def step() -> None:
            attending_by(self.model, attend)
            hidden = self.model(token, cache.append(1), cache)  # [B, 1, hidden]
            token.copy_(self.model.logits(hidden[:, -1]).argmax(-1, keepdim=True))
            attending_by(self.model, triton.attend_)

        return step

    def recorded(self, cache: KVCache) -> Step:
        """The same, launched as one graph, with as little between two steps as there can be: nothing is read."""
        steps = Steps(self.model, cache, recorder_for(self.device, cache.rows), fewest=cache.rows)
        drawn = torch.ones(cache.rows, device=self.device).split(1)

        def step() -> None:
            nonlocal drawn
            logits = steps.feed(range(cache.rows), cache.feed_ahead(), drawn)  # [B, V]
            cache.keep()
            drawn = logits.argmax(-1).split(1)

        return step

    def seconds(self, ways: dict[str, Step], steps: int | None = None) -> dict[str, float]:
        """Of a step of each way: medians over rounds, of which the first is not counted."""
        count, found = steps or self.args.steps, {name: list[float]() for name in ways}
        for _ in range(1 + self.args.rounds):
            for name, step in ways.items():
                begin = now(self.device)
                for _ in range(count):
                    step()
                found[name].append((now(self.device) - begin) / count)
        return {name: median(times[1:]) for name, times in found.items()}


def attending_by(model: Transformer, attend: Any) -> None:
    """From here on, layers attend by another backend."""
    for module in model.modules():
        if isinstance(module, FusedLayer):
            module.attend = attend


def step(gpu: Gpu) -> Iterator[Found]:
    """By the reference, the kernels, and recorded."""
    rows, slots = gpu.args.rows, gpu.args.slots
    caches = [gpu.cache(slots, rows=rows) for _ in range(3)]
    for cache in caches:
        gpu.read(cache, slots + 5)
    ways = {
        "reference": gpu.eager(caches[0], reference.attend_),
        "kernels": gpu.eager(caches[1]),
        "recorded": gpu.recorded(caches[2]),
    }
    found, speed = gpu.seconds(ways), read_bandwidth(gpu.device)
    read = weight_bytes(gpu.model) + live_bytes(caches[2])
    for name, seconds in found.items():
        yield {"way": name, "rows": rows, "slots": slots, **per_second(seconds, rows), "share": read / seconds / speed}
    yield {"bandwidth_gb_s": speed / 1e9, "read_gb": read / 1e9}


def rows(gpu: Gpu) -> Iterator[Found]:
    """Many rows beside one."""
    slots, ways = gpu.args.slots, {}
    for count in (1, gpu.args.many):
        cache = gpu.cache(slots, rows=count)
        gpu.read(cache, slots + 5)
        ways[str(count)] = gpu.recorded(cache)
    found = gpu.seconds(ways)
    for count, seconds in found.items():
        yield {"rows": int(count), "slots": slots, **per_second(seconds, int(count))}
    yield {"rows": gpu.args.many, "throughput_ratio": gpu.args.many * found["1"] / found[str(gpu.args.many)]}


def hashing(gpu: Gpu) -> Iterator[Found]:
    """The same cache just before and just after it is full: what evictions add, whose share is of the later step."""
    for slots in gpu.args.many_slots:
        for policy, options in (("hashevict", {"hash_bits": 64}), ("hashevict-plus", {})):
            cache, count = gpu.cache(slots, policy=policy, **options), gpu.args.steps
            every = cache.retentions[0].evict_every
            shares = []
            for _ in range(gpu.args.rounds):
                cache.reset()
                gpu.read(cache, slots - count - 2)
                take = gpu.recorded(cache)
                take()
                before = timed(gpu, take, count)
                for _ in range(1 + every):  # the first eviction does other things, too
                    take()
                shares.append(1 - before / timed(gpu, take, -(-count // every) * every))
            yield {"slots": slots, "policy": policy, **options, "share": median(shares)}


def prefill(gpu: Gpu) -> Iterator[Found]:
    """Prompts under a budget, in a full cache, and under h2o; the last one is slow, and reads the shortest only."""
    slots = gpu.args.prefill_slots
    for tokens in gpu.args.contexts:
        found: dict[str, list[float]] = {}
        for again in range(1 + gpu.args.rounds):
            for name in ("full", gpu.args.policy, *(["h2o"] if tokens == min(gpu.args.contexts) else [])):
                kept = tokens if name == "full" else slots
                cache = gpu.cache(kept, policy=name, evict_every=None if name == "full" else gpu.args.evict_every)
                seconds = gpu.read(cache, tokens)
                del cache
                if again:
                    found.setdefault(name, []).append(seconds)
        ours = median(found[gpu.args.policy])
        for name, times in found.items():
            ratio = median(times) / ours
            yield {"tokens": tokens, "slots": slots, "policy": name, "tok_s": tokens / median(times), "ratio": ratio}


def context(gpu: Gpu) -> Iterator[Found]:
    """A step after a long context: a budget beside everything."""
    tokens, slots = max(gpu.args.contexts), gpu.args.prefill_slots
    for count in (1, gpu.args.few):
        bounded = gpu.cache(slots, rows=count)
        gpu.read(bounded, slots + 5)
        try:
            whole = gpu.filled(
                gpu.cache(tokens + 64 + gpu.args.steps * (gpu.args.rounds + 4), rows=count, policy="full"), tokens
            )
        except torch.OutOfMemoryError:
            yield {"rows": count, "tokens": tokens, "full": "does not fit into this GPU"}
            continue
        found = gpu.seconds({"bounded": gpu.recorded(bounded), "full": gpu.recorded(whole)})
        ratio = found["full"] / found["bounded"]
        yield {"rows": count, "tokens": tokens, "slots": slots, **per_second(found["bounded"], count), "ratio": ratio}
        del bounded, whole


def million(gpu: Gpu) -> Iterator[Found]:
    """A long prompt: bytes held and tokens per second, by tenths."""
    cache = gpu.cache(gpu.args.prefill_slots, evict_every=gpu.args.evict_every)
    gpu.read(cache, 2 * gpu.args.prefill_slots)
    for tenth in range(1, 11):
        tokens = gpu.args.million // 10
        seconds = gpu.read(cache, tokens)
        yield {"tenth": tenth, "tok_s": tokens / seconds, "held_bytes": held(gpu.device).peak}


def peers(gpu: Gpu) -> Iterator[Found]:
    """transformers on random weights of the same shape: a static cache of as many slots, compiled."""
    try:
        import transformers
    except ImportError:
        yield {"transformers": "is not installed"}
        return
    slots, raw = gpu.args.slots, gpu.shape.config.to_hf()
    theirs = transformers.AutoConfig.for_model(raw.pop("model_type"), **raw)
    with torch.device(gpu.device):
        model = transformers.AutoModelForCausalLM.from_config(theirs, dtype=gpu.shape.dtype).eval()
    kept = transformers.StaticCache(config=theirs, max_cache_len=slots)
    model(gpu.prompt(slots // 2).to(gpu.device), past_key_values=kept)  # a cache begun while compiling has no graphs
    token = torch.ones(1, 1, dtype=torch.int64, device=gpu.device)
    forward = torch.compile(model.forward, mode="reduce-overhead", fullgraph=True)

    def step() -> None:
        logits = forward(input_ids=token, past_key_values=kept, use_cache=True).logits  # [1, 1, V]
        token.copy_(logits[:, -1].argmax(-1, keepdim=True))

    for _ in range(4):
        step()  # recorded before ours: that clears what cuBLAS keeps, and our graph would still read it
    cache = gpu.cache(slots)
    gpu.read(cache, slots + 5)
    found = gpu.seconds({"ours": gpu.recorded(cache), "transformers": step})
    for name, seconds in found.items():
        yield {"who": name, "slots": slots, **per_second(seconds, 1), "ratio": seconds / found["ours"]}


def timed(gpu: Gpu, step: Step, count: int) -> float:
    """Seconds of a step."""
    begin = now(gpu.device)
    for _ in range(count):
        step()
    return (now(gpu.device) - begin) / count


def per_second(seconds: float, rows: int) -> Found:
    """Of a step."""
    return {"step_ms": 1e3 * seconds, "tok_s": rows / seconds}


EXPERIMENTS = {run.__name__: run for run in (step, rows, hashing, prefill, context, million, peers)}
QUICK = "--shape smollm2-135m --layers 1 --dtype float32 --slots 8 --rows 2 --many 2 --few 2 --steps 1 --rounds 1"
QUICK += " --many-slots 12 --prefill-slots 8 --contexts 18 --million 10 --evict-every 4 --chunk 16"


def arguments() -> argparse.Namespace:
    """What is measured, of what; --quick comes first, so that other options hold over it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("experiments", nargs="+", choices=tuple(EXPERIMENTS), metavar="EXPERIMENT", help=", ".join(EXPERIMENTS))
    add("--quick", action="store_true", help="sizes that an interpreter can bear")
    add("--shape", choices=tuple(SHAPES), default="llama-3.1-8b")
    add("--layers", type=int, help="only so many layers (default: all)")
    add("--weights", choices=("auto", "int8", "int8-a16", "int4"), default="auto")
    add("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    add("--policy", default="hashevict-plus")
    add("--kv-dtype", choices=("auto", "int8"), default="auto")
    add("--evict-every", type=int, help="for prompts (default: the policy's)")
    add("--chunk", type=int, default=1024, help="tokens of a prompt that are read at once (default: 1024)")
    add("--slots", type=int, default=2048, help="for steps (default: 2048)")
    add("--rows", type=int, default=1, help="of the experiment `step` (default: 1)")
    add("--many", type=int, default=64, help="rows of the experiment `rows` (default: 64)")
    add("--few", type=int, default=6, help="rows of the experiment `context`, beside one (default: 6)")
    add("--many-slots", type=int, nargs="+", default=[2048, 8192, 32_768], help="of the experiment `hashing`")
    add("--prefill-slots", type=int, default=4096, help="for prompts and long contexts (default: 4096)")
    add("--contexts", type=int, nargs="+", default=[32_768, 131_072], help="tokens of prompts")
    add("--million", type=int, default=1_000_000, help="tokens of the experiment `million`")
    add("--steps", type=int, default=64, help="in a round (default: 64)")
    add("--rounds", type=int, default=3, help="that are counted (default: 3)")
    given = sys.argv[1:]
    return parser.parse_args([*QUICK.split(), *given] if "--quick" in given else given)


@torch.inference_mode()
def main() -> None:
    """A line for each finding, and JSON."""
    args = arguments()
    gpu = Gpu(args)
    card = torch.cuda.get_device_name() if gpu.device.type == "cuda" else "interpreted on the CPU: not a measurement"
    print(f"{gpu.shape.name} on {card}, torch {torch.__version__}")
    found: dict[str, list[Found]] = {}
    for name in dict.fromkeys(args.experiments):
        found[name] = []
        gc.collect()
        if gpu.device.type == "cuda":  # each experiment has a peak of its own
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        for line in EXPERIMENTS[name](gpu):
            found[name].append(line)
            print(f"  {name}: " + ", ".join(f"{what} {_short(value)}" for what, value in line.items()), flush=True)
    print(json.dumps({**vars(args), "device": card, "torch": torch.__version__, "found": found}))


def _short(value: Any) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


if __name__ == "__main__":
    main()
