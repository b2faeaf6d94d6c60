"""Which tensors a model wants, how big they become in memory, and whether a folder has exactly these.

From configurations and headers alone: nothing here reads a byte of weights.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import init
from torch.overrides import TorchFunctionMode

from . import quant
from .backends import linear_cuda
from .backends.linear import has_int4
from .config import ModelConfig
from .errors import CheckpointError
from .fused import Fusion
from .headers import DTYPE_OF, FLOATS, PICKLES, Stored, in_brief, stored_tensors
from .model import Transformer
from .quant import Scheme

HARMLESS = re.compile(r".*\.rotary_emb\.(inv_freq|cos_cached|sin_cached)")  # old exports: recomputed from the config
DTYPES: Mapping[str, torch.dtype] = {  # what may be asked for
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


class Wanted(NamedTuple):
    """A tensor that a checkpoint must have."""

    shape: tuple[int, ...]
    dtypes: tuple[str, ...]  # as safetensors names them


def wanted_tensors(model: Transformer, scheme: str | None) -> dict[str, Wanted]:
    """What a folder must have, by name: the parameters, or codes and scales where linear layers are in `scheme`."""
    found = {name: Wanted(tuple(parameter.shape), FLOATS) for name, parameter in model.named_parameters()}
    if scheme is None:
        return found
    name_of = {dtype: name for name, dtype in DTYPE_OF.items()}
    for module, linear in linear_layers(model):
        bits = Scheme(scheme).bits(module, linear.in_features)
        del found[f"{module}.weight"]
        for part, (shape, dtype) in quant.shapes(linear.out_features, linear.in_features, bits).items():
            found[f"{module}.{part}"] = Wanted(shape, (name_of[dtype],))
    return found


def linear_layers(model: Transformer) -> list[tuple[str, nn.Linear]]:
    """The linear layers by name, the output projection last."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]


@dataclass(frozen=True)
class Weights:
    """How big the weights of a model become.

    tensors: numbers in each tensor that is kept in the model's dtype, and the dtype in which it is stored.  quantised:
    bytes of codes and scales.  largest: of what is converted in one piece, numbers and the dtype in which they are
    stored; None where tensors are converted one by one, or not at all.  origin: who says so.
    """

    tensors: tuple[tuple[int, torch.dtype], ...]
    origin: str
    quantised: int = 0
    largest: tuple[int, torch.dtype] | None = None

    @property
    def packed(self) -> bool:
        """Whether they are kept in an order of their own, see fused.py."""
        return self.largest is not None

    def nbytes(self, dtype: torch.dtype) -> int:
        """Bytes once loaded as `dtype`."""
        return sum(count for count, _ in self.tensors) * dtype.itemsize + self.quantised

    def converted(self, dtype: torch.dtype) -> int:
        """Bytes that loading as `dtype` holds for a moment beside the model: the largest thing that is converted.

        What is packed is read into one piece of `dtype` first; what is stored otherwise is there as it is stored, too.
        """
        if self.largest is not None:
            count, stored = self.largest
            return count * (dtype.itemsize + (0 if stored == dtype else stored.itemsize))
        return max((count * stored.itemsize for count, stored in self.tensors if stored != dtype), default=0)


def has_weights(folder: Path) -> bool:
    """Whether there are weights in a folder, be it pickles or some shards of many."""
    return any(path.suffix in (".safetensors", *PICKLES) for path in folder.iterdir())


