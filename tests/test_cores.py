"""How many cores a process may use, over made-up /proc and /sys."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import pytest
import torch

from minillm.cli.opening import choose_threads
from minillm.cores import usable_cores

linux = pytest.mark.skipif(os.name != "posix" or not Path("/proc").is_dir(), reason="control groups are Linux's")


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Eight CPUs, two to a core, all of which may be used."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    for cpu in range(8):
        write(tmp_path / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list", f"{cpu % 4},{cpu % 4 + 4}\n")
    return tmp_path


def write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


@linux
def test_threads_of_one_core_count_once(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert usable_cores(machine) == 4
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 4})
    assert usable_cores(machine) == 1


@linux
@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"cpu.max": "max 100000\n"}, 4),
        ({"cpu.max": "150000 100000\n"}, 2),  # one and a half: rounded up
        ({"cpu.max": "20000 100000\n"}, 1),
        ({"cpu.max": "900000 100000\n"}, 4),
    ],
)
def test_quotas_of_version_2(files: dict[str, str], cores: int, machine: Path) -> None:
    write(machine / "proc/self/cgroup", "0::/a/b\n")
    for name, text in files.items():
        write(machine / "sys/fs/cgroup/a" / name, text)  # of the group around ours
    assert usable_cores(machine) == cores


@linux
@pytest.mark.parametrize(("quota", "cores"), [("-1", 4), ("300000", 3)])
def test_quotas_of_version_1(quota: str, cores: int, machine: Path) -> None:
    write(machine / "proc/self/cgroup", "5:cpu,cpuacct:/docker/x\n4:memory:/docker/x\n")
    folder = machine / "sys/fs/cgroup/cpu/docker/x"
    write(folder / "cpu.cfs_quota_us", quota)
    write(folder / "cpu.cfs_period_us", "100000")
    assert usable_cores(machine) == cores


def test_what_decides_the_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """--threads, else OMP_NUM_THREADS, which torch has heeded, else the cores."""
    monkeypatch.setattr("minillm.cores.usable_cores", lambda: 3)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    choose_threads(argparse.Namespace(threads=None))
    assert torch.get_num_threads() == 3  # conftest.py puts it back
    choose_threads(argparse.Namespace(threads=2))
    assert torch.get_num_threads() == 2
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    choose_threads(argparse.Namespace(threads=None))
    assert torch.get_num_threads() == 2, "left alone"
