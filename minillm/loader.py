"""From a checkpoint folder to a model: strict, streaming, safetensors only.

Bytes that are used as they are stored stay memory-mapped; whatever is cast or moved is mapped, converted and unmapped
tensor by tensor, so that the peak while loading is the model plus one tensor.  A folder that does not fit is refused
before the first byte of weights is read.  This module must not know names or downloads (hub.py), nor what the tensors
mean (model.py).
"""

from __future__ import annotations

import ctypes
import json
import platform
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import init
from torch.overrides import TorchFunctionMode

from .config import ModelConfig, token_ids
from .errors import CheckpointError, ConfigError
from .headers import DTYPE_OF, PICKLES, SINGLE, Stored, in_brief, stored_tensors
from .model import Transformer

DTYPES: Mapping[str, torch.dtype] = {  # what may be asked for
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
GENERATION_DEFAULTS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
HARMLESS = re.compile(r".*\.rotary_emb\.(inv_freq|cos_cached|sin_cached)")  # old exports: recomputed from the config


def read_config(folder: Path) -> ModelConfig:
    """The model's shape, with the end-of-sequence ids of config.json and generation_config.json together.

    Raises ConfigError or CheckpointError; warns of an unreadable generation_config.json and goes on without.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{folder} has no config.json: name a folder in Hugging Face's layout")
    try:
        raw = json.loads(path.read_text("utf-8"))
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path} is not readable JSON ({error}); download it again") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path} holds a {type(raw).__name__}, not an object; download it again")
    config = ModelConfig.from_hf(raw)
    try:
        more = token_ids(_generation_config(folder).get("eos_token_id"))
    except ConfigError as error:
        warnings.warn(f"{folder / 'generation_config.json'} is ignored: {error}", stacklevel=2)
        more = ()
    return replace(config, eos_token_ids=tuple(dict.fromkeys(config.eos_token_ids + more)))


def read_generation_defaults(folder: Path) -> dict[str, float | int]:
    """The sampling parameters that the authors recommend, in our names; empty where they recommend greedy decoding."""
    raw = _generation_config(folder)
    if raw.get("do_sample") is not True:
        return {}
    return {key: raw[key] for key in GENERATION_DEFAULTS if type(raw.get(key)) in (int, float)}


def _generation_config(folder: Path) -> dict[str, Any]:
    """generation_config.json; empty if there is none or, with a warning, if it is broken (as Llama 3.2's once was)."""
    path = folder / "generation_config.json"
    if not path.is_file():
        return {}
    try:
        raw = json.loads(path.read_text("utf-8"))
    except (ValueError, OSError) as error:
        warnings.warn(f"{path} is ignored: not readable JSON ({error})", stacklevel=3)
        return {}
    if not isinstance(raw, dict):
        warnings.warn(f"{path} is ignored: it holds a {type(raw).__name__}, not an object", stacklevel=3)
        return {}
    return raw


def choose_dtype(requested: str, config: ModelConfig, device: torch.device) -> torch.dtype:
    """What to compute in.  `auto`: the checkpoint's dtype, or the nearest one that the device computes well in.

    Decided by features and never by timing, so that the same machine always answers the same.  A CPU multiplies float16
    unusably slowly, and bfloat16 too without instructions for it (transformers#27994: 115 s against 12.5 s): both
    become bfloat16 where there are some, else float32.  Raises ConfigError for a name that is not in DTYPES.
    """
    if requested in DTYPES:
        return DTYPES[requested]
    if requested != "auto":
        raise ConfigError(f"dtype is {requested!r}; choose one of auto, {', '.join(DTYPES)}")
    if config.dtype not in ("bfloat16", "float16"):  # float64 gains nothing, and an unnamed dtype is float32
        return torch.float32
    if device.type == "cpu":
        return torch.bfloat16 if cpu_has_bfloat16() else torch.float32
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float16
    return DTYPES[config.dtype]


def cpu_has_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 in hardware: AVX512-BF16 or AMX on x86, the BF16 extension on ARM."""
    try:
        if platform.machine().lower() in ("x86_64", "amd64"):
            return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except (AttributeError, RuntimeError):  # private names: a torch that lacks them gets what always works
        return False


@dataclass(frozen=True)
class Weights:
    """How big the tensors of a model are: elements and stored dtype of each.  origin: who says so."""

    tensors: tuple[tuple[int, torch.dtype], ...]
    origin: str

    def nbytes(self, dtype: torch.dtype) -> int:
        """Bytes once loaded as `dtype`."""
        return sum(count for count, _ in self.tensors) * dtype.itemsize

    def converted(self, dtype: torch.dtype) -> int:
        """Bytes of the largest tensor, as it is stored, that loading as `dtype` has to convert."""
        return max((count * stored.itemsize for count, stored in self.tensors if stored != dtype), default=0)


def has_weights(folder: Path) -> bool:
    """Whether there are weights in a folder, be it pickles or some shards of many."""
    return any(path.suffix in (".safetensors", *PICKLES) for path in folder.iterdir())


def weights_of(folder: Path | None, config: ModelConfig, remote: Mapping[str, Stored] | None = None) -> Weights:
    """What headers say about the weights, those given or those in `folder`; what the config says where there are none.

    Raises CheckpointError if there are weights in `folder` and they are pickles, or if tensors do not fit `config`.
    """
    model, stored = empty_model(config), remote
    if stored is None and folder is not None and has_weights(folder):
        stored = stored_tensors(folder)
    if stored is None:
        dtype = DTYPES.get(str(config.dtype), torch.float32)
        return Weights(tuple((parameter.numel(), dtype) for parameter in model.parameters()), "config.json")
    names = _check_fit(folder or Path(), model, stored)
    found = tuple((prod(stored[name].shape), DTYPE_OF[stored[name].dtype]) for name in names)
    return Weights(found, "the headers of its files" if remote is None else "the hub's headers")


def load_model(
    folder: Path,
    config: ModelConfig,
    *,
    dtype: torch.dtype,
    device: torch.device,
    progress: Callable[[int, int], None] | None = None,
) -> Transformer:
    """The model of `folder`, frozen, in `dtype` on `device`; `progress(bytes read, bytes in all)` follows every tensor.

    Raises CheckpointError, before any weight is read, if a file is damaged or the tensors are not exactly the config's.
    """
    model, stored = empty_model(config), stored_tensors(folder)
    names = _check_fit(folder, model, stored)
    done, total = 0, sum(stored[name].nbytes for name in names)
    maps = {file: _map(file) for file in {entry.file for entry in stored.values()}}  # free until a page is touched
    for name in names:
        entry = stored[name]
        if DTYPE_OF[entry.dtype] == dtype and device.type == "cpu":
            tensor = _view(maps[entry.file], entry)  # the file stays mapped as long as one of its tensors lives
        else:  # a mapping of its own, so that the pages go as soon as the tensor is converted
            tensor = _view(_map(entry.file), entry).to(device, dtype)
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, nn.Parameter(tensor, requires_grad=False))
        done += entry.nbytes
        if progress is not None:
            progress(done, total)
    return model


def save_checkpoint(
    folder: Path, model: Transformer, config: ModelConfig, *, dtype: torch.dtype = torch.float32
) -> None:
    """Write model.safetensors and config.json as transformers and `load_model` read them; a crash leaves the old files.

    The weights are cast to `dtype` one tensor at a time.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    name_of = {kind: name for name, kind in DTYPE_OF.items()}
    end = 0
    for name, parameter in model.named_parameters():
        begin, end = end, end + parameter.numel() * dtype.itemsize
        header[name] = {"dtype": name_of[dtype], "shape": list(parameter.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-(len(text) + 8) % 64)  # tensors that are mapped start on a cache line
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f"{SINGLE}.tmp"
    with temporary.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for parameter in model.parameters():
            tensor = parameter.detach().to("cpu", dtype).contiguous()
            file.write((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr()))
    temporary.replace(folder / SINGLE)
    temporary = folder / "config.json.tmp"
    raw = replace(config, dtype=str(dtype).removeprefix("torch.")).to_hf()
    temporary.write_text(json.dumps(raw, indent=2) + "\n", "utf-8")
    temporary.replace(folder / "config.json")


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


def _map(file: Path) -> Tensor:
    """The bytes of a file, read when touched; private, so that nothing is ever written back."""
    size = file.stat().st_size
    return torch.from_file(str(file), shared=False, size=size, dtype=torch.uint8)  # [bytes]


def _view(file: Tensor, entry: Stored) -> Tensor:
    """The tensor at its place in the mapped file; copied only where an old exporter did not align it."""
    raw = file[entry.begin : entry.end]  # [bytes]
    if entry.begin % DTYPE_OF[entry.dtype].itemsize:
        raw = raw.clone()  # [bytes]
    return raw.view(DTYPE_OF[entry.dtype]).view(entry.shape)  # [*entry.shape]


def _check_fit(folder: Path, model: Transformer, stored: Mapping[str, Stored]) -> list[str]:
    """The model's tensor names in file order; CheckpointError unless `stored` has exactly these, in their shapes."""
    wanted = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    ignored = {name for name in stored if HARMLESS.fullmatch(name)}
    if model.config.tie_word_embeddings:
        ignored.add("lm_head.weight")
    both = [name for name in wanted if name in stored]
    complaints = {
        "missing": [name for name in wanted if name not in stored],
        "unexpected": [name for name in stored if name not in wanted and name not in ignored],
        "misshapen": [
            f"{name} is {list(stored[name].shape)} instead of {list(wanted[name])}"
            for name in both
            if stored[name].shape != wanted[name]
        ],
        "in an unsupported dtype": [
            f"{name} is {stored[name].dtype}" for name in both if stored[name].dtype not in DTYPE_OF
        ],
    }
    found = [f"{len(names)} {what} ({in_brief(names)})" for what, names in complaints.items() if names]
    if not found:
        return sorted(wanted, key=lambda name: (stored[name].file, stored[name].begin))
    remedy = "download the checkpoint again, or correct its config.json"
    if complaints["missing"] == ["lm_head.weight"]:
        remedy = (
            'if the model shares its embedding, set "tie_word_embeddings": true in config.json, else download again'
        )
    if complaints["in an unsupported dtype"]:
        remedy = f"use a checkpoint that is not quantised ({', '.join(DTYPE_OF)})"
    files = sorted({entry.file.name for entry in stored.values()})
    raise CheckpointError(
        f"the tensors in {folder} are not those of its config.json ({model.config.architecture}): "
        f"{'; '.join(found)}; files read: {in_brief(files)}; {remedy}"
    )
