"""`minillm verify`: what a memory budget costs on a text of one's own, and what it saves."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ConfigError, ContextFullError, PromptError
from ..units import size
from .opening import open_checkpoint, plan_cache
from .options import add_cache_options, add_model_options, positive
from .prompt_text import read_text
from .report import Meter, facts_before, remembered, say, with_memory
from .tokens import printable

if TYPE_CHECKING:
    from torch import Tensor

    from ..checkpoint import Checkpoint
    from ..lab.verify import Comparison, Verification

LABELS: tuple[str, ...] = ("", "same next token", "KL(full || budget), nats", "  worst", "nats per token, full")
LABELS += ("  budget", "perplexity, full", "  budget")


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `verify` to the command line."""
    parser = subparsers.add_parser(
        "verify",
        help="what a budget costs on a text: agreement, KL, attention lost",
        description="Read a text with the full cache and, side by side, within a budget (or with --kv-dtype int8), and "
        "compare what they predict at every token. Needs the memory of both.",
    )
    parser.add_argument("name", nargs="?", metavar="MODEL", help="the same as --model")
    parser.add_argument("--file", type=Path, metavar="PATH", help="read the text from a UTF-8 file (default: stdin)")
    parser.add_argument("--tokens", type=positive, metavar="N", help="take the first N tokens only (default: all)")
    add_model_options(parser)
    add_cache_options(parser)
    parser.set_defaults(run=run, text=None)


def run(args: argparse.Namespace) -> int:
    """A table on stdout, or one JSON object."""
    if args.name is not None:
        if args.model is not None:
            raise ConfigError(f"two models were named, {args.name} and {args.model}: leave one of them out")
        args.model = args.name
    if args.memory is not None:
        raise ConfigError("--memory does not count the full cache that verify holds beside the budget: leave it out")
    if args.file is None and sys.stdin.isatty():
        raise PromptError("no text was given: pass it with --file PATH, or on stdin")
    text = read_text(args)
    checkpoint = open_checkpoint(args)

    from ..answer import LOGIT_ROWS
    from ..lab.verify import full_plan, require_comparable, verify
    from ..llm import LLM

    tokens = take(args, checkpoint, text)
    plan = plan_cache(args, checkpoint, context=len(tokens))
    require_comparable(plan, len(tokens))
    say(facts_before(checkpoint, plan))
    trained = checkpoint.config.max_position_embeddings
    if len(tokens) > trained:
        how = "sees a sliding window" if plan.position_mode == "window" else "is no yardstick, for it fails there"
        say(f"beyond the {trained:,} tokens that {checkpoint.name} was trained for the full cache {how}")
    beside = full_plan(plan, len(tokens)).nbytes
    say(f"beside it the full cache of {len(tokens):,} tokens, {size(beside)}")
    memory = checkpoint.memory_plan(plan, memory=args.memory, chunk=args.chunk, logit_rows=2 * LOGIT_ROWS)
    memory = replace(memory, base=memory.base + beside)
    memory.require()
    model = checkpoint.load_model(Meter("loading", "bytes").update)
    llm = LLM(checkpoint, model, plan, chunk=args.chunk, memory=memory)
    found = verify(llm, tokens, progress=Meter("comparing", "tokens").update)
    if args.json:
        print(with_memory(found.to_dict(), memory))
    else:
        for line in table(found):
            print(line)
    say(remembered(found.usage))
    return 0


def take(args: argparse.Namespace, checkpoint: Checkpoint, text: Iterable[str]) -> Tensor:
    """The text's token ids [n], as many as --tokens says; ContextFullError where the full cache is no yardstick for
    all of them.
    """
    from ..answer import collect
    from ..cache import MAX_POSITION

    trained = checkpoint.config.max_position_embeddings
    limit = args.context or (MAX_POSITION if args.positions == "window" else trained)
    tokens = collect(checkpoint.tokenizer.encode_pieces(text, bos=True), (args.tokens or limit) + 1)  # [n]
    if args.tokens is not None and len(tokens) > args.tokens:
        say(f"only the first {args.tokens:,} tokens of the text are taken, as --tokens says")
        tokens = tokens[: args.tokens]
    if len(tokens) > limit:
        why = "of --context" if args.context else f"that {checkpoint.name} was trained for"
        other = "raise --context" if args.context else "slide over all of it with --positions window"
        raise ContextFullError(
            f"the text is longer than the {limit:,} tokens {why}, where the full cache it is compared with ends: "
            f"take only its first ones with --tokens {limit}, or {other}"
        )
    return tokens


def table(found: Verification) -> Iterator[str]:
    """The lines that people read: one column for the whole text, one for what came after the first eviction."""
    parts = [found.overall] if found.after_eviction is None else [found.overall, found.after_eviction]
    heads = [f"all {found.overall.positions:,} positions", f"from the first eviction (token {parts[-1].start:,}) on"]
    columns = [(head, *_column(part)) for head, part in zip(heads, parts, strict=False)]
    for label, *cells in zip(LABELS, *columns, strict=True):
        yield f"{label:<24}" + "".join(f"{cell:>42}" for cell in cells)
    yield ""
    for divergence in dict.fromkeys(part.first_divergence for part in parts):
        if divergence is not None:
            full, budget, text = map(printable, (divergence.full, divergence.budget, divergence.text))
            yield f"differ first after token {divergence.position:,}: full '{full}', budget '{budget}', text '{text}'"
    if not any(lost.highest for lost in parts[-1].lost_mass):
        yield "attention mass lost: none"
    else:
        yield f"attention mass lost ({parts[-1].queries:,} queries): mean, KV heads, the least possible"
        for index, lost in enumerate(parts[-1].lost_mass):
            spread = f"{lost.lowest:.2%} to {lost.highest:.2%}"
            yield f"  layer {index:<4}{lost.mean:>8.2%}{spread:>22}{lost.ideal:>9.2%}"
    yield f"bytes: full {size(found.full_bytes)}, budget {size(found.budget_bytes)}, saved {found.saved:.1%}"


def _column(part: Comparison) -> tuple[str, ...]:
    return (
        f"{part.agreement:.2%}",
        f"{part.kl:.5f}",
        f"{part.kl_worst:.4f} after token {part.kl_worst_position:,}",
        f"{part.full_nats_per_token:.4f}",
        f"{part.budget_nats_per_token:.4f}",
        f"{part.full_perplexity:.3f}",
        f"{part.budget_perplexity:.3f}",
    )
