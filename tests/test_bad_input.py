"""What a user can get wrong: one clear line, exit status 2, nothing on stdout, and nothing left on the disk."""

from __future__ import annotations

import errno
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub
import pytest
import torch

from minillm import LLM
from minillm.cli.main import main
from minillm.errors import PromptError

from .fake_hub import FakeHub, Repo
from .tiny_checkpoint import write_checkpoint


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One whole checkpoint, and copies of it that are damaged in one way each."""
    root = tmp_path_factory.mktemp("models")
    model = write_checkpoint(root / "model")
    write_checkpoint(root / "no-bos", bos=False)
    write_checkpoint(root / "template", template=True)
    damaged = {
        name: shutil.copytree(model, root / name)
        for name in ("truncated", "pointer", "pickled", "no-config", "no-tokenizer", "bad-config")
    }
    weights = (model / "model.safetensors").read_bytes()
    (damaged["truncated"] / "model.safetensors").write_bytes(weights[:-1000])
    (damaged["pointer"] / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\nsize 4000\n")
    (damaged["pickled"] / "model.safetensors").rename(damaged["pickled"] / "pytorch_model.bin")
    (damaged["no-config"] / "config.json").unlink()
    (damaged["no-tokenizer"] / "tokenizer.json").unlink()
    (damaged["bad-config"] / "config.json").write_text('{"architectures": ["MixtralForCausalLM"]}')
    (root / "latin1.txt").write_bytes("voilà".encode("latin-1"))
    (root / "empty.txt").touch()
    return root


GENERATE = ["generate", "the dog", "--model", "model"]
NEEDS_NO_CUDA = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
TABLE = [
    # names
    (["generate", "x", "--model", "lama-3.2-1b"], ["lama-3.2-1b", "did you mean llama-3.2-1b"]),
    (["generate", "x", "--model", "./absent"], ["absent", "does not exist"]),
    (["generate", "x", "--model", "org/absent", "--offline"], ["org/absent", "without --offline"]),
    (["generate", "x", "--model", "no-config"], ["no-config", "no config.json", "expected"]),
    (["generate", "x", "--model", "latin1.txt"], ["latin1.txt is a file", "name the folder"]),
    (["generate", "x", "--model", "model", "--revision", "v9"], ["'v9'", "leave it out"]),
    (["pull", "org/name/more"], ["org/name/more", "hub id"]),
    # damaged folders
    (["generate", "x", "--model", "truncated"], ["model.safetensors", "bytes", "download"]),
    (["generate", "x", "--model", "pickled"], ["pytorch_model.bin", "pickle", "save_pretrained"]),
    (["plan", "--model", "pickled"], ["pytorch_model.bin", "pickle", "save_pretrained"]),
    (["chat", "--model", "truncated"], ["model.safetensors", "bytes", "download"]),
    (["plan", "--model", "truncated"], ["model.safetensors", "bytes", "download"]),
    (["score", "the dog", "--model", "truncated"], ["model.safetensors", "bytes", "download"]),
    (["generate", "x", "--model", "pointer"], ["model.safetensors", "git-lfs pointer", "git lfs pull"]),
    (["generate", "x", "--model", "no-tokenizer"], ["neither tokenizer.json nor tokenizer.model", "download"]),
    (["generate", "x", "--model", "bad-config"], ["MixtralForCausalLM"]),
    # memory
    ([*GENERATE, "--policy", "lru"], ["'lru'", "choose one of", "hashevict", "window"]),
    *(([*GENERATE, "--budget", bad], [f"budget {bad}", "fraction", "512MiB"]) for bad in ("0", "-1", "3.5", "0B")),
    *(([*GENERATE, "--budget", bad], [f"budget '{bad}'", "fraction", "512MiB"]) for bad in ("foo", "1e", "12XB")),
    (["plan", "--model", "model", "--budget", "0"], ["budget 0", "512MiB"]),
    (["chat", "--model", "model", "--budget", "1B"], ["1 bytes", "one takes"]),
    ([*GENERATE, "--budget", "8", "--sinks", "9"], ["--sinks 9", "8 slots", "raise --budget"]),
    ([*GENERATE, "--budget", "8", "--recent", "8"], ["--recent 8", "8 slots", "raise --budget"]),
    ([*GENERATE, "--budget", "8", "--evict-every", "9"], ["--evict-every 9", "8 slots", "raise --budget"]),
    (
        [*GENERATE, "--budget", "8", "--sinks", "3", "--recent", "3", "--evict-every", "3"],
        ["--sinks 3 + --recent 3 + --evict-every 3", "8 slots", "lower them"],
    ),
    ([*GENERATE, "--budget", "8", "--sinks", "-1"], ["--sinks", "at least 0", "-1"]),
    ([*GENERATE, "--budget", "8", "--evict-every", "0"], ["--evict-every", "at least 1", "0"]),
    ([*GENERATE, "--budget", "8", "--policy", "window", "--hash-bits", "8"], ["'window'", "hash_bits"]),
    ([*GENERATE, "--budget", "8", "--policy", "hashevict", "--hash-bits", "0"], ["--hash-bits", "1..", "0"]),
    ([*GENERATE, "--budget", "8", "--hash-bits", "8"], ["hashevict-plus", "hash_bits", "--policy hashevict or"]),
    ([*GENERATE, "--context", "0"], ["--context", "'0'", "at least 1"]),
    ([*GENERATE, "--chunk", "0"], ["--chunk", "'0'", "at least 1"]),
    ([*GENERATE, "--threads", "0"], ["--threads", "'0'", "at least 1"]),
    ([*GENERATE, "--policy", "full", "--context", "2"], ["do not fit", "2 slots", "raise --context", "--budget"]),
    (["score", "the dog sat", "--model", "model", "--policy", "full", "--budget", "2"], ["2 slots", "raise --context"]),
    # prompts
    (["generate", "", "--model", "no-bos"], ["empty", "no beginning-of-sequence", "give some text"]),
    (["generate", "--file", "empty.txt", "--model", "no-bos"], ["empty", "give some text"]),
    (["generate", "--file", "latin1.txt", "--model", "model"], ["latin1.txt is not UTF-8 (byte 4)", "iconv"]),
    (["generate", "--file", "absent.txt", "--model", "model"], ["absent.txt", "no such file"]),
    (["generate", "--file", "model", "--model", "model"], ["model is a folder", "text file"]),
    (["generate", "x", "--file", "empty.txt", "--model", "model"], ["both", "leave one"]),
    (["generate", "x", "--model", "model", "--system", "be brief"], ["system message", "template"]),
    (["generate", "x", "--model", "template", "--raw", "--system", "be brief"], ["system message", "--raw"]),
    (["chat", "--model", "model", "--system", "be brief"], ["--system", "template", "leave it out"]),
    (["score", "", "--model", "model"], ["1 tokens", "nothing to score"]),
    (["score", "the dog", "--model", "model", "--rows", "0"], ["--rows", "'0'", "at least 1"]),
    # sampling
    ([*GENERATE, "--stop-token-id", "99999"], ["99999", "give one from 0 to"]),
    (["chat", "--model", "model", "--stop-token-id", "99999"], ["99999", "give one from 0 to"]),
    ([*GENERATE, "--logit-bias", "99999:1"], ["99999", "give one from 0 to"]),
    ([*GENERATE, "--logit-bias", "-1:1"], ["--logit-bias"]),
    ([*GENERATE, "--logit-bias", "5:1000"], ["token 5", "1000", "from -100 to 100"]),
    ([*GENERATE, "--logit-bias", "5"], ["'5'", "17:-2.5"]),
    ([*GENERATE, "--temperature", "-1"], ["temperature -1", "from 0", "greedy"]),
    ([*GENERATE, "--temperature", "nan"], ["temperature nan", "from 0", "greedy"]),
    ([*GENERATE, "--top-p", "2"], ["top_p 2", "from 0 to 1"]),
    ([*GENERATE, "--top-k", "5"], ["--top-k", "temperature 0", "add --temperature"]),
    ([*GENERATE, "--stop", ""], ["stop", "not empty"]),
    ([*GENERATE, "--max-tokens", "-1"], ["max_tokens -1", "at least 0", "512"]),
    ([*GENERATE, "--logprobs", "21"], ["logprobs 21", "from 0 to 20"]),
    # machine
    ([*GENERATE, "--dtype", "foo"], ["'foo'", "bfloat16"]),
    pytest.param([*GENERATE, "--device", "cuda"], ["cuda", "--device cpu"], marks=NEEDS_NO_CUDA),
    ([*GENERATE, "--device", "tpu"], ["'tpu'", "cpu"]),
]


@pytest.mark.parametrize(("argv", "said"), TABLE, ids=lambda value: " ".join(value)[:60])
def test_a_mistake_is_one_clear_line(
    argv: list[str],
    said: list[str],
    folders: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(folders)
    before = sorted(folders.rglob("*"))
    assert_refused(argv, said, capsys)
    assert sorted(folders.rglob("*")) == before


def assert_refused(argv: list[str], said: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("minillm: error: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    for part in said:
        assert part in err


def test_a_mistake_in_a_chat_does_not_end_it(
    folders: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = iter(["the dog " * 100, "/quit"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    assert main(["chat", "--model", str(folders / "model"), "--context", "20"]) == 0
    assert "minillm: error: " in (err := capsys.readouterr().err)
    assert "do not fit" in err
    assert next(lines, None) is None, "the line after the mistake was read"


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ([5, 99999], "99999 is out of range.*0 to"),
        ([-1], "-1 is out of range"),
        ([], "empty"),
        ([0.5], "whole numbers"),
    ],
)
def test_token_ids_are_checked(prompt: list[int], said: str, folders: Path) -> None:
    llm = LLM.load(str(folders / "model"), budget=16)
    with pytest.raises(PromptError, match=said):
        llm.generate(prompt)
    assert llm.generate([5, 6], max_tokens=2).usage.prompt_tokens == 2, "the model still answers"


# --- downloads -----------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """Our tiny model on a hub, and an empty cache in tmp_path/cache."""
    files = {path.name: path.read_bytes() for path in (folders / "model").iterdir()}
    constants = huggingface_hub.constants
    with FakeHub({"org/tiny": Repo({"main": files}), "org/gated": Repo({"main": files}, gated=True)}) as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        address = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        huggingface_hub.utils.disable_progress_bars()
        yield hub
        huggingface_hub.utils.enable_progress_bars()


def left_behind(cache: Path) -> list[Path]:
    """Unfinished downloads, and weights."""
    return [path for path in cache.rglob("*") if path.name.endswith((".incomplete", ".safetensors"))]


@pytest.mark.usefixtures("hub")
def test_what_is_pulled_can_be_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pull", "org/tiny"]) == 0
    out, _ = capsys.readouterr()
    assert out.count("\n") == 1
    assert Path(out.strip()).is_relative_to(tmp_path / "cache")
    assert main(["generate", "the dog", "--model", "org/tiny", "--offline", "--max-tokens", "3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["usage"]["completion_tokens"] <= 3


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("org/absent", ["org/absent", "https://huggingface.co/org/absent", "hf auth login"]),
        ("org/gated", ["org/gated", "licence", "HF_TOKEN", "tinyllama"]),
    ],
)
def test_repositories_that_cannot_be_read(
    model: str, said: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_refused(["pull", model], said, capsys)
    assert not left_behind(tmp_path / "cache")


def test_no_disk_space_before_the_download(hub: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hub.claimed_size["model.safetensors"] = 10**18
    assert_refused(["pull", "org/tiny"], ["no disk space", "org/tiny", "free", "HF_HOME"], capsys)
    assert not left_behind(tmp_path / "cache")


@pytest.mark.usefixtures("hub")
def test_no_disk_space_during_the_download(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Simulated where the client writes: a full disk cannot be had without one."""
    real: Callable[..., None] = huggingface_hub.file_download.http_get

    def full(url: str, *args: object, **options: object) -> None:
        if url.endswith("model.safetensors"):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(url, *args, **options)

    monkeypatch.setattr(huggingface_hub.file_download, "http_get", full)
    assert_refused(["generate", "x", "--model", "org/tiny"], ["no disk space", "org/tiny", "make room"], capsys)
    assert not left_behind(tmp_path / "cache")


@pytest.mark.usefixtures("hub")
def test_a_read_only_cache(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cache").mkdir(mode=0o500)
    if os.geteuid() == 0:  # root may write anywhere: raise what everybody else would meet

        def refuse(path: str, *_: object, **__: object) -> None:
            raise PermissionError(errno.EACCES, "Permission denied", path)

        monkeypatch.setattr(os, "makedirs", refuse)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the client's own remark about its cache
        assert_refused(["pull", "org/tiny"], ["cache", "cannot be written", "HF_HOME"], capsys)
    assert not left_behind(tmp_path / "cache")
