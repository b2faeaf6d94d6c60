"""`minillm pull`: bring a model's files onto this machine, and say where they are."""

from __future__ import annotations

import argparse

from .interrupt import ctrl_c_ends_at_once


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `pull` to the command line."""
    parser = subparsers.add_parser("pull", help="download a model", description="Download a model; prints its folder.")
    parser.add_argument("model", metavar="MODEL", help="alias or hub id")
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit on the hub")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Download and print the folder; raises ModelNotFoundError or GatedModelError."""
    with ctrl_c_ends_at_once():
        from ..hub import pull

    print(pull(args.model, revision=args.revision))
    return 0