def weights_of(
    folder: Path | None,
    config: ModelConfig,
    remote: Mapping[str, Stored] | None = None,
    fusion: Fusion | None = None,
    scheme: Scheme | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
) -> Weights:
    """What headers say about the weights, those given or those in `folder`; what the config says where there are none.

    fusion, scheme, dtype, device: how they will be kept, see `loader.load_model`.  Raises CheckpointError if there are
    weights in `folder` and they are pickles, or if tensors do not fit `config`.
    """
    model, stored = empty_model(config), remote
    if stored is None and folder is not None and has_weights(folder):
        stored = stored_tensors(folder)
    default = DTYPES.get(str(config.dtype), torch.float32)
    origin = "config.json"
    kinds: dict[str, torch.dtype] = {}
    if stored is not None:
        check_fit(folder or Path(), config, stored)
        origin = "the headers of its files" if remote is None else "the hub's headers"
        kinds = {name: DTYPE_OF[entry.dtype] for name, entry in stored.items()}

    def zeros(shape: tuple[int, int]) -> torch.dtype | None:
        if fusion is not None:
            return None if has_int4(fusion.dtype) else fusion.dtype
        return dtype if linear_cuda.keeps_zeros(shape, device or torch.device("cpu"), dtype) else None

    quantised, replaced = 0, set()
    for module, linear in linear_layers(model) if scheme is not None else []:
        shape = linear.out_features, linear.in_features
        quantised += _code_bytes(scheme, module, shape, zeros(shape))
        replaced.add(f"{module}.weight")
    if scheme is not None and config.tie_word_embeddings:  # the head is kept once more, see fused.py
        quantised += _code_bytes(scheme, "lm_head", (config.vocab_size, config.hidden_size), None)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    dtypes = {name: kinds.get(name, kinds.get(name.replace(".weight", ".codes"), default)) for name in sizes}
    largest = None
    if fusion is not None:
        steps = [step.names for step in fusion.steps(model)]
        largest = max(
            ((sum(sizes[name] for name in names), dtypes[names[0]]) for names in steps), key=lambda part: part[0]
        )
    kept = tuple((sizes[name], dtypes[name]) for name in sizes if name not in replaced)
    return Weights(kept, origin, quantised, largest)


def _code_bytes(scheme: Scheme | None, module: str, shape: tuple[int, int], zeros: torch.dtype | None) -> int:
    """Bytes of a linear layer; zeros: the dtype in which torch's 4-bit operators, where they serve, want them."""
    assert scheme is not None
    bits = scheme.bits(module, shape[1])
    parts = {name: prod(size) * dtype.itemsize for name, (size, dtype) in quant.shapes(*shape, bits).items()}
    if bits == 4 and zeros is not None:
        parts["scales"] *= zeros.itemsize  # from one number in two bytes to two, scale and zero, of this dtype
    return sum(parts.values())


def empty_model(config: ModelConfig) -> Transformer:
    """The network without storage: names, shapes and nothing else, whatever its size."""
    with _NoInitialValues(), torch.device("meta"):
        return Transformer(config)


class _NoInitialValues(TorchFunctionMode):
    """Leaves new weights as they are: random values on the meta device mean nothing, and import 76 MB in 1.8 s."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (init.kaiming_uniform_, init.uniform_, init.normal_):
            return kwargs["tensor"]
        return func(*args, **kwargs)


def check_fit(folder: Path, config: ModelConfig, stored: Mapping[str, Stored]) -> list[str]:
    """The wanted tensors' names in file order; CheckpointError unless `stored` has exactly these, in their shapes."""
    config = config.whole
    wanted = wanted_tensors(empty_model(config), config.stored_scheme)
    ignored = {name for name in stored if HARMLESS.fullmatch(name)}
    if config.tie_word_embeddings:
        ignored.add("lm_head.weight")
    both = [name for name in wanted if name in stored]
    complaints = {
        "missing": [name for name in wanted if name not in stored],
        "unexpected": [name for name in stored if name not in wanted and name not in ignored],
        "misshapen": [
            f"{name} is {list(stored[name].shape)} instead of {list(wanted[name].shape)}"
            for name in both
            if stored[name].shape != wanted[name].shape
        ],
        "in an unsupported dtype": [
            f"{name} is {stored[name].dtype}" for name in both if stored[name].dtype not in wanted[name].dtypes
        ],
    }
    found = [f"{len(names)} {what} ({in_brief(names)})" for what, names in complaints.items() if names]
    if not found:
        return sorted(wanted, key=lambda name: (stored[name].file, stored[name].begin))
    remedy = "download the checkpoint again, or correct its config.json"
    if config.stored_scheme is not None:
        remedy = "quantise it again"
    if complaints["missing"] == ["lm_head.weight"]:
        remedy = (
            'if the model shares its embedding, set "tie_word_embeddings": true in config.json, else download again'
        )
    if complaints["in an unsupported dtype"]:
        remedy = f"use a checkpoint that is not quantised ({', '.join(FLOATS)})"
    files = sorted({entry.file.name for entry in stored.values()})
    raise CheckpointError(
        f"the tensors in {folder} are not those of its config.json ({config.architecture}): "
        f"{'; '.join(found)}; files read: {in_brief(files)}; {remedy}"
    )
