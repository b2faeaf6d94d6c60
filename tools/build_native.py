"""Builds minillm/backends/native.c where a C compiler is there: run by pip at installation (pyproject.toml).

    python tools/build_native.py      # by hand, into the source tree

Without a compiler, on another processor than x86-64, or where the compiler is too old, nothing is built and nothing
fails: minillm then computes with torch's operators alone, and `minillm info` says so.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

try:
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface
except ImportError:  # run by hand
    BuildHookInterface = object

SOURCE = Path(__file__).resolve().parents[1] / "minillm" / "backends" / "native.c"
TARGET = SOURCE.with_name("_native.so")


class NativeBuildHook(BuildHookInterface):  # type: ignore[misc]
    """What hatchling calls before it packs a wheel or makes an editable installation."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:  # noqa: ARG002
        """Build, and have the result packed and the wheel named after this platform."""
        if self.target_name == "wheel" and build(TARGET) is None:
            build_data["artifacts"].append(f"/{TARGET.relative_to(self.root)}")
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{_platform_tag()}"


def build(target: Path) -> str | None:
    """Compile to `target`, atomically; None, or why there is nothing."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return f"written for Linux on x86-64, not {sys.platform} on {platform.machine()}"
    compiler = shlex.split(os.environ.get("CC", "")) or [shutil.which("gcc") or shutil.which("cc") or ""]
    if not compiler[0]:
        return "no C compiler was found (gcc or cc)"
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        thing, made = Path(folder) / "native.o", Path(folder) / target.name
        # Linked in a second step without -fopenmp, so that OpenMP's functions are found in torch's own runtime.
        compile_ = [*compiler, "-O3", "-fPIC", "-fopenmp", "-Wall", "-c", str(SOURCE), "-o", str(thing)]
        link = [*compiler, "-shared", str(thing), "-o", str(made), "-lm"]
        for command in (compile_, link):
            try:
                done = subprocess.run(command, capture_output=True, text=True, check=False)
            except OSError as error:
                return f"{command[0]} cannot be run ({error.strerror})"
            if done.returncode:
                return f"{shlex.join(command)} failed: {(done.stderr.strip() or 'no message').splitlines()[0]}"
        made.replace(target)
    return None


def _platform_tag() -> str:
    """Such as linux_x86_64."""
    import sysconfig

    return sysconfig.get_platform().replace("-", "_").replace(".", "_")


if __name__ == "__main__":
    problem = build(TARGET)
    print(problem or TARGET)
    sys.exit(1 if problem else 0)
