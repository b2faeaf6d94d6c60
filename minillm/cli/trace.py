"""`minillm trace`: the forgetting viewer, a page or a shaded text: which tokens a budget let go, and when."""

from __future__ import annotations

import argparse
import json
import math
import os
import secrets
import sys
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import BudgetError, ConfigError, PromptError
from ..units import size
from .opening import load, open_checkpoint, plan_cache
from .options import add_cache_options, add_model_options, positive
from .prompt_text import read_text
from .report import Meter, facts_before, remembered, say
from .tokens import printable

if TYPE_CHECKING:
    from torch import Tensor

    from ..checkpoint import Checkpoint
    from ..lab.trace import Trace

# From "no head holds it" to "every head does": in plain characters, and as grey behind the text.
SHADES = ".\u2591\u2592\u2593\u2588"
GREYS = ("2", "48;5;236;38;5;250", "48;5;241;38;5;255", "48;5;247;38;5;16", "48;5;254;38;5;16")
MEANINGS = ("none", "up to 1/3", "up to 2/3", "most", "all")
COLUMNS = 100
LISTED = 24


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `trace` to the command line."""
    parser = subparsers.add_parser(
        "trace",
        help="show which tokens were forgotten, and when",
        description="Read a text within a budget, and show when every layer and KV head let go of every token: as a "
        "page for the browser (-o), as shaded text (--text), or as data (--json).",
    )
    parser.add_argument("name", nargs="?", metavar="MODEL", help="the same as --model")
    parser.add_argument("--file", type=Path, metavar="PATH", help="read the text from a UTF-8 file (default: stdin)")
    parser.add_argument("--tokens", type=positive, metavar="N", help="take the first N tokens only (default: all)")
    parser.add_argument("-o", "--output", type=Path, metavar="PATH", help="write a page that needs nothing else")
    # Not `text`: that is where read_text looks for an argument that is the text.
    parser.add_argument("--text", action="store_true", dest="shaded", help="print the text, shaded")
    parser.add_argument("--at", type=positive, metavar="N", help="show the moment after N tokens (default: the end)")
    add_model_options(parser)
    add_cache_options(parser)
    parser.set_defaults(run=run, text=None)


def run(args: argparse.Namespace) -> int:
    """Shaded text or one JSON object on stdout; the path of the page where there is nothing else to print."""
    require_sensible(args)
    text = read_text(args)
    checkpoint = open_checkpoint(args)

    from ..lab.trace import trace

    tokens = take(args, checkpoint, text)
    if args.at is not None and args.at > len(tokens):
        raise PromptError(f"--at {args.at:,} is beyond the end: the text has {len(tokens):,} tokens")
    plan = plan_cache(args, checkpoint, context=len(tokens))
    plan.require_room(len(tokens))
    say(facts_before(checkpoint, plan))
    found = trace(load(args, checkpoint, plan), tokens, progress=Meter("reading", "tokens").update)
    if args.output is not None:
        page = found.to_html(args.at).encode()
        write(args.output, page)
        say(f"wrote {args.output}, {size(len(page))}: open it in a browser")
    if args.json:
        print(json.dumps(found.to_dict(), ensure_ascii=False))
    elif args.shaded:
        colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        for line in shaded(found, args.at or len(tokens), colour=colour):
            print(line)
    else:
        print(args.output)
    say(remembered(found.usage))
    return 0


def require_sensible(args: argparse.Namespace) -> None:
    """Raise, before anything is read, for options that contradict each other or a page that cannot be written."""
    if args.name is not None:
        if args.model is not None:
            raise ConfigError(f"two models were named, {args.name} and {args.model}: leave one of them out")
        args.model = args.name
    if args.memory is not None:
        raise ConfigError("--memory does not count the record that trace keeps: leave it out")
    if args.shaded and args.json:
        raise ConfigError("--text and --json would both print: leave one of them out")
    if args.output is None and not args.shaded and not args.json:
        raise ConfigError("say what to make of it: a page with -o trace.html, --text, or --json")
    if args.at is not None and args.output is None and not args.shaded:
        raise ConfigError("--at cannot take effect with --json, which holds every moment: leave it out")
    if args.output is not None and args.output.exists() and not args.output.is_file():
        raise ConfigError(f"{args.output} cannot be written: it is a folder or a device; name a file")
    if args.output is not None and not args.output.resolve().parent.is_dir():
        raise ConfigError(f"{args.output} cannot be written: there is no folder {args.output.resolve().parent}")
    if args.file is None and sys.stdin.isatty():
        raise PromptError("no text was given: pass it with --file PATH, or on stdin")


def take(args: argparse.Namespace, checkpoint: Checkpoint, text: Iterable[str]) -> Tensor:
    """The text's token ids [n], as many as --tokens says; BudgetError for more than a page can show."""
    from ..answer import collect
    from ..lab.trace import most_tokens

    limit = most_tokens(checkpoint.config.num_hidden_layers, checkpoint.config.num_key_value_heads)
    wanted = min(args.tokens or limit, limit)
    tokens = collect(checkpoint.tokenizer.encode_pieces(text, bos=True), wanted + 1)  # [n]
    if len(tokens) > limit and (args.tokens is None or args.tokens > limit):
        raise BudgetError(
            f"the text is longer than the {limit:,} tokens that can be shown for the layers and heads of "
            f"{checkpoint.name}: take only its first ones with --tokens {limit}"
        )
    if len(tokens) < 2:
        raise PromptError(f"a text of {len(tokens)} tokens has nothing to forget: give some text")
    if len(tokens) > wanted:
        say(f"only the first {wanted:,} tokens of the text are taken, as --tokens says")
    return tokens[:wanted]


