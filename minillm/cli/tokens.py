"""`minillm tokens`: what a text becomes before the model sees it."""

from __future__ import annotations

import argparse
import json

from .interrupt import ctrl_c_ends_at_once
from .options import add_hub_options, add_json_option, model_folder
from .prompt_text import add_text_options, read_text


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `tokens` to the command line."""
    parser = subparsers.add_parser(
        "tokens", help="show the tokens of a text", description="Print the id and the piece of every token of a text."
    )
    add_text_options(parser)
    parser.add_argument("--no-bos", action="store_true", help="without the beginning-of-sequence token")
    add_hub_options(parser)
    add_json_option(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """One line `id<TAB>piece` per token, or one JSON object with `token_ids` and `pieces`."""
    pieces = read_text(args)
    with ctrl_c_ends_at_once():
        from ..tokenizer import Tokenizer

    tokenizer = Tokenizer.from_folder(model_folder(args))
    ids = tokenizer.encode_stream(pieces, bos=not args.no_bos)  # [n]
    if args.json:
        token_ids = ids.tolist()
        print(
            json.dumps({"token_ids": token_ids, "pieces": [tokenizer.piece(i) for i in token_ids]}, ensure_ascii=False)
        )
    else:
        for block in ids.split(4096):
            for token_id in block.tolist():
                print(f"{token_id}\t{printable(tokenizer.piece(token_id))}")
    return 0


def printable(piece: str) -> str:
    """A piece on one line: line ends, tabs and other invisible characters (but spaces) as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in piece)
