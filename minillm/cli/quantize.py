"""`minillm quantize`: a checkpoint once more, with its linear layers in 8 or 4 bits."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ..config import STORED_SCHEMES
from ..units import size
from .options import add_json_option
from .report import Meter, say


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `quantize` to the command line."""
    parser = subparsers.add_parser(
        "quantize",
        help="write a checkpoint with its linear layers in 8 or 4 bits",
        description="Write a checkpoint with its linear layers in 8 or 4 bits, which loads faster than to quantise "
        "while loading (--weights) and takes less disk. Embeddings, norms and biases stay as they are; the output "
        "projection has 8 bits.",
    )
    parser.add_argument("model", metavar="MODEL", help="alias, hub id or folder")
    parser.add_argument("-o", "--output", metavar="FOLDER", required=True, help="a new folder")
    parser.add_argument("--weights", choices=STORED_SCHEMES, default="int8", help="bits (default: int8)")
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit on the hub")
    parser.add_argument("--offline", action="store_true", help="never ask the network")
    add_json_option(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Quantise tensor by tensor; a line on stderr, or a JSON object, says what became of the bytes."""
    from ..checkpoint import Checkpoint
    from ..loader import save_quantised
    from ..quant import Scheme

    checkpoint = Checkpoint.open(args.model, device="cpu", revision=args.revision, offline=args.offline)
    target, meter = Path(args.output), Meter("quantising", "tensors")
    before, after = save_quantised(
        checkpoint.folder, checkpoint.config, target, Scheme(args.weights), progress=meter.update
    )
    if args.json:
        print(json.dumps({"folder": str(target), "weights": args.weights, "bytes": after, "bytes_before": before}))
    else:
        say(f"{target}: {size(after)} in {args.weights}, from {size(before)}")
    return 0
