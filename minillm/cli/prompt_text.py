"""Text that a user hands to a command: as an argument, on stdin, or in a file; read in pieces, however long it is."""

from __future__ import annotations

import argparse
import codecs
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from ..errors import PromptError

PIECE_BYTES = 1 << 16


def add_text_options(parser: argparse.ArgumentParser) -> None:
    """The positional text and --file, for `read_text`."""
    parser.add_argument("text", nargs="?", metavar="TEXT", help="the text; - or nothing reads stdin")
    parser.add_argument("--file", type=Path, metavar="PATH", help="read the text from a UTF-8 file")


def read_text(args: argparse.Namespace) -> Iterator[str]:
    """The text of `args.text` or `args.file` or stdin, in pieces of at most 64 KiB; line ends stay as they are.

    Raises PromptError at once where there is nothing to read, and while reading where the bytes are not UTF-8.
    """
    if args.file is not None:
        if args.text is not None:
            raise PromptError("both a text and --file were given: leave one of them out")
        _check_readable(args.file)
        return _read_file(args.file)
    if args.text is None and sys.stdin.isatty():
        raise PromptError("no text was given: pass it as an argument, with --file PATH, or on stdin")
    if args.text is None or args.text == "-":
        shared: Iterator[str] = args.team.shared(decode_utf8(sys.stdin.buffer, "stdin"))
        return shared
    try:
        args.text.encode()
    except UnicodeEncodeError as error:  # Python smuggles bytes that are not UTF-8 through arguments as surrogates
        raise PromptError(f"the text argument is not UTF-8: character {error.start} cannot be read") from None
    return iter([args.text])


def decode_utf8(source: BinaryIO, name: str) -> Iterator[str]:
    """Decode a stream piece by piece; raises PromptError naming the offset of the first byte that is not UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    consumed = 0
    while True:
        piece = source.read(PIECE_BYTES)
        held_back = len(decoder.getstate()[0])  # the start of a character that the last piece cut in two
        try:
            text = decoder.decode(piece, final=not piece)
        except UnicodeDecodeError as error:
            offset = consumed - held_back + error.start
            raise PromptError(
                f"{name} is not UTF-8 (byte {offset}): convert it first, for example with iconv"
            ) from None
        if text:
            yield text
        if not piece:
            return
        consumed += len(piece)


def _read_file(path: Path) -> Iterator[str]:
    with path.open("rb") as source:
        yield from decode_utf8(source, str(path))


def _check_readable(path: Path) -> None:
    """Now, and not after a model has been loaded for nothing."""
    if not path.exists():
        raise PromptError(f"{path}: no such file")
    if path.is_dir():
        raise PromptError(f"{path} is a folder: --file wants a text file")
    if not os.access(path, os.R_OK):
        raise PromptError(f"{path}: no permission to read it")
