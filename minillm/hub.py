"""From the name a user gives to a folder on this disk: a path, `weights/<name>`, the hub's cache, or a download.

Downloads go through huggingface_hub, which keeps its cache, its token and its environment variables (HF_HOME, HF_TOKEN,
HF_ENDPOINT).  This module must not know what is in the files, but for config.json: a model we cannot run is refused
before its weights are fetched.
"""

from __future__ import annotations

import difflib
import errno
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from types import MappingProxyType

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    NotASafetensorsRepoError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    SafetensorsParsingError,
)
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from .errors import GatedModelError, ModelNotFoundError
from .headers import INDEX, SINGLE, Stored
from .loader import read_config

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
CONFIG_FILES = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
]
WEIGHT_FILES = ["*.safetensors", INDEX]
UNWANTED = ["consolidated*", "*/*"]  # Meta's and Mistral's own layouts, and every subfolder
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
NETWORK_ERROR: type[Exception] = HfHubHTTPError.__bases__[
    0
]  # of httpx or requests, as huggingface_hub's version has it
READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)


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
    cached = _cached(repo, revision, cache_dir, weights)
    if cached is not None:
        return cached
    if offline:
        wanted = f"{repo} at revision {revision}" if revision else repo
        raise ModelNotFoundError(f"{wanted} is not in the cache and downloads are off; run once without --offline")
    return _download(repo, revision, cache_dir, progress, weights)


def pull(name: str, *, revision: str | None = None, cache_dir: Path | None = None, progress: bool = True) -> Path:
    """Like `resolve`, but asks the hub for the newest version even of what is in the cache."""
    return _local(name, revision) or _download(_hub_id(name), revision, cache_dir, progress, weights=True)


def remote_tensors(name: str, folder: Path) -> dict[str, Stored] | None:
    """Every tensor of a model on the hub of which `folder` is the snapshot: from its headers, without a download.

    None where that cannot be found out.
    """
    if folder.parent.name != "snapshots":
        return None
    try:
        with _progress_bars(False):
            found = HfApi().get_safetensors_metadata(_hub_id(name), revision=folder.name)
    except (OSError, NETWORK_ERROR, RuntimeError, NotASafetensorsRepoError, SafetensorsParsingError):
        return None
    return {
        tensor: Stored(Path(file), str(info.dtype), tuple(info.shape), *info.data_offsets)
        for file, header in found.files_metadata.items()
        for tensor, info in header.tensors.items()
    }


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


def _cached(repo: str, revision: str | None, cache_dir: Path | None, weights: bool) -> Path | None:
    """The complete snapshot of a repository in the cache, without asking the network."""
    try:
        folder = _snapshot(repo, revision, cache_dir, CONFIG_FILES + WEIGHT_FILES * weights, offline=True)
    except LocalEntryNotFoundError:
        return None
    needed = {"config.json"}
    try:
        if weights:
            index = folder / INDEX
            needed |= set(json.loads(index.read_text("utf-8"))["weight_map"].values()) if index.is_file() else {SINGLE}
        return folder if all((folder / file).is_file() for file in needed) else None
    except (ValueError, KeyError, AttributeError, TypeError, OSError):
        return None  # a damaged index: downloading again is the remedy


def _download(repo: str, revision: str | None, cache_dir: Path | None, progress: bool, weights: bool) -> Path:
    cache = cache_dir or Path(constants.HF_HUB_CACHE)
    try:
        with _progress_bars(progress):
            folder = _snapshot(repo, revision, cache, CONFIG_FILES)
            read_config(folder)  # refuse what we cannot run before fetching gigabytes of it
            if not weights:
                return folder
            _check_weights(repo, revision, cache)
            return _snapshot(repo, revision, cache, CONFIG_FILES + WEIGHT_FILES)
    except (OSError, NETWORK_ERROR, RuntimeError) as error:  # RuntimeError: how hf_xet reports its failures
        raise _explained(error, repo, revision, cache) from error


def _snapshot(
    repo: str, revision: str | None, cache_dir: Path | None, patterns: list[str], *, offline: bool = False
) -> Path:
    return Path(
        snapshot_download(
            repo,
            revision=revision,
            cache_dir=cache_dir,
            allow_patterns=patterns,
            ignore_patterns=UNWANTED,
            local_files_only=offline,
        )
    )


def _check_weights(repo: str, revision: str | None, cache: Path) -> None:
    """Refuse a repository without safetensors, and a download that the disk has no room for."""
    info = HfApi().model_info(repo, revision=revision, files_metadata=True)
    files = {file.rfilename: file.size or 0 for file in info.siblings or []}
    unwanted = {name for name in files for pattern in UNWANTED if fnmatch(name, pattern)}
    weights = [name for name in files if name.endswith(".safetensors") and name not in unwanted]
    if not weights:
        raise ModelNotFoundError(
            f"{repo} has no .safetensors files in Hugging Face's layout, and pickle files (*.bin, *.pth) are never "
            "read because opening them can run code; choose another repository, or a conversion of this one"
        )
    snapshot = cache / f"models--{repo.replace('/', '--')}" / "snapshots" / str(info.sha)
    needed = sum(files[name] for name in weights if not (snapshot / name).exists())
    disk = next(parent for parent in (snapshot, *snapshot.parents) if parent.exists())
    free = shutil.disk_usage(disk).free
    if needed > free:
        raise ModelNotFoundError(
            f"no disk space for {repo}: {needed / 1e9:.1f} GB to download, {free / 1e9:.1f} GB free under {disk}; "
            "make room, or name another disk with HF_HOME"
        )


def _explained(error: Exception, repo: str, revision: str | None, cache: Path) -> ModelNotFoundError:
    """What went wrong and what to do, in one line, out of what huggingface_hub raised."""
    page = f"https://huggingface.co/{repo}"
    if isinstance(error, GatedRepoError):
        return GatedModelError(
            f"{repo} is gated: accept its licence on {page}, then give your token with `hf auth login` or HF_TOKEN; "
            "models that need neither: tinyllama, smollm2-*, qwen2.5-*"
        )
    if isinstance(error, RepositoryNotFoundError):
        return ModelNotFoundError(
            f"the hub has no repository {repo} (or it is private); check {page}, or log in with `hf auth login`"
        )
    if isinstance(error, RevisionNotFoundError):
        return ModelNotFoundError(f"{repo} has no revision {revision!r}; its branches and tags are on {page}/tree/main")
    if isinstance(error, LocalEntryNotFoundError):
        return ModelNotFoundError(
            f"{repo} is not in the cache and the hub cannot be reached ({_reason(error)}); check the network and retry"
        )
    if isinstance(error, OSError) and error.errno in NO_SPACE:
        return ModelNotFoundError(
            f"no disk space left in {cache} while downloading {repo}; make room and run again (finished files are "
            "kept), or name another disk with HF_HOME"
        )
    if isinstance(error, OSError) and error.errno in READ_ONLY:
        return ModelNotFoundError(
            f"the cache folder {cache} cannot be written ({error.strerror}: {error.filename}); "
            "name another one with HF_HOME"
        )
    return ModelNotFoundError(f"the download of {repo} failed ({_reason(error)}); run again: finished files are kept")


def _reason(error: BaseException) -> str:
    """The first line of what lies behind an error."""
    cause = error.__cause__ or error
    lines = str(cause).splitlines() or [""]
    return f"{type(cause).__name__}: {lines[0]}"


@contextmanager
def _progress_bars(shown: bool) -> Iterator[None]:
    """huggingface_hub's bars (on stderr), or none for a while."""
    if shown or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
