"""The tools that run for hours, run for seconds; and their checks can fail."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from minillm.slots import LayerCache

from .helpers import make_cache, run, tiny_model

TOOLS = Path(__file__).parents[1] / "tools"
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_checks_of_the_soak_notice_every_breach() -> None:
    check, model = load("soak").check, tiny_model()
    tokens = torch.randint(97, (1, 101), generator=torch.Generator().manual_seed(0))
    breaches: dict[str, Callable[[LayerCache, Tensor], object]] = {  # `head`: the positions [S] of one KV head
        "two slots": lambda _, head: head.__setitem__(int(head.argmin()), head.max()),  # the lowest is an empty slot
        "tokens are kept": lambda _, head: head.masked_fill_(head == head[head > 30].min(), -1),
        "a sink is gone": lambda _, head: head.masked_fill_(head == 0, 5000),
        "a recent token is gone": lambda _, head: head.masked_fill_(head == 98, 15),
        "keys of layer 1": lambda layer, _: layer.keys.fill_(torch.nan),
    }
    for says, breach in breaches.items():
        cache = make_cache(model, "hashevict", 32, evict_every=4, sinks=2, recent=8)
        run(model, cache, tokens, 16)
        check(cache)
        breach(cache.layers[1], cache.layers[1].positions[0, 1])
        with pytest.raises(AssertionError, match=says):
            check(cache)


@linux_only
def test_a_short_soak() -> None:
    command = [sys.executable, str(TOOLS / "soak.py"), "--tokens", "900", "--check", "100", "--slots", "32"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    last = done.stdout.splitlines()[-1]
    assert re.search(r"^900 tokens in \d+ s, 9 checks passed; memory slope [+-][\d,]+ bytes per million tokens", last)


@linux_only
def test_a_short_book(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the picture is drawn with matplotlib, of the lab extra")
    book, svg = tmp_path / "book.txt", tmp_path / "book.svg"
    book.write_text("Call me Ishmael. Some years ago, never mind how long precisely, I thought I would sail. " * 400)
    command = [sys.executable, str(TOOLS / "read_book.py"), str(book), "--slots", "64", "--svg", str(svg)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = re.search(r"([\d,]+) tokens of book.txt; seen ([\d,]+), kept ([\d.]+)", done.stdout)
    assert found is not None
    prompt, seen, kept = (float(number.replace(",", "")) for number in found.groups())
    assert seen == prompt + 7
    assert kept <= 64
    peaks = re.search(r"first 10,000 tokens ([\d.]+) MB, of all ([\d.]+) MB", done.stdout)
    assert peaks is not None
    assert float(peaks[2]) - float(peaks[1]) < 8
    assert "read_book.py book.txt" in svg.read_text("utf-8")
