"""Tokens per second of the engine with every row drawing, against one row alone, interleaved: what a server lives on.

    python tools/measure_rows.py --shape tinyllama --rows 8 --slots 512

Each round reads a prompt of its own length in every row, so that rows evict at different times, then draws.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from statistics import median

import torch
from torch import Tensor

from minillm.cores import usable_cores
from minillm.engine import Engine
from minillm.errors import MinillmError
from minillm.generate import Pins
from minillm.sampling import Sample, Sampler, SamplingParams
from minillm.shapes import SHAPES, Shape


class Draws:
    """A task that draws greedily and counts."""

    pins: Pins = ()

    def __init__(self, prompt: Tensor, vocab: int, tokens: int) -> None:
        self.prompt, self.max_tokens, self.drawn = prompt, tokens, 0
        self.sampler = Sampler(SamplingParams(ignore_eos=True), vocab, vocab, (), torch.device("cpu"))

    def read(self, tokens: Tensor, hidden: Tensor) -> None:
        """Nothing to note."""

    def draw(self, sample: Sample) -> bool:  # noqa: ARG002
        self.drawn += 1
        return self.drawn < self.max_tokens

    def end(self, error: MinillmError | None) -> None:
        assert error is None, error


def tokens_per_second(engine: Engine, vocab: int, rows: int, prompt: int, tokens: int) -> float:
    """Of `rows` rows that draw `tokens` tokens each, once their prompts are read."""
    draws = []
    for row in range(rows):
        engine.rows[row].cache.reset()
        ids = torch.randint(vocab, (prompt + 7 * row,), generator=torch.Generator().manual_seed(row))
        draws.append(Draws(ids.to(torch.int32), vocab, tokens + rows))
        engine.start(row, draws[-1])
    while len(engine.drawing) < rows:
        engine.step()
    before, begun = sum(draw.drawn for draw in draws), time.perf_counter()
    for _ in range(tokens - 1):
        engine.step()
    found = (sum(draw.drawn for draw in draws) - before) / (time.perf_counter() - begun)
    for row in range(rows):
        engine.stop(row)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="tinyllama")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--weights", default="auto")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--slots", type=int, default=512)
    parser.add_argument("--prompt", type=int, default=480)
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(usable_cores())
    checkpoint = Shape.of(args.shape, args.layers, dtype="bfloat16", device="cpu", weights=args.weights, backend="auto")
    plan = checkpoint.plan(budget=args.slots, rows=args.rows)
    engine = Engine(checkpoint.load_model(), plan.allocate(checkpoint.device))
    vocab = checkpoint.config.vocab_size
    found: dict[int, list[float]] = {1: [], args.rows: []}
    for turn in range(args.rounds + 1):
        for rows, speeds in found.items():
            speed = tokens_per_second(engine, vocab, rows, args.prompt, args.tokens)
            if turn:  # the first round warms up
                speeds.append(speed)
    ratio = median(many / one for one, many in zip(*found.values(), strict=True))
    one, many = (median(speeds) for speeds in found.values())
    print(f"{checkpoint.name}, {args.weights} weights, {args.slots} slots, {torch.get_num_threads()} threads")
    print(f"1 row {one:.1f} tokens/s, {args.rows} rows {many:.1f} tokens/s: {ratio:.2f} times as much")
    print(json.dumps({"rows": args.rows, "one": one, "many": many, "ratio": ratio}))


if __name__ == "__main__":
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    main()
