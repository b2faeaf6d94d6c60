"""What a saved session holds, and how it comes back.

Tensors of the cache as they are, but for what a policy computes anew (`cache.fixed`) and for slots that hold nothing,
which are cleared: neither evicted tokens nor those of another request are ever written.  Beside them four numbers, the
state of the sampler, and as JSON the sampling parameters and whatever else the session was given to keep.  This module
must not know the format of the file (snapshot.py) or what makes two settings differ (fingerprint.py).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .errors import SamplingError, SessionError
from .fingerprint import check_fingerprint, fingerprint
from .sampling import Sampler, SamplingParams
from .slots import NOTHING
from .snapshot import Snapshot, open_snapshot, save_snapshot, snapshot_bytes, specs_of

if TYPE_CHECKING:
    from .budget import CachePlan
    from .checkpoint import Checkpoint
    from .session import Session

NUMBERS, NOTES = "session.numbers", "session.notes"
NOTES_BLOCK = 4096  # bytes: notes are padded to a multiple of it


def session_bytes(session: Session) -> int:
    """Exact size of the file that `save_session` writes, whatever the session goes through until then."""
    return snapshot_bytes(specs_of(cache_tensors(session) | small_tensors(session)), settings(session))


@torch.inference_mode()
def save_session(session: Session, path: Path) -> None:
    """Write the file at once or not at all.  Raises SessionError where it cannot be written."""
    session.llm.cache.take_back_()
    for layer in session.llm.cache.layers:
        empty = layer.positions == NOTHING  # [B, Hkv, S]
        for name in ("keys", "values", "scales", "flags", *layer.slot_state):
            tensor = layer.tensors().get(name)
            if tensor is not None:
                tensor.masked_fill_(empty.view(*empty.shape, *[1] * (tensor.ndim - 3)), 0)
    save_snapshot(path, cache_tensors(session) | small_tensors(session), settings(session))


@torch.inference_mode()
def load_session(session: Session, path: Path) -> None:
    """Fill the session, its sampler and its LLM's cache; nothing has changed where SessionError is raised.

    But for a disk that fails after the file has been checked: the cache then belongs to nobody.
    """
    llm, tensors, small = session.llm, cache_tensors(session), small_tensors(session)
    with open_snapshot(path) as snapshot:
        check_fingerprint(path, snapshot.metadata, settings(session))
        small[NOTES] = torch.empty(snapshot.length(NOTES), dtype=torch.uint8)
        small = {name: torch.empty_like(tensor) for name, tensor in small.items()}
        snapshot.require(specs_of(tensors | small))
        snapshot.fill_(small)
        sampler, notes = _read_notes(session, small, snapshot)
        llm.owner = None
        snapshot.fill_(tensors)
    session.sampler, session.params, session.notes = sampler, sampler.params, notes
    _set_numbers(session, small[NUMBERS])


def copy_session_(source: Session, target: Session) -> None:
    """Make `target`, of the same plan, what `source` is."""
    target.notes = dict(source.notes)
    target.sampler.restore_(source.sampler.state())
    if source.latest is not None:
        with torch.inference_mode():
            target.llm.cache.copy_(source.llm.cache)
        _set_numbers(target, small_tensors(source)[NUMBERS])


def settings(session: Session) -> dict[str, str]:
    """The fingerprint of all that computes the session."""
    llm = session.llm
    return fingerprint(llm.checkpoint, llm.plan, chunk=llm.chunk)


def check_settings(path: Path, checkpoint: Checkpoint, plan: CachePlan, *, chunk: int) -> None:
    """Raise SessionError at once for a file that could not be loaded; needs no weights."""
    with open_snapshot(path, check=False) as snapshot:
        check_fingerprint(path, snapshot.metadata, fingerprint(checkpoint, plan, chunk=chunk))


def saved_notes(path: Path) -> dict[str, Any]:
    """The notes in a file, and nothing else of it.  Raises SessionError."""
    with open_snapshot(path, check=False) as snapshot:
        notes = torch.empty(snapshot.length(NOTES), dtype=torch.uint8)
        try:
            snapshot.fill_({NOTES: notes})
            return dict(json.loads(bytes(notes.tolist()))["notes"])
        except (ValueError, KeyError, TypeError) as error:
            raise SessionError(f"{path} was not written by minillm: its notes say {error!r}") from error


def cache_tensors(session: Session) -> dict[str, Tensor]:
    """All of the cache that varies, by name: the tensors themselves."""
    cache = session.llm.cache
    return {
        f"layers.{layer.index}.{name}": tensor
        for layer in cache.layers
        for name, tensor in layer.tensors().items()
        if name not in cache.fixed
    }


def small_tensors(session: Session) -> dict[str, Tensor]:
    """The rest, by name: numbers, the sampler's state, and notes as JSON."""
    numbers = [session.seen, *(session.pending or [NOTHING]), int(session.pending_pinned), session.pinned]
    text = json.dumps({"params": session.params.to_json(), "notes": session.notes}).encode()
    text += b" " * (-len(text) % NOTES_BLOCK)
    return {
        NUMBERS: torch.tensor(numbers),  # [4] int64
        NOTES: torch.frombuffer(bytearray(text), dtype=torch.uint8),  # [bytes]
        **{f"sampler.{name}": tensor for name, tensor in session.sampler.state().items()},
    }


def _read_notes(session: Session, small: dict[str, Tensor], snapshot: Snapshot) -> tuple[Sampler, dict[str, Any]]:
    try:
        found = json.loads(bytes(small[NOTES].tolist()))
        sampler = session.new_sampler(SamplingParams.from_json(found["params"]))
        sampler.restore_({name: small[f"sampler.{name}"] for name in sampler.state()})
        return sampler, dict(found["notes"])
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, SamplingError) as error:
        raise SessionError(f"{snapshot.path} was not written by minillm: its notes say {error!r}") from error


def _set_numbers(session: Session, numbers: Tensor) -> None:
    """Take over the cache, whose tensors have just been filled."""
    seen, pending, pending_pinned, session.pinned = numbers.tolist()
    session.pending, session.pending_pinned = [] if pending == NOTHING else [pending], bool(pending_pinned)
    session.llm.cache.seen = [seen]
    if session.pinned:
        session.llm.cache.note_flags()
    session.latest = session.llm.owner = object()
