"""What bench.py asks the machine: its name, how fast its memory is, and whether it was busy with something else.

Reads /proc, where there is one.
"""

from __future__ import annotations

import math
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

BUFFERS, BUFFER_NUMBERS = 8, 1 << 24  # float32: 512 MiB, read in turn, so that caches hold little of what comes next


def read_bandwidth(device: torch.device) -> float:
    """Bytes per second at which all threads together read memory: the best of two ways and three passes.

    Whoever's caches hold more than the buffers, or a model that is smaller than its caches, can be faster.
    """
    if device.type == "cuda":  # one that is read again and again: a kernel of 64 MiB would be over before it is fast
        buffers = [torch.ones(BUFFERS * BUFFER_NUMBERS, device=device)] * BUFFERS
    else:
        buffers = [torch.ones(BUFFER_NUMBERS, device=device) for _ in range(BUFFERS)]
    once, best = torch.ones(1 << 12, device=device), math.inf
    ways: tuple[Callable[[Tensor], Tensor], ...] = (torch.sum, lambda buffer: buffer.view(-1, len(once)).mv(once))
    for way in ways * 3:
        begin = now(device)
        for buffer in buffers:
            way(buffer)
        best = min(best, now(device) - begin)
    return sum(buffer.nbytes for buffer in buffers) / best


def cpu_name() -> str:
    """What the processor calls itself, where the system tells."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text("utf-8").splitlines() if info.is_file() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


class Others:
    """How many cores other processes have had since this was made, time that the host took away included."""

    def __init__(self) -> None:
        self._begin = self._now()

    def cores(self) -> float | None:
        """The mean so far; None where the system does not tell."""
        (wall, own, busy), (wall_now, own_now, busy_now) = self._begin, self._now()
        if busy is None or busy_now is None or wall_now == wall:
            return None
        return max(0.0, (busy_now - busy - (own_now - own)) / (wall_now - wall))

    def _now(self) -> tuple[float, float, float | None]:
        """Seconds: by the clock, of this process on all cores, and of everybody."""
        stat = Path("/proc/stat")
        busy = None
        if stat.is_file():
            ticks = [int(word) for word in stat.read_text("utf-8").partition("\n")[0].split()[1:9]]
            user, nice, system, _, _, interrupts, soft, stolen = ticks  # between: idle, and waiting for disks
            busy = (user + nice + system + interrupts + soft + stolen) / os.sysconf("SC_CLK_TCK")
        return time.perf_counter(), time.process_time(), busy


def now(device: torch.device) -> float:
    """Seconds, once the device has done what it was told to do."""
    torch.get_device_module(device).synchronize()
    return time.perf_counter()
