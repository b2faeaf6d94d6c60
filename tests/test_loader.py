"""Loading is strict, streams, and says in one line what is wrong with a folder."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from minillm import loader
from minillm.errors import CheckpointError, ConfigError
from minillm.inventory import weights_of
from minillm.loader import (
    choose_dtype,
    load_model,
    read_config,
    read_generation_defaults,
    save_checkpoint,
)
from minillm.model import Transformer

from .helpers import make_cache, run, tiny_config, tiny_model

CPU = torch.device("cpu")
LAYERS = 2
Tensors = dict[str, Tensor]


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Transformer:
    return load_model(folder, read_config(folder), dtype=dtype, device=CPU)


def write(file: Path, tensors: Tensors, *, pad: int = 0, entries: dict[str, object] | None = None) -> None:
    """A safetensors file, written here and not by the code under test; `entries` replace or add header entries."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    body = b""
    for name, tensor in tensors.items():
        raw = bytes(tensor.contiguous().view(torch.uint8).flatten().tolist())
        kind = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}[tensor.dtype]
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [len(body), len(body) + len(raw)]}
        body += raw
    text = json.dumps(header | (entries or {})).encode()
    text += b" " * ((pad - len(text) - 8) % 16)
    file.write_bytes(len(text).to_bytes(8, "little") + text + body)


def tensors_of(model: Transformer) -> Tensors:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.fixture
def model() -> Transformer:
    return tiny_model()


@pytest.fixture
def folder(model: Transformer, tmp_path: Path) -> Path:
    save_checkpoint(tmp_path / "model", model, model.config)
    return tmp_path / "model"


def test_what_is_saved_is_loaded(folder: Path, model: Transformer) -> None:
    loaded = load(folder)
    assert loaded.config == model.config
    assert tensors_of(loaded).keys() == tensors_of(model).keys()
    assert all(torch.equal(tensor, tensors_of(model)[name]) for name, tensor in tensors_of(loaded).items())
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    tokens = torch.arange(20)[None]  # [1, 20]
    assert torch.equal(run(loaded, make_cache(loaded), tokens, 7), run(model, make_cache(model), tokens, 7))
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16, torch.float16])
def test_every_cast(stored: torch.dtype, wanted: torch.dtype, model: Transformer, tmp_path: Path) -> None:
    save_checkpoint(tmp_path, model, model.config, dtype=stored)
    assert read_config(tmp_path).dtype == str(stored).removeprefix("torch.")
    loaded = load(tmp_path, wanted)
    for name, tensor in tensors_of(model).items():
        assert torch.equal(tensors_of(loaded)[name], tensor.to(stored).to(wanted))


def test_the_format_is_the_one_of_the_safetensors_library(folder: Path, model: Transformer) -> None:
    safetensors = pytest.importorskip("safetensors")
    with safetensors.safe_open(folder / "model.safetensors", "pt") as file:
        assert set(file.keys()) == tensors_of(model).keys()
        assert all(torch.equal(file.get_tensor(name), tensor) for name, tensor in tensors_of(model).items())


def test_writing_to_loaded_weights_leaves_the_file_alone(folder: Path) -> None:
    before = (folder / "model.safetensors").read_bytes()
    with torch.no_grad():
        load(folder).model.norm.weight.add_(1)
    assert (folder / "model.safetensors").read_bytes() == before


def test_a_header_of_any_length_will_do(folder: Path, model: Transformer) -> None:
    for pad in range(4):  # old exporters did not align the tensors
        write(folder / "model.safetensors", tensors_of(model), pad=pad)
        loaded = tensors_of(load(folder))
        assert all(torch.equal(tensor, loaded[name]) for name, tensor in tensors_of(model).items())


def test_the_default_dtype_is_left_alone(folder: Path) -> None:
    load(folder, torch.bfloat16)
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError):
        load(folder, torch.bfloat16)
    assert torch.get_default_dtype() == torch.float32
    assert torch.ones(1).device == CPU


def test_progress_counts_every_byte(folder: Path) -> None:
    seen: list[tuple[int, int]] = []
    config = read_config(folder)
    load_model(folder, config, dtype=torch.float32, device=CPU, progress=lambda *step: seen.append(step))
    total = weights_of(folder, config).nbytes(torch.float32)
    assert seen[-1] == (total, total)
    assert seen == sorted(seen)


