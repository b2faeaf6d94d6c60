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
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .backends.linear import quantise
from .config import ModelConfig, token_ids
from .errors import CheckpointError, ConfigError
from .fused import Fusion, Read, unfused_steps
from .headers import DTYPE_OF, SINGLE, Stored, stored_tensors
from .inventory import DTYPES, check_fit, empty_model, wanted_tensors
from .model import Transformer
from .quant import Quantised, Scheme
from .shard import cut, is_added_once

RANDOM_NUMBERS = 1 << 22  # that the weights of a random model repeat
WEIGHT_FILES = re.compile(r"config\.json|.*\.(safetensors|index\.json|bin|pth|pt|ckpt|gguf)")
GENERATION_DEFAULTS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


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


def load_model(
    folder: Path,
    config: ModelConfig,
    *,
    dtype: torch.dtype,
    device: torch.device,
    scheme: Scheme | None = None,
    backend: str = "reference",
    progress: Callable[[int, int], None] | None = None,
) -> Transformer:
    """The model of `folder`, frozen, in `dtype` on `device`; `progress(bytes read, bytes in all)` follows every tensor.

    scheme: of the linear layers, which are quantised as they are read if they are not stored so.  backend: who computes
    it, see fused.py.  Raises CheckpointError, before any weight is read, if a file is damaged or the tensors are not
    exactly the config's.
    """
    model, stored = empty_model(config), stored_tensors(folder)
    names = check_fit(folder, config, stored)
    for name in names:
        part = cut(config, name, stored[name].shape)
        stored[name] = stored[name] if part is None else stored[name].part(*part)
    done, total = 0, sum(stored[name].nbytes for name in names)
    maps = {file: _map(file) for file in {entry.file for entry in stored.values()}}  # free until a page is touched

    def tensor(name: str, dtype: torch.dtype, out: Tensor | None, keep: bool) -> Tensor:
        nonlocal done
        entry = stored[name]
        as_stored = DTYPE_OF[entry.dtype] == dtype and device.type == "cpu"
        if keep and as_stored and not entry.pitch:
            found = _view(maps[entry.file], entry)  # the file stays mapped as long as one of its tensors lives
        elif as_stored:  # mapped pages would count, and come one by one
            found = _read_into(torch.empty(entry.shape, dtype=dtype) if out is None else out, entry)
        else:  # a mapping of its own, so that the pages go as soon as the tensor is converted
            columns = torch.empty(entry.shape if entry.pitch else 0, dtype=DTYPE_OF[entry.dtype])
            view = _read_into(columns, entry) if entry.pitch else _view(_map(entry.file), entry)
            found = view.to(device, dtype) if out is None else out.copy_(view)
        done = min(total, done + entry.nbytes)
        if progress is not None:
            progress(done, total)
        return found.zero_() if is_added_once(config, name) else found

    def read(name: str, *, out: Tensor | None = None, keep: bool = False) -> Tensor | Quantised:
        if name in stored or not name.endswith(".weight"):
            return tensor(name, dtype, out, keep)
        module = name.removesuffix(".weight")
        kinds = {part: DTYPE_OF[stored[f"{module}.{part}"].dtype] for part in ("codes", "scales")}
        return Quantised(**{part: tensor(f"{module}.{part}", kind, None, keep) for part, kind in kinds.items()})

    return fill(model, read, dtype=dtype, scheme=scheme, backend=backend, device=device)


def random_model(
    config: ModelConfig,
    *,
    dtype: torch.dtype,
    device: torch.device | None = None,
    scheme: Scheme | str | None = None,
    backend: str = "cpu",
    seed: int = 0,
) -> Transformer:
    """A model of this shape that was never trained, for benchmarks, built as `load_model` builds one.

    Weights are normal with standard deviation 0.02, from one long row of random numbers that is repeated: drawing a
    billion would take longer than what is measured.
    """
    place = device or torch.device("cpu")
    row = (torch.randn(RANDOM_NUMBERS, generator=torch.Generator().manual_seed(seed)) * 0.02).to(place, dtype)
    model, at = empty_model(config), 0
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}

    def read(name: str, *, out: Tensor | None = None, keep: bool = False) -> Tensor:  # noqa: ARG001
        nonlocal at
        if len(shapes[name]) == 1:
            return torch.full(shapes[name], 0.0 if name.endswith(".bias") else 1.0, dtype=dtype, device=place)
        made = torch.empty(shapes[name], dtype=dtype, device=place) if out is None else out
        at = (at + 12_345) % RANDOM_NUMBERS
        flat, source = made.view(-1), row.roll(at)
        for start in range(0, flat.numel(), RANDOM_NUMBERS):
            part = flat[start : start + RANDOM_NUMBERS]
            part.copy_(source[: part.numel()])
        return made

    rounded = Scheme(scheme) if isinstance(scheme, str) else scheme
    return fill(model, read, dtype=dtype, scheme=rounded, backend=backend, device=place)


def fill(
    model: Transformer,
    read: Read,
    *,
    dtype: torch.dtype,
    scheme: Scheme | None,
    backend: str,
    device: torch.device | None = None,
) -> Transformer:
    """Give an empty model its tensors, one part after the other, so that the peak is the model and one part."""
    left = dict(model.named_parameters())
    fusion = Fusion(dtype, scheme, backend, device or torch.device("cpu"))
    steps = unfused_steps(model, dtype, scheme) if backend == "reference" else fusion.steps(model)
    for step in steps:
        step.install(read)
        for name in step.names:
            if not name.startswith("model.embed_tokens"):  # a head may be made of it, and it stays all the same
                left.pop(name, None)
    for name in left:
        kept = read(name, keep=True)
        assert isinstance(kept, Tensor), name
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, nn.Parameter(kept, requires_grad=False))
    return model


