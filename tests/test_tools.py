"""The benchmarks and pictures under tools/ run: each in its quick mode, in a process of its own."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

TOOLS = Path(__file__).parents[1] / "tools"


def run(tool: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOLS / tool), "--threads", "1", *options]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_bench_eager_prints_a_cost_for_every_number_of_slots() -> None:
    done = run("bench_eager.py", "--layers", "1", "--slots", "32", "64", "--tokens", "8")
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"^ +(\d+) slots: window +([\d.]+) +hashevict +([\d.]+)", done.stdout, re.MULTILINE)
    assert [int(slots) for slots, *_ in rows] == [32, 64]
    assert all(float(cost) > 0 for _, *costs in rows for cost in costs)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc/self/status")
def test_plot_memory_prints_a_table_and_draws_it(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the picture is drawn with matplotlib, of the lab extra")
    svg = tmp_path / "memory.svg"
    done = run("plot_memory.py", "--quick", "--svg", str(svg))
    assert done.returncode == 0, done.stderr
    rows = [line.replace(",", "").split() for line in done.stdout.splitlines() if line.lstrip()[:1].isdigit()]
    tokens, theirs, ours = (
        [int(row[0]) for row in rows],
        [float(row[1]) for row in rows],
        [float(row[5]) for row in rows],
    )
    assert tokens == [0, 64, 128, 256, 512, 1024]
    assert theirs[-1] == pytest.approx(1024 * 2 * 2 * 128 * 4 / 1e6, abs=0.1)  # tokens, layers, K and V, width, bytes
    assert ours[1] == ours[-1] < theirs[-1] / 10
    root = ElementTree.parse(svg).getroot()
    description = root.find("{http://www.w3.org/2000/svg}desc")
    assert description is not None
    assert "plot_memory.py --threads 1 --quick" in (description.text or "")


def test_plot_memory_refuses_tokens_that_are_no_whole_chunks() -> None:
    done = run("plot_memory.py", "--tokens", "1000")
    assert done.returncode == 2
    assert "--tokens 1000 is not a multiple of --chunk 256" in done.stderr