def test_ctrl_c_while_loading_is_a_keyboard_interrupt(folder: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        load_model(
            folder,
            read_config(folder),
            dtype=torch.bfloat16,
            device=CPU,
            progress=lambda *_: signal.raise_signal(signal.SIGINT),
        )
    assert load(folder).config.num_hidden_layers == LAYERS, "nothing is left behind"


def test_weights_of_without_loading(folder: Path, model: Transformer) -> None:
    held = sum(parameter.nbytes for parameter in load(folder).parameters())
    assert weights_of(folder, model.config).nbytes(torch.float32) == held
    assert weights_of(None, model.config).nbytes(torch.bfloat16) == held // 2
    assert weights_of(folder.parent, model.config).nbytes(torch.float32) == held, "a folder without weights, yet"
    with pytest.raises(CheckpointError, match="misshapen"):
        weights_of(folder, replace(model.config, vocab_size=50)).nbytes(torch.float32)


# Strictness


def test_everything_that_does_not_fit_is_in_one_message(folder: Path, model: Transformer) -> None:
    tensors = tensors_of(model)
    del tensors["model.layers.0.mlp.up_proj.weight"]
    tensors["model.layers.0.mlp.up_proj.lora_A"] = torch.zeros(2)
    tensors["model.norm.weight"] = torch.zeros(31)
    write(folder / "model.safetensors", tensors)
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    message = str(caught.value)
    for part in (
        f"the tensors in {folder} are not those of its config.json (LlamaForCausalLM)",
        "1 missing (model.layers.0.mlp.up_proj.weight)",
        "1 unexpected (model.layers.0.mlp.up_proj.lora_A)",
        "1 misshapen (model.norm.weight is [31] instead of [32])",
        "files read: model.safetensors",
        "download the checkpoint again",
    ):
        assert part in message
    assert "\n" not in message


def test_long_lists_are_cut(folder: Path, model: Transformer) -> None:
    write(folder / "model.safetensors", {"model.norm.weight": tensors_of(model)["model.norm.weight"]})
    with pytest.raises(CheckpointError, match=r"20 missing \((\S+, ){5}\.\.\. 15 more\)"):
        load(folder)


def test_harmless_extras_are_accepted(folder: Path, model: Transformer) -> None:
    extra = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.zeros(4) for layer in range(LAYERS)}
    write(folder / "model.safetensors", tensors_of(model) | extra)
    assert torch.equal(load(folder).model.norm.weight, model.model.norm.weight)


def test_tied_and_untied_heads(tmp_path: Path) -> None:
    tied = tiny_model(tiny_config(tie_word_embeddings=True))
    save_checkpoint(tmp_path, tied, tied.config)
    assert load(tmp_path).lm_head is None
    write(tmp_path / "model.safetensors", tensors_of(tied) | {"lm_head.weight": tied.model.embed_tokens.weight})
    assert load(tmp_path).lm_head is None
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {"tie_word_embeddings": False}))
    assert load(tmp_path).lm_head is not None
    write(tmp_path / "model.safetensors", tensors_of(tied))
    with pytest.raises(CheckpointError, match=r'1 missing \(lm_head\.weight\).*set "tie_word_embeddings": true'):
        load(tmp_path)


@pytest.mark.parametrize("dtype", ["F8_E4M3", "I8", "U8"])
def test_quantised_tensors_are_refused_by_name(dtype: str, folder: Path, model: Transformer) -> None:
    tensors = tensors_of(model)
    name, tensor = next(iter(tensors.items()))
    shape = [*tensor.shape[:-1], tensor.nbytes // tensor.shape[:-1].numel()]  # a byte for each
    entry = {"dtype": dtype, "shape": shape, "data_offsets": [0, tensor.nbytes]}
    write(folder / "model.safetensors", tensors, entries={name: entry})
    with pytest.raises(CheckpointError, match=f"unsupported dtype .{name} is {dtype}.*not quantised"):
        load(folder)


# Files


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-100], r"has [\d,]+ bytes, expected [\d,]+ by its header: an incomplete download\?"),
        (lambda data: data + b"\0", r"has [\d,]+ bytes, expected [\d,]+ by its header"),
        (lambda _: b"", "has 0 bytes, but its first 8 announce a header of 0: empty"),
        (lambda data: data[:5], "has 5 bytes"),
        (lambda data: data[:200], "has 200 bytes, but its first 8 announce a header of"),
        (lambda data: (10**12).to_bytes(8, "little") + data[8:], "announce a header of 1,000,000,000,000"),
        (lambda data: b"\xff" * 8 + data[8:], "announce a header of 18,446,744,073,709,551,615"),
        (lambda data: data.replace(b'"shape": [32]', b'"shape": [NaN', 1), "damaged header.*NaN is no JSON"),
        (lambda data: data.replace(b'{"__metadata__"', b'["__metadata__"', 1), "damaged header"),
        (lambda data: data.replace(b'"shape": [32]', b'"shape": [-2]', 1), "damaged header.*shape"),
        (lambda data: data.replace(b'"shape": [32]', b'"shape": [33]', 1), r"damaged header.*F32 \[33\] in 128 bytes"),
        (lambda data: data.replace(b'"shape": [32]', b'"shape": "32"', 1), "damaged header"),
        (lambda data: data.replace(b"data_offsets", b"data_0ffsets", 1), "damaged header.*data_offsets"),
        (lambda data: (2).to_bytes(8, "little") + b"[]" + data[8:], "damaged header"),
        (lambda _: (60000).to_bytes(8, "little") + b"[" * 60000, "damaged header"),
        (
            lambda _: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4943162336\n",
            "is a git-lfs pointer of 72 bytes, not the weights, 4,943,162,336 bytes; run `git lfs pull`",
        ),
    ],
)
def test_a_damaged_file_is_named_with_found_and_expected(
    damage: Callable[[bytes], bytes], message: str, folder: Path
) -> None:
    file = folder / "model.safetensors"
    data = file.read_bytes()
    assert damage(data) != data
    file.write_bytes(damage(data))
    with pytest.raises(CheckpointError, match=message) as caught:
        load(folder)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.fixture
