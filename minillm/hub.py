"""From the name a user gives to a folder on this disk: a path, `weights/<name>`, or what the hub has (download.py)."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

from .errors import ModelNotFoundError
from .headers import Stored

EMBEDDED = "minillm-demo"  # the model in weights/<EMBEDDED>, shipped inside the wheel: what runs without --model

ALIASES: Mapping[str, str] = MappingProxyType(
    {
        "mistral-7b": "mistralai/Mistral-7B-Instruct-v0.3",
        "mistral-7b-v0.2": "mistralai/Mistral-7B-Instruct-v0.2",
        "mistral-7b-v0.1": "mistralai/Mistral-7B-Instruct-v0.1",
        "mistral-nemo": "mistralai/Mistral-Nemo-Instruct-2407",
        "ministral-8b": "mistralai/Ministral-8B-Instruct-2410",
        "codestral-22b": "mistralai/Codestral-22B-v0.1",
        "llama-2-7b": "meta-llama/Llama-2-7b-chat-hf",
        "llama-3-8b": "meta-llama/Meta-Llama-3-8B-Instruct",
        "llama-3.1-8b": "meta-llama/Llama-3.1-8B-Instruct",
        "llama-3.2-1b": "meta-llama/Llama-3.2-1B-Instruct",
        "llama-3.2-3b": "meta-llama/Llama-3.2-3B-Instruct",
        "tinyllama": "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
        "smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "smollm2-360m": "HuggingFaceTB/SmolLM2-360M-Instruct",
        "smollm2-1.7b": "HuggingFaceTB/SmolLM2-1.7B-Instruct",
        "qwen2.5-0.5b": "Qwen/Qwen2.5-0.5B-Instruct",
        "qwen2.5-1.5b": "Qwen/Qwen2.5-1.5B-Instruct",
        "qwen2.5-3b": "Qwen/Qwen2.5-3B-Instruct",
        "qwen2.5-7b": "Qwen/Qwen2.5-7B-Instruct",
        "qwen3-0.6b": "Qwen/Qwen3-0.6B",
        "qwen3-1.7b": "Qwen/Qwen3-1.7B",
        "qwen3-4b": "Qwen/Qwen3-4B",
        "qwen3-8b": "Qwen/Qwen3-8B",
    }
)

HUB_ID = re.compile(r"[A-Za-z0-9][\w-]*(\.[\w-]+)*/[A-Za-z0-9][\w-]*(\.[\w-]+)*", re.ASCII)  # org/name, no '..'
BARE = re.compile(r"[A-Za-z0-9][\w.-]*", re.ASCII)  # one name: neither a path nor a hub id


def resolve(
    name: str,
    *,
    revision: str | None = None,
    offline: bool = False,
    cache_dir: Path | None = None,
    progress: bool = True,
    weights: bool = True,
) -> Path:
    """The folder of a model named by path, alias or hub id; downloads only what is nowhere on this disk.

    `revision` is a branch, tag or commit of the hub; `cache_dir` replaces the hub's own; without `weights` the small
    files are enough, to plan before a download.  Raises ModelNotFoundError (or GatedModelError) with the remedy,
    ConfigError for a model that cannot be run.
    """
    folder = _local(name, revision)
    if folder is not None:
        return folder
    repo = _hub_id(name)
    from . import download  # only for what is on the hub: this takes 0.4 s, and 12 MB

    return download.resolve(
        repo, revision=revision, offline=offline, cache_dir=cache_dir, progress=progress, weights=weights
    )


def pull(name: str, *, revision: str | None = None, cache_dir: Path | None = None, progress: bool = True) -> Path:
    """Like `resolve`, but asks the hub for the newest version even of what is in the cache."""
    folder = _local(name, revision)
    if folder is not None:
        return folder
    repo = _hub_id(name)
    from . import download

    return download.download(repo, revision, cache_dir, progress, weights=True)


def remote_tensors(name: str, folder: Path) -> dict[str, Stored] | None:
    """Every tensor of a model on the hub of which `folder` is the snapshot: from its headers, without a download.

    None where that cannot be found out.
    """
    if folder.parent.name != "snapshots":
        return None
    from . import download

    return download.remote_tensors(_hub_id(name), folder.name)


def _local(name: str, revision: str | None) -> Path | None:
    """The folder that `name` is, or that carries it in a `weights` folder; None if it can only be on the hub."""
    found = next((folder for folder in _candidates(name) if (folder / "config.json").is_file()), None)
    if found is not None:
        if revision is not None:
            raise ModelNotFoundError(f"revision {revision!r} means nothing for the folder {found}; leave it out")
        return found
    path = _path(name)
    if name in ALIASES or (HUB_ID.fullmatch(name) and not path.exists()):
        return None
    if path.is_dir():
        raise ModelNotFoundError(f"folder {path} has no config.json; expected a model in Hugging Face's layout")
    if path.exists():
        raise ModelNotFoundError(f"{path} is a file; name the folder it is in")
    if not BARE.fullmatch(name):
        raise ModelNotFoundError(f"folder {path} does not exist, and {name!r} is no hub id (org/name)")
    return None


def _candidates(name: str) -> Iterator[Path]:
    """Where a model of this name may lie: as a path, then in the `weights` of here, of the wheel, of the repository."""
    if not name.strip():
        raise ModelNotFoundError("the model's name is empty; give a folder, a hub id (org/name) or an alias")
    yield _path(name)
    if BARE.fullmatch(name):
        package = Path(__file__).parent
        yield from (Path.cwd() / "weights" / name, package / "weights" / name)
        if (package.parent / "pyproject.toml").is_file():
            yield package.parent / "weights" / name


def _path(name: str) -> Path:
    return Path(name).expanduser() if name.startswith("~/") else Path(name)


def _hub_id(name: str) -> str:
    if HUB_ID.fullmatch(name):
        return name
    if name in ALIASES:
        return ALIASES[name]
    known = [alias for alias in (EMBEDDED, *ALIASES) if alias != name]
    near = difflib.get_close_matches(name.lower(), known, n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(known)}."
    raise ModelNotFoundError(f"unknown model {name!r}: {hint} A folder or a hub id (org/name) will do, too")
