"""Options that several commands share, and how they become objects.  Imports nothing heavy.

A default of None means "not given": what then applies is settled where it is known (by the policy, the checkpoint, or
the prompt), and said in the help text.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import SCHEMES
from ..errors import SamplingError

if TYPE_CHECKING:
    from ..sampling import SamplingParams


def add_hub_options(parser: argparse.ArgumentParser) -> None:
    """--model, and where it may come from."""
    group = parser.add_argument_group("model")
    group.add_argument("--model", metavar="NAME", help="alias, hub id or folder (default: the embedded demo model)")
    group.add_argument("--revision", metavar="REV", help="branch, tag or commit on the hub")
    group.add_argument("--offline", action="store_true", help="never ask the network")


def add_json_option(parser: argparse.ArgumentParser) -> None:
    """--json."""
    parser.add_argument("--json", action="store_true", help="print one JSON object on one line")


def add_model_options(parser: argparse.ArgumentParser, *, draws: bool = True) -> None:
    """Which model, in which precision, where and on how many threads; --seed and --json for what draws and ends."""
    add_hub_options(parser)
    group = parser.add_argument_group("computation")
    group.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help="precision (default: auto)"
    )
    group.add_argument(
        "--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="where to compute (default: auto)"
    )
    group.add_argument(
        "--weights",
        choices=("auto", *SCHEMES),
        default="auto",
        help="quantise linear layers while loading: int8 (activations rounded to 8 bits, too), int8-a16 (they are "
        "not), int4 (default: auto, as stored)",
    )
    group.add_argument(
        "--backend",
        choices=("auto", "reference", "cpu", "triton"),
        default="auto",
        help="who computes (default: auto, see info)",
    )
    group.add_argument(
        "--threads", type=positive, metavar="N", help="CPU threads (default: the cores this process may use)"
    )
    if draws:
        group.add_argument("--seed", type=int, metavar="N", help="of the draws (default: a fresh one, reported)")
        add_json_option(parser)


def add_cache_options(parser: argparse.ArgumentParser) -> None:
    """The memory budget and what happens when it is reached."""
    group = parser.add_argument_group("memory")
    group.add_argument(
        "--budget",
        metavar="B",
        help="what is kept: a fraction of the context (0.3), tokens (2048) or bytes (512MiB); default: everything",
    )
    group.add_argument(
        "--memory",
        metavar="SIZE",
        help="what the whole process may hold (6GiB): never more, or it stops; without --budget the largest that fits",
    )
    group.add_argument("--context", type=positive, metavar="TOKENS", help="length that a fraction is a fraction of")
    group.add_argument(
        "--chunk", type=positive, metavar="TOKENS", default=256, help="tokens read at once (default: 256)"
    )
    group.add_argument(
        "--policy",
        metavar="NAME",
        help="full, window, hashevict, hashevict-key, hashevict-plus, random, l2, keydiff, exact, h2o, scissorhands, "
        "tova, snapkv or fastgen (default: hashevict-plus under a budget, else full)",
    )
    group.add_argument(
        "--policy-option",
        type=assignment,
        action="append",
        metavar="NAME=VALUE",
        help="of the policy, such as decay=0.9; repeatable",
    )
    group.add_argument(
        "--hash-bits", type=int, metavar="P", help="bits of a hash code (of hashevict and hashevict-key)"
    )
    group.add_argument("--sinks", type=int, metavar="N", help="first tokens never evicted (default: min(4, slots/16))")
    group.add_argument(
        "--recent", type=int, metavar="N", help="latest tokens never evicted (default: slots/4; /3 in hashevict-plus)"
    )
    group.add_argument("--evict-every", type=int, metavar="N", help="slots freed at once (default: slots/16, 1 to 32)")
    group.add_argument("--policy-seed", type=int, metavar="N", help="of the policy's random numbers (default: 0)")
    group.add_argument(
        "--layer-budget",
        default="uniform",
        metavar="SHAPE",
        help="uniform, pyramid, first-layers-full, or a weight for each layer as in 3,2,1 (default: uniform)",
    )
    group.add_argument(
        "--kv-dtype", choices=("auto", "int8"), default="auto", help="precision of the cache (default: the model's)"
    )
    group.add_argument(
        "--positions",
        choices=("absolute", "window"),
        help="past the trained length: window never looks further back than that, absolute extrapolates (default: "
        "window; absolute for policy full)",
    )
    group.add_argument(
        "--on-overflow",
        choices=("evict", "warn", "error"),
        default="evict",
        help="when the slots are full: evict, say so once, or refuse (default: evict)",
    )


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """How tokens are drawn and when to stop; without them the checkpoint's own defaults, else greedy."""
    group = parser.add_argument_group("sampling (defaults: the checkpoint's own, else greedy)")
    group.add_argument("--temperature", type=float, metavar="T", help="0 is greedy, 1 the model's own distribution")
    group.add_argument("--top-k", type=int, metavar="K", help="only the K best tokens (0: off)")
    group.add_argument("--top-p", type=float, metavar="P", help="only the best tokens that together reach P (1: off)")
    group.add_argument(
        "--min-p", type=float, metavar="P", help="only tokens at least P times as likely as the best (0: off)"
    )
    group.add_argument("--repetition-penalty", type=float, metavar="X", help="divide what was seen by X (1: off)")
    group.add_argument("--presence-penalty", type=float, metavar="X", help="subtract X from what was answered (0: off)")
    group.add_argument("--frequency-penalty", type=float, metavar="X", help="subtract X per occurrence (0: off)")
    group.add_argument(
        "--logit-bias", type=id_and_value, action="append", metavar="ID:VALUE", help="add VALUE to a logit; repeatable"
    )
    group.add_argument("--stop", action="append", metavar="TEXT", help="end the answer before TEXT; repeatable")
    group.add_argument("--stop-token-id", type=int, action="append", metavar="ID", help="end at this token; repeatable")
    group.add_argument("--ignore-eos", action="store_true", help="go on after the model's end-of-sequence tokens")
    group.add_argument("--min-tokens", type=int, metavar="N", help="no end before N tokens")
    group.add_argument("--max-tokens", type=int, metavar="N", help="longest answer (default: 512)")
    group.add_argument("--logprobs", type=int, metavar="N", help="log-probabilities of each token and the N best")