def sharded(folder: Path, model: Transformer) -> Path:
    """The same checkpoint in two files and an index, with decoys that must not be read."""
    (folder / "model.safetensors").unlink()
    names = sorted(tensors_of(model))
    halves = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, half in halves.items():
        write(folder / file, {name: tensors_of(model)[name] for name in half})
    weight_map = {name: file for file, half in halves.items() for name in half}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "consolidated.safetensors").write_bytes(b"another layout")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    (folder / "original").mkdir()
    (folder / "original" / "model.safetensors").write_bytes(b"another layout")
    return folder


def edit_index(folder: Path, **places: str) -> None:
    index = folder / "model.safetensors.index.json"
    raw = json.loads(index.read_text())
    raw["weight_map"] |= places
    index.write_text(json.dumps(raw))


def test_shards(sharded: Path, model: Transformer) -> None:
    loaded = tensors_of(load(sharded))
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in tensors_of(model).items())


def test_a_missing_shard(sharded: Path) -> None:
    (sharded / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"1 of 2 shards .* are missing \(model-00002-of-00002\.safetensors\)"):
        load(sharded)


def test_a_shard_that_lacks_what_the_index_places_there(sharded: Path) -> None:
    edit_index(sharded, **{"model.norm.weight": "model-00001-of-00002.safetensors"})
    (sharded / "model-00001-of-00002.safetensors").rename(sharded / "a.safetensors")
    (sharded / "model-00002-of-00002.safetensors").rename(sharded / "model-00001-of-00002.safetensors")
    (sharded / "a.safetensors").rename(sharded / "model-00002-of-00002.safetensors")
    with pytest.raises(
        CheckpointError, match=r"model-00001-of-00002\.safetensors lacks \d+ tensors .*different versions"
    ):
        load(sharded)


@pytest.mark.parametrize("place", ["../model.safetensors", "/etc/passwd", "original/model.safetensors", "a.bin", 7])
def test_an_index_may_only_name_files_beside_it(place: str, sharded: Path) -> None:
    edit_index(sharded, **{"model.norm.weight": place})
    with pytest.raises(CheckpointError, match=r"places 'model\.norm\.weight' in .*expected the plain name"):
        load(sharded)


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": 3}', "{}"])
def test_a_damaged_index(text: str, sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"index\.json is not a readable index"):
        load(sharded)


@pytest.mark.parametrize("pickle", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickles_are_refused_with_reason_and_remedy(pickle: str, folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / pickle)
    with pytest.raises(CheckpointError, match=rf"pickle files \({pickle}\), which can run code.*save_pretrained"):
        load(folder)


@pytest.mark.parametrize("other", ["consolidated.safetensors", "model.gguf"])
def test_other_layouts_are_refused(other: str, folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / other)
    with pytest.raises(CheckpointError, match=rf"neither model.safetensors nor .* \(found: config.json, {other}\)"):
        load(folder)


# The other files


def test_eos_ids_of_both_files_are_united(folder: Path) -> None:
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 2, 9]}')
    assert read_config(folder).eos_token_ids == (2, 7, 9)


