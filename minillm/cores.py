"""How many CPU cores this process may use: of the machine, of its affinity, of its control groups.

Reads /proc and /sys.  One thread a physical core is what a decode step wants: it waits for memory, not for arithmetic,
and a thread beyond the quota of a container is stopped in the middle of a step that all the others then wait for.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from .cgroups import groups, text


def usable_cores(root: Path = Path("/")) -> int:
    """Physical cores that this process may run on, and no more than its quota, rounded up; at least 1.

    root: where /proc and /sys lie, for tests.
    """
    if sys.platform != "linux":
        return os.cpu_count() or 1
    allowed = os.sched_getaffinity(0)
    topology = root / "sys/devices/system/cpu"
    siblings = {text(topology / f"cpu{cpu}/topology/thread_siblings_list") or str(cpu) for cpu in allowed}
    return max(1, min(len(siblings), *(math.ceil(quota) for quota in _quotas(root)), len(allowed)))


def _quotas(root: Path) -> Iterator[float]:
    """Cores that the control groups around this process grant, where they limit them."""
    for version, folder in groups("cpu", root):
        if version == 2:
            quota, _, period = text(folder / "cpu.max").strip().partition(" ")
        else:
            quota, period = (text(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period"))
        if quota.isdigit() and period.isdigit():  # else absent, "max" or -1
            yield int(quota) / int(period)
