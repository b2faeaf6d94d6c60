"""How much memory this process holds, how much it may have, and a guard that holds it to a promise.

Reads /proc and /sys/fs/cgroup, and asks torch about CUDA.  It must not know what the memory is for (planner.py).
"""

from __future__ import annotations

import ctypes
import os
import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch

from .cgroups import groups, text
from .errors import MemoryPromiseError

STATUS = re.compile(r"^Vm(?:HWM|RSS):\s+(\d+) kB$", re.MULTILINE)  # the peak, then the present
UNKNOWN = sys.maxsize  # bytes, where the system does not tell: nothing is refused
# By how much a peak may rise that nobody has broken a promise with again: Linux sums up what each core has counted when
# it likes (the same peak was read 288 KiB apart on 2 cores), and telling an error takes memory as well.
PEAK_NOISE = 4 << 20


class Held(NamedTuple):
    """Bytes: now, and at most so far."""

    now: int
    peak: int


def held(device: torch.device | str = "cpu") -> Held:
    """What this process holds where a model on `device` lives: in RAM, or what torch has reserved on a CUDA device.

    Zeros where the system does not tell (Windows).
    """
    if torch.device(device).type == "cuda":
        return Held(torch.cuda.memory_reserved(device), torch.cuda.max_memory_reserved(device))
    if sys.platform == "linux":  # where ru_maxrss would be at least that of the process that started us
        peak, now = STATUS.findall(text(Path("/proc/self/status")))
        return Held(int(now) * 1024, int(peak) * 1024)
    try:
        import resource
    except ImportError:
        return Held(0, 0)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return Held(most, most)  # the present is not to be had


def trim() -> None:
    """Hand freed memory back to the system, where the C library can (glibc): what is held is then what is in use."""
    if sys.platform == "linux":
        with suppress(AttributeError):
            ctypes.CDLL(None).malloc_trim(0)


class Room(NamedTuple):
    """Bytes that this process could ever have, and those it could have now, what it holds already included."""

    ever: int
    now: int


def room(device: torch.device | str = "cpu", root: Path = Path("/")) -> Room:
    """The least that the machine, and every control group around this process, allow.

    root: where /proc and /sys lie, for tests.
    """
    if torch.device(device).type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return Room(total, free + torch.cuda.memory_reserved(device))
    limits = list(_limits(root))  # here `now` is what could be added
    added = min((limit.now for limit in limits), default=UNKNOWN)
    return Room(min((limit.ever for limit in limits), default=UNKNOWN), min(UNKNOWN, added + held().now))


def _limits(root: Path) -> Iterator[Room]:
    """The machine's memory, then the limits of this process's control groups, versions 1 and 2 alike."""
    machine = _fields(root / "proc/meminfo")
    if machine:
        yield Room(machine["MemTotal"], machine.get("MemAvailable", machine["MemTotal"]))
    elif sys.platform == "darwin":
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        yield Room(total, total)
    names = {  # by version
        1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        2: ("memory.max", "memory.current", "inactive_file"),
    }
    for version, folder in groups("memory", root):
        limit, usage, reclaimable = names[version]
        most = text(folder / limit).strip()
        if most.isdigit():  # neither absent nor "max"
            used = int(text(folder / usage) or 0)
            # Pages of files that nobody has touched lately are given up before anybody is killed.
            used -= _fields(folder / "memory.stat").get(reclaimable, 0)
            yield Room(int(most), int(most) - max(0, used))


def _fields(file: Path) -> dict[str, int]:
    """Lines such as "VmRSS:   12 kB" or "inactive_file 12288" -> bytes by name; what is no number is left out."""
    lines = re.findall(r"^(\w+):?\s+(\d+)( kB)?$", text(file), re.MULTILINE)
    return {name: int(number) * (1024 if unit else 1) for name, number, unit in lines}


class Guard:
    """Holds this process to a promise: `check` is called after every chunk and token."""

    def __init__(self, promise: int, device: torch.device | str, remedy: str) -> None:
        """promise: bytes that are never to be exceeded.  remedy: what to do about it, for the error."""
        self.promise, self.device, self.remedy = promise, torch.device(device), remedy
        self._known = self._news_beyond(held(device).peak)  # what this process did earlier is no news

    def _news_beyond(self, peak: int) -> int:
        return peak + PEAK_NOISE if peak > self.promise else self.promise

    def check(self) -> None:
        """Raise MemoryPromiseError if more is held than was promised, or was between two checks."""
        now, peak = held(self.device)
        most = peak if peak > self._known else now
        if most > self.promise:
            self._known = self._news_beyond(peak)
            raise MemoryPromiseError(
                f"memory has reached {most:,} bytes, {most - self.promise:,} above the promise of {self.promise:,}; "
                f"{self.remedy}"
            )