def save_checkpoint(
    folder: Path, model: Transformer, config: ModelConfig, *, dtype: torch.dtype = torch.float32
) -> None:
    """Write model.safetensors and config.json as transformers and `load_model` read them; a crash leaves the old files.

    The weights are cast to `dtype` one tensor at a time.
    """
    tensors = dict(model.named_parameters())
    layout = {name: (tuple(tensor.shape), dtype) for name, tensor in tensors.items()}
    folder.mkdir(parents=True, exist_ok=True)
    _write_tensors(folder / SINGLE, layout, (tensor.detach().to("cpu", dtype) for tensor in tensors.values()))
    _write_config(folder, replace(config, dtype=str(dtype).removeprefix("torch.")))


def save_quantised(
    source: Path,
    config: ModelConfig,
    folder: Path,
    scheme: Scheme,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[int, int]:
    """Write the checkpoint `source` to `folder` with its linear layers in `scheme`; the rest keeps its stored dtype.

    One tensor is in memory at a time.  Tokenizer and templates are copied along.  Returns the bytes of the weights
    before and after.  Raises CheckpointError, also for a folder that is not empty; what was stopped halfway lies beside
    it, in FOLDER.part, and the next attempt begins anew.
    """
    if config.stored_scheme is not None:
        raise CheckpointError(f"{source} is quantised already; name the checkpoint that it was made from")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder} is not empty: name a new folder")
    model, stored = empty_model(config), stored_tensors(source)
    check_fit(source, config, stored)
    wanted = wanted_tensors(model, scheme.name)
    layout = {
        name: (want.shape, DTYPE_OF[stored[name].dtype if name in stored else want.dtypes[0]])
        for name, want in wanted.items()
    }

    def tensors() -> Iterator[Tensor]:
        for done, name in enumerate(layout):
            module, _, part = name.rpartition(".")
            if part == "codes":  # the scales follow
                dense = _view(_map(stored[f"{module}.weight"].file), stored[f"{module}.weight"])
                made = quantise(dense, scheme.bits(module, dense.shape[1]))
                yield made.codes
                yield made.scales
            elif part != "scales":
                yield _view(_map(stored[name].file), stored[name])
            if progress is not None:
                progress(done + 1, len(layout))

    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    for file in source.iterdir():
        if file.is_file() and not WEIGHT_FILES.fullmatch(file.name):
            shutil.copyfile(file, part / file.name)
    _write_tensors(part / SINGLE, layout, tensors())
    _write_config(part, replace(config, stored_scheme=scheme.name))
    if folder.exists():
        folder.rmdir()  # empty, as was seen above
    part.rename(folder)
    after = sum(prod(shape) * dtype.itemsize for shape, dtype in layout.values())
    return sum(entry.nbytes for entry in stored.values()), after


def _write_tensors(
    path: Path, layout: Mapping[str, tuple[tuple[int, ...], torch.dtype]], tensors: Iterable[Tensor]
) -> None:
    """A safetensors file of tensors in the order, shapes and dtypes of `layout`; replaces an old one at the end."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    name_of = {kind: name for name, kind in DTYPE_OF.items()}
    end = 0
    for name, (shape, dtype) in layout.items():
        begin, end = end, end + prod(shape) * dtype.itemsize
        header[name] = {"dtype": name_of[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-(len(text) + 8) % 64)  # tensors that are mapped start on a cache line
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for (name, (shape, dtype)), tensor in zip(layout.items(), tensors, strict=True):
            assert (tuple(tensor.shape), tensor.dtype) == (shape, dtype), name
            whole = tensor.contiguous()
            file.write((ctypes.c_char * whole.nbytes).from_address(whole.data_ptr()))
    temporary.replace(path)


def _write_config(folder: Path, config: ModelConfig) -> None:
    temporary = folder / "config.json.tmp"
    temporary.write_text(json.dumps(config.to_hf(), indent=2) + "\n", "utf-8")
    temporary.replace(folder / "config.json")


def _map(file: Path) -> Tensor:
    """The bytes of a file, read when touched; private, so that nothing is ever written back."""
    size = file.stat().st_size
    return torch.from_file(str(file), shared=False, size=size, dtype=torch.uint8)  # [bytes]


def _read_into(out: Tensor, entry: Stored) -> Tensor:
    """Fill a contiguous tensor with the bytes of its file, row by row where only some columns are wanted."""
    target = memoryview((ctypes.c_char * out.nbytes).from_address(out.data_ptr()))
    whole = entry.end - entry.begin == out.nbytes
    piece = out.nbytes if whole else out.nbytes // entry.shape[0]
    with entry.file.open("rb", buffering=0) as file:
        for number, start in enumerate(range(0, out.nbytes, piece or 1)):
            file.seek(entry.begin + number * entry.pitch)
            done, end = start, start + piece
            while done < end:  # at most 2 GiB at a time, says Linux
                got = file.readinto(target[done:end])
                if not got:
                    raise CheckpointError(f"{entry.file} ended while it was read: it has changed; load it again")
                done += got
    return out


def _view(file: Tensor, entry: Stored) -> Tensor:
    """The tensor at its place in the mapped file; copied only where an old exporter did not align it."""
    raw = file[entry.begin : entry.end]  # [bytes]
    if entry.begin % DTYPE_OF[entry.dtype].itemsize:
        raw = raw.clone()  # [bytes]
    return raw.view(DTYPE_OF[entry.dtype]).view(entry.shape)  # [*entry.shape]
