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


def usable_cores(root: Path = Path("/")) -> int:
    """Physical cores that this process may run on, and no more than its quota, rounded up; at least 1.

    root: where /proc and /sys lie, for tests.
    """
    if sys.platform != "linux":
        return os.cpu_count() or 1
    allowed = os.sched_getaffinity(0)
    topology = root / "sys/devices/system/cpu"
    siblings = {_text(topology / f"cpu{cpu}/topology/thread_siblings_list") or str(cpu) for cpu in allowed}
    return max(1, min(len(siblings), *(math.ceil(quota) for quota in _quotas(root)), len(allowed)))


def _quotas(root: Path) -> Iterator[float]:
    """Cores that the control groups around this process grant, where they limit them: versions 2 and 1."""
    mounted = root / "sys/fs/cgroup"
    for line in _text(root / "proc/self/cgroup").splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0":
            for mount in (mounted, mounted / "unified"):
                for folder in _around(mount, path):
                    quota, _, period = _text(folder / "cpu.max").partition(" ")
                    if quota.isdigit() and period.isdigit():  # else absent, or "max"
                        yield int(quota) / int(period)
        elif "cpu" in controllers.split(","):
            for folder in _around(mounted / "cpu", path):
                quota, period = _text(folder / "cpu.cfs_quota_us"), _text(folder / "cpu.cfs_period_us")
                if quota.isdigit() and period.isdigit():  # else absent, or -1
                    yield int(quota) / int(period)


def _around(mount: Path, path: str) -> Iterator[Path]:
    """The folder of a group, and of all groups around it."""
    group = mount / path.strip("/")
    for folder in (group, *group.parents):
        yield folder
        if folder == mount:
            return


def _text(file: Path) -> str:
    try:
        return file.read_text("utf-8").strip()
    except OSError:
        return ""
