"""The benchmarks and pictures under tools/ run: each in its quick mode, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from minillm.policies import POLICIES

TOOLS = Path(__file__).parents[1] / "tools"


def run(tool: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOLS / tool), "--threads", "1", *options]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_policy_table_has_a_row_for_every_policy() -> None:
    quick = ("--slots", "32", "64", "--rounds", "2", "--calls", "1", "--heads", "4", "--kv-heads", "2")
    done = run("policy_table.py", *quick)
    assert done.returncode == 0, done.stderr
    header, _, *rows = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("|")]
    assert header[3:] == ["evict at 32", "evict at 64", "token at 32", "token at 64 |"]
    names = {row[0].strip("| `") for row in rows}
    assert {name for name, policy in POLICIES.items() if policy.evicts} <= names
    assert all(len(row) == len(header) for row in rows)
    done = run("policy_table.py", *quick, "--dtype", "float32", "--json")
    found = json.loads(done.stdout)
    costs = found["policies"]["hashevict"]
    assert costs["slot_bytes"] == 2 * 64 * 4 + 4 + 1 + 2  # key and value, position, flags, 16 bits
    assert costs["head_bytes"] == 16 * 64 * 4 / 2  # half of a projection that two KV heads share
    assert all(costs["evict_us"][slots] > 0 for slots in ("32", "64"))


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