def model_folder(args: argparse.Namespace) -> Path:
    """The folder of the model that `add_hub_options` names, with its small files; raises ModelNotFoundError."""
    from ..hub import EMBEDDED, resolve

    return resolve(args.model or EMBEDDED, revision=args.revision, offline=args.offline, weights=False)


def sampling_from_args(args: argparse.Namespace, defaults: Mapping[str, Any]) -> SamplingParams:
    """What was given on the command line, over the checkpoint's `defaults` (keys are fields of SamplingParams).

    Raises SamplingError for values out of range, and for filters that cannot take effect because the result is greedy.
    """
    from ..sampling import SamplingParams

    given = {
        "temperature": args.temperature,
        "top_k": args.top_k,
        "top_p": args.top_p,
        "min_p": args.min_p,
        "repetition_penalty": args.repetition_penalty,
        "presence_penalty": args.presence_penalty,
        "frequency_penalty": args.frequency_penalty,
        "logit_bias": dict(args.logit_bias) if args.logit_bias else None,
        "seed": args.seed,
        "stop": tuple(args.stop) if args.stop else None,
        "stop_token_ids": tuple(args.stop_token_id) if args.stop_token_id else None,
        "ignore_eos": args.ignore_eos or None,
        "min_tokens": args.min_tokens,
        "max_tokens": args.max_tokens,
        "logprobs": args.logprobs,
    }
    given = {name: value for name, value in given.items() if value is not None}
    params = SamplingParams(**{**defaults, **given})
    idle = [f"--{name.replace('_', '-')}" for name in ("top_k", "top_p", "min_p") if name in given]
    if idle and params.temperature == 0:
        raise SamplingError(f"{' and '.join(idle)} cannot take effect at temperature 0: add --temperature 0.8, say")
    return params


def positive(text: str) -> int:
    """An argparse type: a whole number of at least 1."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least 1")
    return int(text)


def assignment(text: str) -> str:
    """An argparse type: NAME=VALUE."""
    if not text.partition("=")[2]:
        raise argparse.ArgumentTypeError(f"{text!r} must be a name, an equals sign and a value, as in decay=0.9")
    return text


def id_and_value(text: str) -> tuple[int, float]:
    """An argparse type: "17:-2.5" -> (17, -2.5)."""
    token_id, _, value = text.partition(":")
    try:
        return int(token_id), float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} must be a token id, a colon and a number, as in 17:-2.5") from None
