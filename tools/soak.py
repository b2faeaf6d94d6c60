"""A soak: generate for a very long time inside a small budget, and check that nothing drifts.

    python tools/soak.py --model stories260K [--tokens 1000000] [--slots 64] [--policy hashevict] [--positions window]

Draws tokens at temperature 1 and never stops at an end token.  Every --check tokens it verifies what must hold in every
layer and KV head: no more tokens than slots, no token twice, sinks and recent tokens there, free slots as many as the
position says, finite keys and values, tensors where they were.  It prints resident memory and speed along the way, and
at the end the slope of memory over tokens (least squares, without the first tenth).  Linux only: it reads /proc.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time

import torch

from minillm.cache import KVCache
from minillm.checkpoint import Checkpoint
from minillm.generate import generate
from minillm.memory import held
from minillm.sampling import Sampler, SamplingParams


def check(cache: KVCache) -> None:
    """Every invariant of a cache of one row; AssertionError names what is broken."""
    now = cache.seen[0]
    for layer in cache.layers:
        retention = layer.retention
        slots, every = retention.slots, retention.evict_every
        expected = now if now <= slots else slots - every + 1 + (now - 1 - slots) % every
        for head in layer.positions[0].tolist():
            live = {position for position in head if position >= 0}
            assert len(live) == sum(position >= 0 for position in head), "a token sits in two slots"
            assert len(live) == expected, f"{len(live)} tokens are kept at {now}, not {expected}"
            assert live >= set(range(min(retention.sinks, now))), "a sink is gone"
            assert live >= set(range(max(0, now - retention.recent), now)), "a recent token is gone"
            assert max(live) == now - 1, "the newest token is not there"
        for name in ("keys", "values"):
            assert layer.tensors()[name].to(torch.float32).isfinite().all(), f"{name} of layer {layer.index}"


def slope(samples: list[tuple[int, int]]) -> float:
    """Bytes per token by least squares over (tokens, bytes)."""
    return statistics.linear_regression([float(x) for x, _ in samples], [float(y) for _, y in samples]).slope


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="minillm-demo")
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--policy", default="hashevict")
    parser.add_argument("--positions", default="absolute", choices=("absolute", "window"))
    parser.add_argument("--check", type=int, default=10_000, help="tokens between two checks")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    checkpoint = Checkpoint.open(args.model, device="cpu")
    plan = checkpoint.plan(budget=args.slots, policy=args.policy, positions=args.positions)
    model, cache = checkpoint.load_model(), plan.allocate(checkpoint.device)
    params = SamplingParams(temperature=1.0, seed=0, ignore_eos=True, max_tokens=args.tokens)
    config = checkpoint.config
    sampler = Sampler(params, config.vocab_size, config.vocab_size, checkpoint.eos_ids, checkpoint.device)
    addresses = [tensor.data_ptr() for layer in cache.layers for tensor in layer.tensors().values()]
    samples: list[tuple[int, int]] = []
    begin = before = time.perf_counter()
    stream = generate(model, cache, torch.tensor([checkpoint.tokenizer.bos_id or 0]), sampler, max_tokens=args.tokens)
    for done in itertools.count(args.check, args.check):
        drawn = sum(1 for _ in itertools.islice(stream, args.check))
        if not drawn:
            break
        check(cache)
        assert addresses == [tensor.data_ptr() for layer in cache.layers for tensor in layer.tensors().values()]
        now = time.perf_counter()
        samples.append((cache.seen[0], held().now))
        if done % (10 * args.check) == 0 or done >= args.tokens:
            rate = 10 * args.check / (now - before)
            print(
                f"{cache.seen[0]:>10,} tokens  {samples[-1][1] / 1e6:8.2f} MB resident  {rate:8.0f} tok/s", flush=True
            )
            before = now
    settled = samples[len(samples) // 10 :]
    spread = max(size for _, size in settled) - min(size for _, size in settled)
    print(
        f"{cache.seen[0]:,} tokens in {time.perf_counter() - begin:,.0f} s, {len(samples)} checks passed; "
        f"memory slope {slope(settled) * 1e6:+,.0f} bytes per million tokens, spread {spread / 1e3:,.0f} kB "
        f"(policy {args.policy}, {args.slots} slots, positions {args.positions})"
    )


if __name__ == "__main__":
    main()
