"""The control groups around this process, whose limits are those of a container.  Reads /proc and /sys/fs/cgroup."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class Group(NamedTuple):
    """One of them: the version of its interface (1 or 2), and its folder."""

    version: int
    folder: Path


def groups(controller: str, root: Path = Path("/")) -> Iterator[Group]:
    """The groups that limit this process in one respect (memory, cpu), from the inside out.

    In a container the outer ones are not there to be seen.  root: where /proc and /sys lie, for tests.
    """
    mounted = root / "sys/fs/cgroup"
    for line in text(root / "proc/self/cgroup").splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0":  # version 2, in a folder of its own where both are in use
            for mount in (mounted, mounted / "unified"):
                yield from (Group(2, folder) for folder in _around(mount, path))
        elif controller in controllers.split(","):
            yield from (Group(1, folder) for folder in _around(mounted / controller, path))


def _around(mount: Path, path: str) -> Iterator[Path]:
    group = mount / path.strip("/")
    for folder in (group, *group.parents):
        yield folder
        if folder == mount:
            return


def text(file: Path) -> str:
    """What a file says; nothing where there is none."""
    try:
        return file.read_text("utf-8")
    except OSError:
        return ""
