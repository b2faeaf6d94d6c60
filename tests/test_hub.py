"""Names to folders, with huggingface_hub's own client talking to a small hub on this machine."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub
import pytest

import minillm.hub
from minillm.cli.main import main
from minillm.errors import ConfigError, GatedModelError, ModelNotFoundError
from minillm.headers import stored_tensors
from minillm.hub import ALIASES, EMBEDDED, HUB_ID, pull, resolve

from .fake_hub import TOKEN, FakeHub, Repo
from .tiny_checkpoint import write_checkpoint

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 16,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}
WANTED = {
    "config.json": json.dumps(CONFIG).encode(),
    "generation_config.json": b'{"do_sample": false}',
    "model.safetensors": bytes(range(256)) * 4096,
    "tokenizer.json": b'{"version": "1.0"}',
    "tokenizer_config.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
}
UNWANTED = {
    "README.md": b"#",
    "pytorch_model.bin": b"pickle",
    "consolidated.safetensors": b"another layout",
    "original/model.safetensors": b"another layout",
    "original/params.json": b"{}",
}
OLDER = WANTED | {"generation_config.json": b'{"older": true}'}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    repos = {
        "org/open": Repo({"main": WANTED | UNWANTED, "v1": OLDER}),
        "org/gated": Repo({"main": WANTED}, gated=True),
        "org/pickled": Repo({"main": {"config.json": WANTED["config.json"], "pytorch_model.bin": b"pickle"}}),
        "org/mixture": Repo({"main": WANTED | {"config.json": b'{"architectures": ["MixtralForCausalLM"]}'}}),
    }
    with FakeHub(repos) as hub:
        _connect(hub.url, monkeypatch)
        yield hub


def _connect(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Point the client at `url`, with no token and nothing cached in its memory."""
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)


def _files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_a_pull_fetches_the_wanted_files_and_no_others(hub: FakeHub, tmp_path: Path) -> None:
    folder = pull("org/open", cache_dir=tmp_path, progress=False)
    assert _files(folder) == WANTED.keys() == hub.downloaded()
    assert (folder / "model.safetensors").read_bytes() == WANTED["model.safetensors"]


def test_a_second_resolve_asks_nobody_and_works_offline(hub: FakeHub, tmp_path: Path) -> None:
    folder = resolve("org/open", cache_dir=tmp_path, progress=False)
    hub.requests.clear()
    assert resolve("org/open", cache_dir=tmp_path) == folder
    assert resolve("org/open", cache_dir=tmp_path, offline=True) == folder
    assert hub.requests == []


@pytest.mark.usefixtures("hub")
def test_the_small_files_are_enough_to_plan(tmp_path: Path) -> None:
    folder = resolve("org/open", cache_dir=tmp_path, progress=False, weights=False)
    assert _files(folder) == WANTED.keys() - {"model.safetensors"}
    assert resolve("org/open", cache_dir=tmp_path, offline=True, weights=False) == folder
    with pytest.raises(ModelNotFoundError, match="not in the cache"):
        resolve("org/open", cache_dir=tmp_path, offline=True)
    assert _files(resolve("org/open", cache_dir=tmp_path, progress=False)) == WANTED.keys()


