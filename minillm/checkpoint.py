"""A checkpoint, opened: what its small files say at once, its weights when they are asked for.

Everything that can be wrong with a name, a configuration, a budget or a prompt is found before the weights are read.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from . import eviction, fingerprint, hub, inventory, loader
from .answer import LOGIT_ROWS
from .backends import linear_cuda, native
from .backends.linear import has_int8
from .budget import Budget, CachePlan
from .cache import KVCache
from .chat import ChatTemplate
from .config import ModelConfig
from .engine import rows_alike
from .errors import CheckpointError, ConfigError
from .fused import Fusion
from .memory import held, trim
from .model import Transformer
from .planner import MemoryPlan, size_of
from .quant import Scheme
from .shard import ALONE, Team, require_groups
from .tokenizer import Tokenizer

if TYPE_CHECKING:
    from .backends.graph import Steps

BACKENDS = ("auto", "reference", "cpu", "triton")
DEFAULT_CONTEXT = 8192  # tokens that a fraction is a fraction of, where neither the user nor the request says


@dataclass(frozen=True)
class Checkpoint:
    """A folder in Hugging Face's layout, and where and in which precision its model will run."""

    name: str
    folder: Path
    config: ModelConfig
    dtype: torch.dtype
    device: torch.device
    offline: bool = False
    scheme: Scheme | None = None  # of the linear layers; None = they are numbers in `dtype`
    backend: str = "reference"  # who computes: one of BACKENDS, decided
    team: Team = field(default=ALONE, compare=False)  # the processes that compute it together; `config` is of a part

    @classmethod
    def open(
        cls,
        name: str = hub.EMBEDDED,
        *,
        dtype: str = "auto",
        device: str = "auto",
        revision: str | None = None,
        offline: bool = False,
        weights: str = "auto",
        backend: str = "auto",
        with_weights: bool = True,
        team: Team = ALONE,
    ) -> Checkpoint:
        """Find a model by alias, hub id or folder (downloading it if need be) and read its config.json.

        dtype: auto, float32, bfloat16 or float16.  device: auto (CUDA where there is one, else the CPU), cpu, cuda or
        mps.  weights: "int8", "int8-a16" or "int4" quantises the linear layers, see Scheme; auto leaves them as stored.
        backend: who computes; auto is cpu for float32 and bfloat16 on the CPU, else reference.
        with_weights: False downloads only the small files, enough to plan.
        team: who computes it together; this process then opens its part.

        Raises ModelNotFoundError, ConfigError or CheckpointError.
        """
        place = choose_device(device)
        folder = hub.resolve(name, revision=revision, offline=offline, weights=with_weights)
        config = team.part_of(loader.read_config(folder))
        kind = loader.choose_dtype(dtype, config, place)
        chosen = choose_backend(backend, kind, place)
        scheme = choose_scheme(weights, config, chosen, place)
        return cls(name, folder, config, kind, place, offline, scheme, chosen, team)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Text to ids and back."""
        return Tokenizer.from_folder(self.folder)

    @cached_property
    def template(self) -> ChatTemplate | None:
        """How a conversation is written; None for a model that only continues text."""
        return ChatTemplate.from_folder(self.folder)

    @cached_property
    def sampling_defaults(self) -> dict[str, float | int]:
        """The sampling parameters that its authors recommend, by the names of SamplingParams."""
        return loader.read_generation_defaults(self.folder)

    @cached_property
    def eos_ids(self) -> frozenset[int]:
        """Every id that ends an answer: those of both config files and of the tokenizer."""
        return frozenset(self.config.eos_token_ids) | frozenset(self.tokenizer.eos_ids)

    @cached_property
    def digest(self) -> str:
        """16 hex digits that tell these weights from others; reads a little of them."""
        return fingerprint.model_digest(self.folder, self.config)

    @property
    def default_context(self) -> int:
        """The smaller of the model's context and 8,192."""
        return min(self.config.max_position_embeddings, DEFAULT_CONTEXT)

    def plan(
        self,
        *,
        budget: Budget | str | float | None = None,
        context: int | None = None,
        memory: str | int | None = None,
        chunk: int = 256,
        logit_rows: int = LOGIT_ROWS,
        reading: int | None = None,
        requests: int = 0,
        **options: Any,
    ) -> CachePlan:
        """The cache that a budget over a context becomes; nothing is allocated.  Options as in CachePlan.of.

        memory: bytes, or a size such as "6GiB", that the whole process may hold: where no budget is named, the largest
        is chosen that fits, up to the whole context.  Whether it does is for `memory_plan` to say.  chunk, logit_rows,
        reading, requests: see there.
        """
        whole = self.default_context if context is None else context
        plan = CachePlan.of(self.config, budget=budget, whole=whole, dtype=self.dtype, **options)
        if memory is None or budget is not None or options.get("policy") == "full":
            return plan
        needs = self.memory_plan(plan, chunk=chunk, logit_rows=logit_rows, reading=reading, requests=requests)
        largest = needs.largest(size_of(memory))
        return plan if largest is None else largest.cache

    def memory_plan(
        self,
        plan: CachePlan,
        *,
        memory: str | int | None = None,
        chunk: int = 256,
        logit_rows: int = LOGIT_ROWS,
        reading: int | None = None,
        requests: int = 0,
    ) -> MemoryPlan:
        """Every byte that this process will hold with a model and a cache; reads at most headers of the weights.

        memory: what it may hold.  chunk, logit_rows, reading, requests: see MemoryPlan.
        """
        promise = None if memory is None else size_of(memory)
        recorded = self.backend == "triton" and self.records(plan.allocate(torch.device("meta")))
        sizes = {"reading": reading, "requests": requests, "recorded": recorded}
        return MemoryPlan(plan, self.weights, self.base, self.device, chunk, logit_rows, promise, **sizes)  # type: ignore[arg-type]

    @cached_property
    def base(self) -> int:
        """Bytes that this process holds before it reads weights: Python, libraries, the tokenizer; the most in a team,
        so that all plan the same.

        Only what torch allocates counts on a CUDA device, where this is 0.
        """
        with suppress(CheckpointError):  # none there: whoever needs it will say so
            self.tokenizer  # noqa: B018
        trim()
        return self.team.most(held(self.device).now)

    @cached_property
    def weights(self) -> inventory.Weights:
        """Sizes and stored dtypes of the weights, from headers here or the hub; CheckpointError if they do not fit."""
        absent = not inventory.has_weights(self.folder)
        remote = hub.remote_tensors(self.name, self.folder) if absent and not self.offline else None
        fusion = Fusion(self.dtype, self.scheme) if self.backend == "cpu" else None
        return inventory.weights_of(
            self.folder, self.config, remote, fusion, self.scheme, dtype=self.dtype, device=self.device
        )

    def load_model(self, progress: Callable[[int, int], None] | None = None) -> Transformer:
        """Read the weights; `progress(bytes read, bytes in all)` follows every tensor."""
        model = loader.load_model(
            self.folder,
            self.config,
            dtype=self.dtype,
            device=self.device,
            scheme=self.scheme,
            backend=self.backend,
            progress=progress,
        )
        return self.team.join_(model)

    def records(self, cache: KVCache) -> bool:
        """Whether decode steps of a cache run as recordings (backends/graph.py); one on the meta device will do."""
        if self.backend != "triton" or self.team.ranks > 1:  # nobody has tried what ranks say to each other in a graph
            return False
        from .backends import graph

        return graph.refusal(cache, self.dtype) is None

    def recorded(self, model: Transformer, cache: KVCache, rows: int | None = None) -> Steps | None:
        """Recordings of the steps of so many rows (None: all), made now; None where steps are taken as they come."""
        if not self.records(cache):
            return None
        from .backends import graph

        most = rows or cache.rows
        return graph.Steps(
            model, cache, graph.recorder_for(cache.device, most), rows=most, fewest=max(rows_alike(model, most))
        )

    @property
    def evict_(self) -> Callable[..., None]:
        """`eviction.evict_` as the backend does it."""
        if self.backend != "triton":
            return eviction.evict_
        from .backends import triton

        return triton.evict_one_

    def served_by(self, cache: KVCache) -> dict[str, str]:
        """Who evicts, writes and attends in a decode step: "triton" or "torch"; nothing for other backends."""
        if self.backend != "triton":
            return {}
        from .backends import graph

        return graph.served_by(cache, self.dtype)

    @property
    def computed_by(self) -> str:
        """The backend, and what its rounding depends on."""
        has_native = self.backend == "cpu" and self.dtype == torch.bfloat16 and native.missing() is None
        return f"{self.backend} with native.c" if has_native else self.backend

    def weight_bytes(self) -> int:
        """Bytes of the weights once loaded."""
        return self.weights.nbytes(self.dtype)


