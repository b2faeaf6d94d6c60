"""Memory against tokens: what a cache that keeps everything costs, and what a budget costs.

    python tools/plot_memory.py [--model FOLDER] [--slots 512] [--tokens 8192] [--svg tools/memory.svg]

Feeds the same random tokens to the same weights in a fresh process per contender, reads the process's resident memory
(VmRSS, from /proc/self/status: Linux only) after every chunk, prints a table and draws a picture.  Zero is the process
with the model loaded and warm: every weight has been touched by one chunk that went through a cache of its own.  The
peer is transformers with the cache that its `generate` makes by default.  Without --model, a random checkpoint in
Llama's shape (8 layers, hidden 512, 8 heads of 64: 32 KiB of keys and values per token in float32) is made for the
occasion: memory does not depend on what the weights are.
"""

from __future__ import annotations

import argparse
import datetime
import html
import importlib.util
import json
import platform
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from minillm.checkpoint import Checkpoint
from minillm.config import ModelConfig
from minillm.generate import feed
from minillm.loader import save_checkpoint
from minillm.memory import held
from minillm.model import Transformer

MB = 1e6
CONTENDERS = {  # name -> label in the picture, colour for white and for black, where on its line it stands
    "transformers": ("transformers, its default cache", "#d9730d", 0.5),  # it rises: there is room below it
    "full": ("minillm, no budget", "#808080", 1.0),
    "hashevict": ("minillm, {slots:,} slots", "#2f81f7", 1.0),
}
Sample = tuple[int, int, int]  # tokens read, bytes of keys and values, resident bytes above the loaded model


def random_checkpoint(folder: Path, *, layers: int, hidden: int) -> None:
    """A checkpoint in Llama's shape that both libraries read; its KV heads are as many as its heads, of 64 each."""
    config = ModelConfig.from_hf(
        {
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": 4096,
            "hidden_size": hidden,
            "intermediate_size": hidden * 11 // 4,
            "num_hidden_layers": layers,
            "num_attention_heads": hidden // 64,
            "num_key_value_heads": hidden // 64,
            "max_position_embeddings": 131_072,
            "rms_norm_eps": 1e-5,
            "hidden_act": "silu",
        }
    )
    torch.manual_seed(0)
    save_checkpoint(folder, Transformer(config), config)


def minillm_run(args: argparse.Namespace, note: Callable[[int, int], None]) -> None:
    """Feed the tokens through minillm's own loop; `note(tokens read, KV bytes)` once warm and after every chunk.

    KV bytes are what is allocated, codes and positions included: all of it before the first token.
    """
    checkpoint = Checkpoint.open(str(args.model), dtype=args.dtype, device="cpu")
    model, tokens = checkpoint.load_model(), random_tokens(args, checkpoint.config.vocab_size)
    for _ in feed(model, checkpoint.plan(budget=8).allocate(checkpoint.device), tokens[:, : args.chunk], args.chunk):
        pass
    note(0, 0)
    budget = args.slots if args.worker == "hashevict" else None
    cache = checkpoint.plan(budget=budget, policy=args.worker, context=args.tokens).allocate(checkpoint.device)
    note(0, cache.nbytes)
    for _ in feed(model, cache, tokens, args.chunk):
        note(cache.seen[0], cache.nbytes)


def transformers_run(args: argparse.Namespace, note: Callable[[int, int], None]) -> None:
    """The same through transformers' model, with the cache and attention that its `generate` uses by default."""
    from transformers import AutoModelForCausalLM, DynamicCache

    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype))
    tokens = random_tokens(args, model.config.vocab_size)
    warm, cache = DynamicCache(config=model.config), DynamicCache(config=model.config)
    model(tokens[:, : args.chunk].long(), past_key_values=warm, use_cache=True, logits_to_keep=1)
    del warm
    note(0, 0)
    for piece in tokens.split(args.chunk, 1):  # [1, chunk]
        model(piece.long(), past_key_values=cache, use_cache=True, logits_to_keep=1)
        note(cache.get_seq_length(), sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers))


def random_tokens(args: argparse.Namespace, vocabulary: int) -> torch.Tensor:
    """The same ids [1, n] for every contender."""
    return torch.randint(vocabulary, (1, args.tokens), generator=torch.Generator().manual_seed(0), dtype=torch.int32)


def work(args: argparse.Namespace) -> None:
    """In a fresh process: run one contender and print its samples as one line of JSON."""
    torch.set_num_threads(args.threads)
    samples: list[Sample] = []
    base = 0

    def note(tokens: int, kv_bytes: int) -> None:
        nonlocal base
        now = held().now
        base = base or now
        samples.append((tokens, kv_bytes, now - base))

    with torch.inference_mode():
        (transformers_run if args.worker == "transformers" else minillm_run)(args, note)
    print(json.dumps(samples))


def measure(name: str, args: argparse.Namespace, model: Path) -> list[Sample]:
    """Run `work` for one contender in a fresh process."""
    options = {"--worker": name, "--model": model, "--slots": args.slots, "--tokens": args.tokens}
    options |= {"--chunk": args.chunk, "--dtype": args.dtype, "--threads": args.threads}
    command = [sys.executable, __file__, *(str(word) for pair in options.items() for word in pair)]
    print(f"plot_memory: measuring {name}", file=sys.stderr, flush=True)
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"plot_memory: {name} failed with exit code {done.returncode}; its own words are above")
    return [(tokens, kv, above) for tokens, kv, above in json.loads(done.stdout.splitlines()[-1])]