@pytest.mark.parametrize("sharded", [False, True])
def test_a_plan_reads_the_headers_and_no_weights(
    sharded: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    folder = write_checkpoint(tmp_path / "model")
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    stored = stored_tensors(folder)
    if sharded:
        files["a.safetensors"] = files.pop("model.safetensors")
        index = {"weight_map": dict.fromkeys(stored, "a.safetensors")}
        files["model.safetensors.index.json"] = json.dumps(index).encode()
    other = json.loads(files["config.json"]) | {"hidden_size": 64, "intermediate_size": 64}
    repos = {
        "org/model": files,
        "org/other": files | {"config.json": json.dumps(other).encode()},
        "org/broken": files | {name: b"\0" * 300 for name in files if name.endswith(".safetensors")},
    }
    with FakeHub({name: Repo({"main": content}) for name, content in repos.items()}) as hub:
        _connect(hub.url, monkeypatch)
        assert main(["plan", "--model", "org/model", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert not any(name.endswith(".safetensors") for name in hub.downloaded())
        assert found["weights_from"] == "the hub's headers"
        assert found["bytes"]["weights"] == sum(entry.nbytes for entry in stored.values())
        assert main(["plan", "--model", "org/other"]) == 2
        assert "are not those of its config.json" in capsys.readouterr().err
        assert main(["plan", "--model", "org/broken", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["weights_from"] == "config.json"
    assert main(["plan", "--model", "org/model", "--offline", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["weights_from"] == "config.json"


def test_a_second_pull_brings_up_to_date(hub: FakeHub, tmp_path: Path) -> None:
    first = pull("org/open", cache_dir=tmp_path, progress=False)
    hub.repos["org/open"].revisions["main"] = WANTED | {"generation_config.json": b'{"newer": true}'}
    hub.requests.clear()
    second = pull("org/open", cache_dir=tmp_path, progress=False)
    assert second != first
    assert (second / "generation_config.json").read_bytes() == b'{"newer": true}'
    assert hub.downloaded() == {"generation_config.json"}, "files that did not change are not fetched again"
    assert resolve("org/open", cache_dir=tmp_path, offline=True) == second


def test_revisions(hub: FakeHub, tmp_path: Path) -> None:
    commit = hub.repos["org/open"].commit("v1")
    for revision in ("v1", commit):
        folder = resolve("org/open", revision=revision, cache_dir=tmp_path, progress=False)
        assert (folder / "generation_config.json").read_bytes() == OLDER["generation_config.json"]
    with pytest.raises(ModelNotFoundError, match="org/open has no revision 'v9'"):
        resolve("org/open", revision="v9", cache_dir=tmp_path, progress=False)
    with pytest.raises(ModelNotFoundError, match="org/open at revision main is not in the cache and downloads are off"):
        resolve("org/open", revision="main", cache_dir=tmp_path, offline=True)


def test_a_broken_transfer_is_resumed(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 2**16)  # 10 MB: more than this whole file
    hub.break_after["model.safetensors"] = 300_000
    folder = pull("org/open", cache_dir=tmp_path, progress=False)
    assert (folder / "model.safetensors").read_bytes() == WANTED["model.safetensors"]
    ranges = [asked for method, path, asked in hub.requests if method == "GET" and path.endswith("/model.safetensors")]
    assert len(ranges) == 2
    assert ranges[0] is None
    assert 0 < int(str(ranges[1]).removeprefix("bytes=").rstrip("-")) <= 300_000


def test_an_interrupted_pull_keeps_finished_files(hub: FakeHub, tmp_path: Path) -> None:
    folder = pull("org/open", cache_dir=tmp_path, progress=False)
    (folder / "model.safetensors").resolve().unlink()
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelNotFoundError, match="not in the cache"):
        resolve("org/open", cache_dir=tmp_path, offline=True)
    hub.requests.clear()
    assert resolve("org/open", cache_dir=tmp_path, progress=False) == folder
    assert hub.downloaded() == {"model.safetensors"}


def test_an_incomplete_set_of_shards_is_not_taken_for_a_model(hub: FakeHub, tmp_path: Path) -> None:
    index = json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}).encode()
    shards = {"model-1.safetensors": b"1", "model-2.safetensors": b"2", "model.safetensors.index.json": index}
    config = {"config.json": WANTED["config.json"]}
    hub.repos["org/sharded"] = Repo({"main": config | shards})
    folder = pull("org/sharded", cache_dir=tmp_path, progress=False)
    assert _files(folder) == config.keys() | shards.keys()
    (folder / "model-2.safetensors").unlink()
    shutil.rmtree(folder.parents[1] / "trees", ignore_errors=True)  # as an older client leaves the cache
    with pytest.raises(ModelNotFoundError, match="not in the cache"):
        resolve("org/sharded", cache_dir=tmp_path, offline=True)


def test_a_gated_repository_names_page_token_and_stand_ins(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(GatedModelError) as caught:
        resolve("org/gated", cache_dir=tmp_path, progress=False)
    for part in ("https://huggingface.co/org/gated", "hf auth login", "HF_TOKEN", "tinyllama", "smollm2", "qwen2.5"):
        assert part in str(caught.value)
    assert hub.downloaded() == set()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert _files(resolve("org/gated", cache_dir=tmp_path, progress=False)) == WANTED.keys()


def test_refusals_come_before_the_weights(hub: FakeHub, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="the hub has no repository org/absent"):
        resolve("org/absent", cache_dir=tmp_path, progress=False)
    with pytest.raises(ModelNotFoundError, match=r"org/pickled has no \.safetensors files.*can run code"):
        resolve("org/pickled", cache_dir=tmp_path, progress=False)
    with pytest.raises(ConfigError, match="MixtralForCausalLM"):
        resolve("org/mixture", cache_dir=tmp_path, progress=False)
    assert not any(name.endswith((".safetensors", ".bin")) for name in hub.downloaded())


def test_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _connect("http://127.0.0.1:1", monkeypatch)  # nobody listens on port 1
    with pytest.raises(ModelNotFoundError, match="org/open is not in the cache and the hub cannot be reached"):
        resolve("org/open", cache_dir=tmp_path, progress=False)


@pytest.mark.usefixtures("hub")
def test_no_network_with_half_a_model_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = pull("org/open", cache_dir=tmp_path, progress=False)
    (folder / "model.safetensors").unlink()
    _connect("http://127.0.0.1:1", monkeypatch)
    with pytest.raises(ModelNotFoundError, match="the download of org/open failed"):
        resolve("org/open", cache_dir=tmp_path, progress=False)


def test_no_room_is_said_before_the_download(hub: FakeHub, tmp_path: Path) -> None:
    hub.claimed_size["model.safetensors"] = 10**18
    with pytest.raises(ModelNotFoundError, match=r"no disk space for org/open: 1000000000\.0 GB to download"):
        resolve("org/open", cache_dir=tmp_path, progress=False)
    assert "model.safetensors" not in hub.downloaded()


@pytest.mark.usefixtures("hub")
def test_a_disk_that_fills_up_during_the_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulated where the client writes: a full disk cannot be had without one."""
    real: Callable[..., None] = huggingface_hub.file_download.http_get

    def full(url: str, *args: object, **options: object) -> None:
        if url.endswith("model.safetensors"):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(url, *args, **options)

    monkeypatch.setattr(huggingface_hub.file_download, "http_get", full)
    with pytest.raises(ModelNotFoundError, match="no disk space left"):
        resolve("org/open", cache_dir=tmp_path, progress=False)
    monkeypatch.undo()
    assert not list(tmp_path.rglob("*.incomplete")), "nothing half-written stays"


@pytest.mark.usefixtures("hub")
def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    cache.mkdir(mode=0o500)
    if os.geteuid() == 0:  # root may write anywhere: raise what everybody else would meet

        def refuse(path: str, *_: object, **__: object) -> None:
            raise PermissionError(errno.EACCES, "Permission denied", path)

        monkeypatch.setattr(os, "makedirs", refuse)
    with pytest.raises(ModelNotFoundError, match=r"cannot be written \(Permission denied: .*HF_HOME"):
        resolve("org/open", cache_dir=cache, progress=False)


@pytest.mark.usefixtures("hub")
def test_progress_bars_can_be_silenced_and_come_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pull("org/open", cache_dir=tmp_path / "a", progress=False)
    assert capsys.readouterr() == ("", "")
    pull("org/open", cache_dir=tmp_path / "b", progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "Fetching" in err


def test_environment_variables_are_the_clients_own(hub: FakeHub, tmp_path: Path) -> None:
    """HF_ENDPOINT and HF_HOME in a fresh process, no argument: as a user has it."""
    code = "from minillm.hub import resolve; print(resolve('org/open'))"
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | settings, capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.startswith(str(tmp_path / "hub"))
    assert _files(Path(done.stdout.strip())) == WANTED.keys()


def test_folders_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("here", "weights/tinyllama", "weights/here", "org/name"):
        Path(folder).mkdir(parents=True)
        Path(folder, "config.json").write_text("{}")
    assert resolve(str(tmp_path / "here")) == tmp_path / "here"
    assert resolve("./here") == resolve("here") == Path("here")
    assert resolve("org/name") == Path("org/name")
    assert resolve("tinyllama") == tmp_path / "weights" / "tinyllama"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/here") == tmp_path / "here"
    assert pull("here") == Path("here")
    with pytest.raises(ModelNotFoundError, match="revision 'main' means nothing for the folder here"):
        resolve("here", revision="main")


def test_the_embedded_model_is_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    package = Path(minillm.hub.__file__).parent
    homes = (package / "weights" / EMBEDDED, package.parent / "weights" / EMBEDDED)
    if not any((home / "config.json").is_file() for home in homes):
        pytest.skip(f"no model is embedded in {homes[1]}, yet")
    assert resolve(EMBEDDED) in homes


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./absent", "folder absent does not exist"),
        ("/absent/model", "folder /absent/model does not exist"),
        ("~/absent", "does not exist"),
        ("../absent", "folder ../absent does not exist"),
        ("org/../name", "is no hub id"),
        ("a/b/c", "is no hub id"),
        ("..", "has no config.json"),
        ("empty", "folder empty has no config.json"),
        ("org/empty", "folder org/empty has no config.json"),
        ("file.safetensors", "file.safetensors is a file; name the folder it is in"),
        ("", "the model's name is empty"),
        ("lama-3.2-1b", "unknown model 'lama-3.2-1b': did you mean llama-3.2-1b"),
        ("zzz", "unknown model 'zzz': known are .*tinyllama"),
    ],
)
def test_bad_names_answer_without_the_network(
    name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _connect("http://127.0.0.1:1", monkeypatch)
    (tmp_path / "work" / "org" / "empty").mkdir(parents=True)
    (tmp_path / "work" / "empty").mkdir()
    (tmp_path / "work" / "file.safetensors").touch()
    monkeypatch.chdir(tmp_path / "work")
    with pytest.raises(ModelNotFoundError, match=message) as caught:
        resolve(name)
    assert "\n" not in str(caught.value)


def test_aliases_are_frozen_and_well_formed() -> None:
    assert all(HUB_ID.fullmatch(repo) for repo in ALIASES.values())
    with pytest.raises(TypeError):
        ALIASES["mine"] = "org/name"  # type: ignore[index]