@pytest.mark.parametrize("text", ['{"eos_token_id": [7,]}', "[]", '{"eos_token_id": "</s>"}', "\xff"])
def test_a_broken_generation_config_is_only_a_warning(text: str, folder: Path) -> None:
    (folder / "generation_config.json").write_bytes(text.encode("latin-1"))
    with pytest.warns(UserWarning, match=r"generation_config\.json is ignored"):
        assert read_config(folder).eos_token_ids == (2,)


def test_generation_defaults(folder: Path) -> None:
    assert read_generation_defaults(folder) == {}
    sampling = {"temperature": 0.6, "top_p": 0.9, "top_k": None, "min_p": "0.1", "max_length": 4096}
    (folder / "generation_config.json").write_text(json.dumps(sampling))
    assert read_generation_defaults(folder) == {}, "without do_sample the authors mean greedy"
    (folder / "generation_config.json").write_text(json.dumps(sampling | {"do_sample": True}))
    assert read_generation_defaults(folder) == {"temperature": 0.6, "top_p": 0.9}


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "has no config.json"), ("{", "is not readable JSON"), ("[]", "holds a list, not an object")],
)
def test_a_broken_config(text: str | None, message: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        read_config(tmp_path)


# dtype


def test_an_explicit_dtype_is_taken_and_a_wrong_one_named() -> None:
    assert choose_dtype("float16", tiny_config(), CPU) == torch.float16
    with pytest.raises(ConfigError, match="dtype is 'int8'; choose one of auto, float32, bfloat16, float16"):
        choose_dtype("int8", tiny_config(), CPU)


@pytest.mark.parametrize(
    ("stored", "with_bfloat16", "without"),
    [
        ("float32", torch.float32, torch.float32),
        ("bfloat16", torch.bfloat16, torch.float32),
        ("float16", torch.bfloat16, torch.float32),
        ("float64", torch.float32, torch.float32),
        (None, torch.float32, torch.float32),
    ],
)
def test_auto_on_a_cpu(
    stored: str | None, with_bfloat16: torch.dtype, without: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(dtype=stored)
    for has, expected in ((True, with_bfloat16), (False, without)):
        monkeypatch.setattr(loader, "cpu_has_bfloat16", lambda has=has: has)
        assert choose_dtype("auto", config, CPU) == expected


def test_auto_agrees_with_what_the_kernel_says_of_this_cpu() -> None:
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists() or os.uname().machine != "x86_64":
        pytest.skip("needs Linux on x86-64, where /proc/cpuinfo names the CPU's features")
    flags = set(cpuinfo.read_text().split())
    has = bool(flags & {"avx512_bf16", "amx_tile"})
    expected = torch.bfloat16 if has else torch.float32
    assert choose_dtype("auto", tiny_config(dtype="bfloat16"), CPU) == expected


# Memory

PEAK = """
import json, sys, torch
from pathlib import Path
from minillm.loader import load_model, read_config

def kib(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field + ":"))

folder, dtype = Path(sys.argv[1]), getattr(torch, sys.argv[2])
torch.ones(9).to(torch.bfloat16).to(torch.float32)
config = read_config(folder)
before = kib("VmRSS")
model = load_model(folder, config, dtype=dtype, device=torch.device("cpu"))
held = sum(parameter.nbytes for parameter in model.parameters())
print(json.dumps({"held": held, "grown": 1024 * (kib("VmHWM") - before), "sympy": "sympy" in sys.modules}))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Just under 200 MB of random bfloat16; its largest tensor has 19 MB."""
    config = tiny_config(
        vocab_size=9216,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=6,
        sliding_windows=(None,) * 6,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=64,
    )
    folder = tmp_path_factory.mktemp("large")
    model = Transformer(config).to(torch.bfloat16)
    save_checkpoint(folder, model, config, dtype=torch.bfloat16)
    return folder


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_peak_memory_of_loading(dtype: str, large: Path) -> None:
    """As stored: next to nothing, the file is mapped.  Cast: the model and one tensor as it was stored."""
    stored = (large / "model.safetensors").stat().st_size
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(large), dtype], capture_output=True, text=True, check=True, timeout=120
    )
    peak = json.loads(done.stdout)
    print(f"{dtype}: model {peak['held']:,} bytes, peak {peak['grown']:,}, file {stored:,}")
    slack, largest = 8_000_000, 9216 * 1024 * 2
    expected = 0 if dtype == "bfloat16" else peak["held"] + largest
    assert peak["held"] > 180_000_000
    assert peak["grown"] < expected + slack
    assert not peak["sympy"], "building on the meta device imported what it does not need"