def choose_scheme(requested: str, config: ModelConfig, backend: str, device: torch.device) -> Scheme | None:
    """The scheme of the weights: as asked for, or as stored; int8-a16 for int8 where nobody rounds activations.

    Those are rounded by the CPU backend, and by any other on a CUDA device that linear_cuda.py serves.
    Raises ConfigError where the two cannot go together.
    """
    stored = config.stored_scheme
    name = stored if requested == "auto" else requested
    if name is None:
        return None
    scheme = Scheme(name)
    require_groups(config, name)
    if requested != "auto" and stored is not None and stored != requested.partition("-")[0]:
        raise ConfigError(
            f"--weights {requested} was asked for, but the checkpoint is stored as {stored}; name the one that it was "
            "made from"
        )
    rounds = has_int8() if backend == "cpu" else linear_cuda.missing(device) is None
    return Scheme("int8-a16") if scheme.rounds_activations and not rounds else scheme


def choose_backend(requested: str, dtype: torch.dtype, device: torch.device) -> str:
    """`cpu`, `triton` or `reference`.  Raises ConfigError for a name that is not known, or that cannot serve."""
    if requested not in BACKENDS:
        raise ConfigError(f"backend is {requested!r}; choose one of {', '.join(BACKENDS)}")
    by_cpu = device.type == "cpu" and dtype in (torch.float32, torch.bfloat16)
    if requested == "auto":  # not triton: no GPU has run it yet
        if device.type == "cuda" and triton_missing(device) is None:
            warnings.warn(
                "the reference computes here, slowly: --backend triton is there to be fast, but no GPU has run it yet",
                stacklevel=2,
            )
        return "cpu" if by_cpu else "reference"
    if requested == "cpu" and not by_cpu:
        kind = str(dtype).removeprefix("torch.")
        raise ConfigError(
            f"backend cpu computes float32 and bfloat16 on the CPU, not {kind} on {device.type}; use --backend "
            "reference"
        )
    why = triton_missing(device) if requested == "triton" else None
    if why is not None:
        raise ConfigError(f"backend triton cannot serve: {why}; use --backend auto")
    return requested


def triton_missing(device: torch.device) -> str | None:
    """Why backends/triton.py does not run on a device; None where it does."""
    if find_spec("triton") is None:
        return "triton is not installed"
    from .backends import triton  # a second to import

    return triton.missing(device)


def choose_device(name: str) -> torch.device:
    """The device that a name means.  Raises ConfigError."""
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return torch.device("cuda" if available["cuda"] else "cpu")
    if name not in available:
        raise ConfigError(f"device is {name!r}; choose one of auto, {', '.join(available)}")
    if not available[name]:
        raise ConfigError(
            f"device {name} was asked for, but torch {torch.__version__} finds none here; use --device cpu"
        )
    return torch.device(name)