def write(path: Path, page: bytes) -> None:
    """Whatever happens meanwhile, `path` is the old page or the new one, never a torn one."""
    path = path.resolve()  # through a link, which stays
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(page)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror or error}; name another with -o") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def shaded(found: Trace, after: int, *, colour: bool) -> Iterator[str]:
    """The text up to then: grey behind each token where there is colour, else a line of shades below each line."""
    layers, kv_heads, _ = found.gone.shape
    shares = found.shares(after).tolist()  # [after]
    levels = [4 if share == 1 else math.ceil(share * 3) for share in shares]
    legend = zip(GREYS if colour else SHADES, MEANINGS, strict=True)
    said = [f"\x1b[{mark}m {what} \x1b[0m" if colour else f"{mark} {what}" for mark, what in legend]
    yield (
        f"after {after:,} of {len(found.ids):,} tokens, held by ({layers} layers x {kv_heads} KV heads): "
        + "  ".join(said)
    )
    yield ""
    for line in wrapped(zip(visible(found)[:after], levels, strict=True)):
        yield from coloured(line) if colour else underlined(line)
    last = found.last_evicted(after, LISTED)
    yield ""
    if not last:
        yield "evicted so far: nothing"
    for eviction in last:
        name = printable(found.texts[eviction.position] or found.pieces[eviction.position])
        share = f"by {eviction.heads} of {layers * kv_heads}, {shares[eviction.position]:.0%} left"
        yield f"evicted when token {eviction.by:,} came: {eviction.position:,} '{name}' ({share})"


def visible(found: Trace) -> list[str]:
    """What to show of each token: its text, safe for a terminal, or its spelling in brackets where it adds none."""
    return [
        "\n".join(map(printable, text.split("\n"))) if text else f"[{printable(piece)}]"
        for text, piece in zip(found.texts, found.pieces, strict=True)
    ]


def wrapped(tokens: Iterable[tuple[str, int]]) -> Iterator[list[tuple[str, int]]]:
    """Lines of (character, level), of at most COLUMNS columns; a token's newline ends one."""
    line: list[tuple[str, int]] = []
    used = 0
    for text, level in tokens:
        for character in text:
            if character == "\n" or used + columns(character) > COLUMNS:
                yield line
                line, used = [], 0
            if character != "\n":
                line.append((character, level))
                used += columns(character)
    yield line


def columns(character: str) -> int:
    """How many columns of a terminal a character takes."""
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def coloured(line: list[tuple[str, int]]) -> Iterator[str]:
    """One line, with grey behind it."""
    pieces, now = [], None
    for character, level in line:
        if level != now:
            pieces.append(f"\x1b[0;{GREYS[level]}m")
            now = level
        pieces.append(character)
    yield "".join(pieces) + ("\x1b[0m" if line else "")


def underlined(line: list[tuple[str, int]]) -> Iterator[str]:
    """One line, and the shades of its characters below it."""
    yield "".join(character for character, _ in line)
    if line:
        yield "".join(SHADES[level] * columns(character) for character, level in line)
