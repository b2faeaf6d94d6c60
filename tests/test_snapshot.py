"""Files of named tensors: exact, streamed, atomic, and refused when a single byte is wrong."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from minillm import SessionError
from minillm.snapshot import NAME_OF, PIECE, open_snapshot, save_snapshot, snapshot_bytes, specs_of

METADATA = {"model": "a", "threads": "1", "text": 'ümläut "quoted" \n \ue000'}
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="fork, /dev and /proc as Linux has them")


def example() -> dict[str, Tensor]:
    """Every dtype, odd sizes, no elements, no dimensions, and strides that are out of order."""
    torch.manual_seed(0)
    tensors = {
        f"of.{NAME_OF[dtype]}": torch.randint(0, 256, (3, 5, dtype.itemsize), dtype=torch.uint8).view(dtype)
        for dtype in NAME_OF
        if dtype != torch.bool
    }
    return tensors | {
        "of.BOOL": torch.rand(7) > 0.5,
        "empty": torch.empty(4, 0, 3),
        "single": torch.tensor(-0.0),
        "transposed": torch.rand(300, 200).t(),
        "every second": torch.rand(2, 9, 4)[:, ::2],
        "expanded": torch.rand(5, 1).expand(5, 6),
        "large": torch.rand(PIECE // 4 + 17),
        "large, transposed": torch.rand(700, 1600, dtype=torch.float64).t(),
        "large, every second": torch.rand(PIECE)[::2],
    }


def blank(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of the same shapes, dtypes and, but for what shares memory, strides, with other values in them."""
    other = {name: torch.empty_like(tensor) for name, tensor in tensors.items()}
    for tensor in other.values():
        tensor.fill_(1)
    return other


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit: NaN equals NaN, and 0.0 is not -0.0."""
    alike = a.shape == b.shape and a.dtype == b.dtype
    return alike and torch.equal(*(one.contiguous().view(-1).view(torch.uint8) for one in (a, b)))


def load(path: Path, tensors: dict[str, Tensor]) -> dict[str, str]:
    with open_snapshot(path) as snapshot:
        snapshot.require(specs_of(tensors))
        snapshot.fill_(tensors)
        return snapshot.metadata


def test_round_trip_of_every_dtype_and_layout(tmp_path: Path) -> None:
    path, tensors = tmp_path / "a.session", example()
    save_snapshot(path, tensors, METADATA)
    assert path.stat().st_size == snapshot_bytes(specs_of(tensors), METADATA)
    found = blank(tensors)
    found["transposed"] = torch.zeros(200, 300)
    found["large, every second"] = torch.zeros(PIECE)[::2]
    assert load(path, found) == METADATA
    assert [name for name in tensors if not same(found[name], tensors[name])] == []
    assert names(tmp_path) == ["a.session"]


def test_safetensors_itself_reads_it(tmp_path: Path) -> None:
    path, tensors = tmp_path / "a.session", example()
    save_snapshot(path, tensors, METADATA)
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "minillm session 1", **METADATA}
        assert set(file.keys()) == {*tensors, "checksum"}
        assert [name for name in tensors if not same(file.get_tensor(name), tensors[name])] == []


def test_what_differs_is_named_and_nothing_is_filled(tmp_path: Path) -> None:
    path = tmp_path / "a.session"
    save_snapshot(path, {"a": torch.ones(2, 3), "b": torch.ones(4), "c": torch.ones(1)}, {})
    other = {"a": torch.zeros(3, 2), "b": torch.zeros(4, dtype=torch.int32), "d": torch.zeros(1)}
    with pytest.raises(SessionError) as refused:
        load(path, other)
    for part in ("1 missing (d)", "1 unexpected (c)", "a is F32 [2, 3] instead of F32 [3, 2]", "b is F32 [4] instead"):
        assert part in str(refused.value)
    assert not any(tensor.any() for tensor in other.values())


def test_every_kind_of_damage_is_refused(tmp_path: Path) -> None:
    """Each byte flipped, each length cut, bytes added: refused by name, and the tensors stay as they were."""
    path, good = tmp_path / "a.session", {"a": torch.rand(5), "b": torch.zeros(3, dtype=torch.int8)}
    save_snapshot(path, good, METADATA)
    whole = path.read_bytes()
    draw = random.Random(0)
    flipped = [bytearray(whole) for _ in whole]
    for at, data in enumerate(flipped):
        data[at] ^= 1 << draw.randrange(8)
    cut = [whole[:length] for length in range(len(whole))]
    zeroed = [whole[:at] + bytes(16) + whole[at + 16 :] for at in range(0, len(whole) - 16, 16)]
    zeroed = [data for data in zeroed if data != whole]
    for data in (*flipped, *cut, *zeroed, whole + b"\0", whole + whole, b" " * 1000, b'{"a": 1}' * 100):
        path.write_bytes(data)
        target = {name: torch.full_like(tensor, 7) for name, tensor in good.items()}
        with pytest.raises(SessionError, match=r"a\.session.*(is damaged|is no saved session)"):
            load(path, target)
        assert all((tensor == 7).all() for tensor in target.values())
    path.write_bytes(whole)
    assert load(path, blank(good)) == METADATA


@pytest.mark.parametrize(
    "header",
    [
        {"a": 1},
        [],
        {"__metadata__": {"format": "minillm session 1"}},
        {"__metadata__": {"format": "minillm session 1"}, "a": {"dtype": "F32"}},
        {"__metadata__": {"format": "minillm session 1"}, "a": {"dtype": "F32", "shape": [1], "data_offsets": "no"}},
        {"__metadata__": {"format": "minillm session 1"}, "a": None},
        {"__metadata__": {"format": "another"}, "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}},
    ],
)
def test_headers_that_only_look_like_ours(header: object, tmp_path: Path) -> None:
    path, text = tmp_path / "a.session", json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(36))
    with pytest.raises(SessionError, match=r"is damaged|is no saved session"):
        load(path, {})


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(SessionError, match="no such file"):
        load(tmp_path / "none", {})
    with pytest.raises(SessionError, match="this is no file"):
        load(tmp_path, {})


@linux_only
def test_files_that_cannot_be_written(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(1 << 16)}
    old = tmp_path / "old.session"
    save_snapshot(old, {"a": torch.zeros(3)}, {})
    with pytest.raises(SessionError, match="folder or a device"):
        save_snapshot(tmp_path, tensors, {})
    with pytest.raises(SessionError, match="folder or a device"):
        save_snapshot(Path("/dev/null"), tensors, {})
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)
    with pytest.raises(SessionError, match="No such file or directory; it takes 26"):
        save_snapshot(tmp_path / "none" / "a", tensors, {})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:  # a disk that is full in the middle of the file
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        with pytest.raises(SessionError, match=r"File too large; it takes 262,\d+ bytes .* is unchanged"):
            save_snapshot(old, tensors, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert load(old, {"a": torch.ones(3)}) == {}
    assert names(tmp_path) == ["old.session"]


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(SessionError, match="Permission denied"):
        save_snapshot(tmp_path / "a", {"a": torch.ones(1)}, {})
    tmp_path.chmod(0o700)


@linux_only
def test_a_link_stays_a_link_and_leftovers_go(tmp_path: Path) -> None:
    real, link = tmp_path / "real.session", tmp_path / "link.session"
    link.symlink_to(real)
    for name in ("real.session.0123abcd.tmp", "other.session.0123abcd.tmp", "real.session.tmp"):
        (tmp_path / name).write_text("x")
    save_snapshot(link, {"a": torch.ones(1)}, {})
    assert link.is_symlink()
    assert load(real, {"a": torch.zeros(1)}) == {}
    left = names(tmp_path)
    assert left == ["link.session", "other.session.0123abcd.tmp", "real.session", "real.session.tmp"]


@linux_only
def test_a_killed_save_never_tears_the_file(tmp_path: Path) -> None:
    """Children save again and again, each version filled with its number, and are killed at random moments."""
    path, draw, torn, versions = tmp_path / "a.session", random.Random(0), 0, set()
    target = {"a": torch.zeros(1 << 18), "b": torch.zeros(1 << 18)}  # 2 MiB: a save takes a few milliseconds
    save_snapshot(path, target, {})
    for _ in range(60):
        first = int(target["a"][0]) + 1
        child = os.fork()
        if child == 0:
            try:
                for version in range(first, first + 10_000):
                    save_snapshot(path, {name: torch.full_like(t, version) for name, t in target.items()}, {})
            finally:
                os._exit(1)
        time.sleep(draw.uniform(0.001, 0.06))
        os.kill(child, signal.SIGKILL)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        torn += len(names(tmp_path)) > 1  # killed inside a save
        load(path, target)
        assert torch.equal(target["a"], target["b"])
        assert (target["a"] == target["a"][0]).all()
        versions.add(int(target["a"][0]))
    print(f"\n{len(versions)} versions found, {torn} of 60 children killed in the middle of a save")
    assert torn > 0
    assert len(versions) > 1
    save_snapshot(path, target, {})
    assert names(tmp_path) == ["a.session"]


@linux_only
@pytest.mark.parametrize("layout", ["torch.ones(50_000_000)", "torch.ones(1000, 50_000).t()"])
def test_saving_and_loading_need_no_second_copy(layout: str, tmp_path: Path) -> None:
    code = f"""
import sys, torch
from pathlib import Path
from minillm.snapshot import open_snapshot, save_snapshot, specs_of

def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024

torch.set_num_threads(1)
tensors = {{"a": {layout}}}
path = Path(sys.argv[1])
before = peak()
save_snapshot(path, tensors, {{}})
saved = peak()
with open_snapshot(path) as snapshot:
    snapshot.require(specs_of(tensors))
    snapshot.fill_(tensors)
print(path.stat().st_size, saved - before, peak() - saved)
"""
    command = [sys.executable, "-W", "ignore", "-c", code, str(tmp_path / "a.session")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    size, saving, loading = map(int, done.stdout.split())
    print(f"\n{size:,} bytes: saving took {saving:,} more, loading {loading:,}")
    assert size > 200_000_000
    assert saving < 16 * 2**20
    assert loading < 16 * 2**20