def table(runs: dict[str, list[Sample]]) -> str:
    """Tokens in steps of two, and of each contender KV MB and resident MB above the loaded model."""
    head = "".join(f"{name:>22}" for name in runs)
    lines = [f"{'':>8}{head}", f"{'tokens':>8}" + f"{'KV MB':>11}{'RSS MB':>11}" * len(runs)]
    columns = [{tokens: (kv, above) for tokens, kv, above in samples} for samples in runs.values()]
    common = sorted(set.intersection(*(set(column) for column in columns)))
    last = common[-1]
    shown = [0, *(tokens for tokens in common if tokens and last % tokens == 0 and (last // tokens).bit_count() == 1)]
    for tokens in shown:
        cells = (f"{column[tokens][0] / MB:>11.1f}{column[tokens][1] / MB:>11.1f}" for column in columns)
        lines.append(f"{tokens:>8,}" + "".join(cells))
    return "\n".join(lines)


def start_picture() -> tuple[Any, Any, Any]:
    """(figure, axes, pyplot): no title, labels at line ends, transparent, in colours that read on white and black."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot as plt

    grey = dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), "#808080")
    mpl.rcParams.update({"font.size": 11, "svg.hashsalt": "memory"} | grey)
    figure, axes = plt.subplots(figsize=(7.2, 3.6), layout="constrained")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#808080", alpha=0.25, linewidth=0.8)
    return figure, axes, plt


def save_picture(figure: Any, svg: Path, description: str) -> None:
    """Write the picture, with its description inside."""
    figure.savefig(svg, transparent=True, metadata={"Date": None})
    picture = svg.read_text("utf-8")
    at = picture.index(">", picture.index("<svg")) + 1
    svg.write_text(f"{picture[:at]}\n <desc>{html.escape(description)}</desc>{picture[at:]}", "utf-8")


def draw(runs: dict[str, list[Sample]], args: argparse.Namespace, description: str) -> None:
    """Resident memory against tokens, one line per contender."""
    figure, axes, _ = start_picture()
    drawn = {
        name: samples for name, samples in runs.items() if name != "full"
    }  # all allocated at once: a flat line too
    top = max(above for samples in drawn.values() for *_, above in samples) / MB
    for name, samples in drawn.items():
        label, colour, along = CONTENDERS[name]
        axes.plot(
            [tokens for tokens, *_ in samples], [above / MB for *_, above in samples], color=colour, linewidth=2.2
        )
        tokens, _, above = samples[int(along * (len(samples) - 1))]
        text = f"{label.format(slots=args.slots)}: {samples[-1][2] / MB:,.0f} MB"
        aligned = {"ha": "right", "va": "bottom"} if along == 1 else {"ha": "left", "va": "top"}
        axes.annotate(
            text,
            (tokens, above / MB),
            (0, 4 if along == 1 else -4),
            textcoords="offset points",
            color=colour,
            **aligned,
        )
    axes.set(xlim=(0, args.tokens * 1.01), ylim=(0, top * 1.15), xlabel="tokens read")
    axes.set_ylabel("memory above the\nloaded model (MB)")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    save_picture(figure, args.svg, description)


def describe(what: str, threads: int, script: str) -> str:
    """Where, when and with what the numbers were measured."""
    cpu = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.partition(":")[2].strip()
            break
    libraries = ", ".join(f"{name} {version(name)}" for name in ("minillm", "transformers", "torch"))
    command = shlex.join(["python", f"tools/{Path(script).name}", *(Path(word).name for word in sys.argv[1:])])
    return (
        f"Resident memory above the loaded model against tokens read: {what}. "
        f"Measured {datetime.date.today()} on {cpu}, {threads} thread(s), {libraries}, by: {command}"
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="a checkpoint; default: a random one")
    parser.add_argument("--slots", type=int, default=512, help="the budget")
    parser.add_argument("--tokens", type=int, default=8_192, help="how many are read")
    parser.add_argument("--chunk", type=int, default=256)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--svg", type=Path, default=Path(__file__).with_name("memory.svg"), metavar="PATH")
    parser.add_argument("--quick", action="store_true", help="a small model and 1,024 tokens: does it work at all?")
    parser.add_argument("--worker", choices=list(CONTENDERS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.quick:
        args.slots, args.tokens, args.chunk = 64, 1024, 64
    if args.tokens % args.chunk:
        parser.error(f"--tokens {args.tokens} is not a multiple of --chunk {args.chunk}")
    return args


def main() -> None:
    args = parse()
    if args.worker:
        work(args)
        return
    if sys.platform != "linux":
        raise SystemExit("plot_memory: reads /proc/self/status, which only Linux has")
    for package, extra in (("matplotlib", "lab"), ("transformers", "test")):
        if importlib.util.find_spec(package) is None:
            raise SystemExit(f"plot_memory: needs {package}: pip install 'minillm[{extra}]', or pip install {package}")
    with tempfile.TemporaryDirectory() as folder:
        model = args.model or Path(folder)
        if args.model is None:
            random_checkpoint(model, layers=2 if args.quick else 8, hidden=128 if args.quick else 512)
        runs = {name: measure(name, args, model) for name in CONTENDERS}
    print(table(runs))
    shape = "a random checkpoint of 8 layers, hidden 512" if args.model is None else args.model.name
    draw(runs, args, describe(f"{shape}, {args.dtype}, chunks of {args.chunk}", args.threads, __file__))
    print(f"plot_memory: wrote {args.svg}", file=sys.stderr)


if __name__ == "__main__":
    main()
