"""What comes from the Hugging Face hub: the hub's cache on this disk, downloads, headers of what is not here yet.

Through huggingface_hub, which keeps its cache, its token and its environment variables (HF_HOME, HF_TOKEN,
HF_ENDPOINT), and which takes longer to import than most of us: names that are folders never come here (hub.py).  This
module must not know what is in the files, but for config.json: a model we cannot run is refused before its weights are
fetched.
"""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

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
NETWORK_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]  # of httpx or requests, as its version has it
READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)


def resolve(
    repo: str, *, revision: str | None, offline: bool, cache_dir: Path | None, progress: bool, weights: bool
) -> Path:
    """The folder of a repository; downloads only what is not in the cache.  See `hub.resolve`."""
    cached = _cached(repo, revision, cache_dir, weights)
    if cached is not None:
        return cached
    if offline:
        wanted = f"{repo} at revision {revision}" if revision else repo
        raise ModelNotFoundError(f"{wanted} is not in the cache and downloads are off; run once without --offline")
    return download(repo, revision, cache_dir, progress, weights)


def remote_tensors(repo: str, commit: str) -> dict[str, Stored] | None:
    """Every tensor of a repository, from its headers; None where that cannot be found out."""
    try:
        with _progress_bars(False):
            found = HfApi().get_safetensors_metadata(repo, revision=commit)
    except (OSError, NETWORK_ERROR, RuntimeError, NotASafetensorsRepoError, SafetensorsParsingError):
        return None
    return {
        tensor: Stored(Path(file), str(info.dtype), tuple(info.shape), *info.data_offsets)
        for file, header in found.files_metadata.items()
        for tensor, info in header.tensors.items()
    }


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


def download(repo: str, revision: str | None, cache_dir: Path | None, progress: bool, weights: bool) -> Path:
    """The folder of the newest version, of which only what is not in the cache is fetched."""
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
