"""Read a whole book at a fixed budget: does memory stay flat, and does speed?

    python tools/read_book.py BOOK.txt [--model minillm-demo] [--slots 512] [--svg tools/book.svg]

Feeds the text as `minillm generate --file` does: tokenised in pieces, in chunks, through one bounded cache, then draws
eight tokens.  Prints the peak of resident memory (VmHWM) within the first 10,000 tokens and at the end, and the speed
of the first and of the last tenth of what was read after the cache was full.  The picture shows resident memory above
the loaded model, as measured, beside the keys and values that a full cache would hold by then, which is arithmetic.
Linux only: it reads /proc.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from plot_memory import MB, describe, save_picture, start_picture

from minillm import LLM
from minillm.memory import held

EARLY = 10_000  # tokens: what has not been allocated by then should never be


def pieces(path: Path) -> Iterator[str]:
    """The text, 64 Ki characters at a time."""
    with path.open(encoding="utf-8", errors="replace") as file:
        while piece := file.read(1 << 16):
            yield piece


def draw(samples: list[tuple[int, int]], per_token: int, args: argparse.Namespace) -> None:
    """samples: (tokens read, bytes above the loaded model); per_token: bytes of keys and values of one token."""
    figure, axes, plt = start_picture()
    last = samples[-1][0]
    full = per_token * last / MB
    axes.plot([0, last], [0, full], color="#d9730d", linewidth=2.2)
    axes.plot([tokens for tokens, _ in samples], [above / MB for _, above in samples], color="#2f81f7", linewidth=2.2)
    note = {"textcoords": "offset points", "ha": "right"}
    axes.annotate(f"a full cache: {full:,.0f} MB", (last * 0.8, full * 0.8), (-8, 4), color="#d9730d", **note)
    label = f"minillm, {args.slots:,} slots: {samples[-1][1] / MB:,.0f} MB"
    axes.annotate(label, (last, samples[-1][1] / MB), (0, 6), color="#2f81f7", **note)
    axes.set(xlim=(0, last * 1.01), ylim=(0, full * 1.05), xlabel=f"tokens read of {args.book.name}")
    axes.set_ylabel("memory above the\nloaded model (MB)")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    what = f"{args.book.name} through {args.model}, {args.slots} slots, policy {args.policy}, chunks of {args.chunk}"
    save_picture(figure, args.svg, describe(what, args.threads, __file__))
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("book", type=Path)
    parser.add_argument("--model", default="minillm-demo")
    parser.add_argument("--slots", type=int, default=512)
    parser.add_argument("--policy", default="hashevict")
    parser.add_argument("--chunk", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--svg", type=Path, metavar="PATH", help="draw the picture there")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    llm = LLM.load(args.model, budget=args.slots, policy=args.policy, chunk=args.chunk, device="cpu")
    llm.generate("x", max_tokens=1)  # every weight has been touched
    base = held().now
    samples: list[tuple[int, int]] = [(0, 0)]
    times = [time.perf_counter()]
    early = 0

    def note(done: int, total: int | None) -> None:  # noqa: ARG001
        nonlocal early
        samples.append((done, held().now - base))
        times.append(time.perf_counter())
        if done <= EARLY:
            early = held().peak

    result = llm.stream(pieces(args.book), raw=True, max_tokens=8, ignore_eos=True, progress=note).finish()
    late, usage = held().peak, result.usage
    full = [i for i, (tokens, _) in enumerate(samples) if tokens > args.slots]
    tenth = max(1, len(full) // 10)

    def speed(first: int, last: int) -> float:
        return (samples[last][0] - samples[first][0]) / (times[last] - times[first])

    begin, end = speed(full[0], full[tenth]), speed(full[-1 - tenth], full[-1])
    config = llm.checkpoint.config
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * llm.plan.dtype.itemsize
    print(f"{usage.prompt_tokens:,} tokens of {args.book.name}; seen {usage.seen_tokens:,}, kept {usage.kept_tokens:,}")
    print(
        f"peak of the first {EARLY:,} tokens {early / MB:.1f} MB, of all {late / MB:.1f} MB: {(late - early) / MB:+.1f}"
    )
    print(f"first tenth {begin:,.0f} tok/s, last tenth {end:,.0f} tok/s: {100 * (end / begin - 1):+.1f}%")
    print(
        f"a full cache would hold {per_token * usage.seen_tokens / MB:,.0f} MB; this one {llm.plan.nbytes / MB:.1f} MB"
    )
    if args.svg:
        draw(samples, per_token, args)


if __name__ == "__main__":
    main()
