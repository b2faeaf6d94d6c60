"""The Triton backend where it is used: who may choose it, a server, its compiler, its benchmark."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from minillm import ConfigError
from minillm.checkpoint import choose_backend, triton_missing

from .serving import serving
from .tiny_checkpoint import write_checkpoint

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
ABSENT = "triton is not installed; there are wheels for Linux on x86-64"


def python(*command: str, **environment: str) -> str:
    """What a Python prints.  Whether kernels are interpreted Triton asks the environment once, when it is imported."""
    pytest.importorskip("triton", reason=ABSENT)
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
    ran = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, cwd=ROOT, env=variables, check=False
    )
    assert ran.returncode == 0, ran.stdout[-8000:] + ran.stderr[-2000:]
    return ran.stdout


def test_a_server_replays_its_steps(tmp_path: Path) -> None:
    """Clients get the same at a time and one after the other, and a session has seen what it was told."""
    pytest.importorskip("triton", reason=ABSENT)
    pytest.importorskip("uvicorn", reason="pip install 'minillm[serve]'")
    model = write_checkpoint(tmp_path / "tiny")
    options = ("--model", model, "--backend", "triton", "--device", "cpu", "--dtype", "float32", "--budget", 12)
    with serving(*options, "--evict-every", 3, "--rows", 2, "--prefixes", 1, env={"TRITON_INTERPRET": "1"}) as server:

        def ask(number: int) -> str:
            drawn = {"temperature": 0.9, "seed": number, "max_tokens": 3 + number, "ignore_eos": True}
            return str(server.complete("the dog sat on " * number, **drawn)["choices"][0]["text"])

        with ThreadPoolExecutor(3) as clients:
            together = list(clients.map(ask, range(1, 4)))
        assert together == [ask(number) for number in range(1, 4)]
        server.complete("once upon a time", session="max", max_tokens=5, ignore_eos=True)
        read = server.request("/tokenize", {"prompt": "once upon a time"})[1]["count"]
        assert server.request("/v1/sessions/max")[1]["seen_tokens"] == read + 4  # the last one drawn is never fed


@pytest.mark.slow
def test_kernels_compile_for_gpus_that_are_not_here(tmp_path: Path) -> None:
    command = ("tools/compile_kernels.py", "--capability", "90", "--tokens", "1")
    told = python(*command, TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))
    for kernel in ("enter", "attend", "join", "rms_norm", "gated", "rotate"):
        assert re.search(rf"{kernel} +sm_90 +[\d,]+ bytes", told), kernel


@pytest.mark.slow
def test_the_benchmark_of_a_gpu_runs() -> None:
    """One experiment with steps and one with prompts; the others are made of the same parts."""
    experiments = ("step", "million")
    told = python("tools/measure_gpu.py", "--quick", "--rows", "1", *experiments, TRITON_INTERPRET="1")
    found = json.loads(told.splitlines()[-1])["found"]
    assert tuple(found) == experiments
    assert [line["way"] for line in found["step"][:3]] == ["reference", "kernels", "recorded"]
    assert len({line["held_bytes"] for line in found["million"]}) == 1


def test_it_is_refused_on_a_cpu_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert triton_missing(CPU) is not None
    with pytest.raises(ConfigError, match=r"^backend triton cannot serve: .*; use --backend auto$"):
        choose_backend("triton", torch.float32, CPU)


def test_auto_never_takes_it_on_a_cpu() -> None:
    assert choose_backend("auto", torch.bfloat16, CPU) == "cpu"
    assert choose_backend("auto", torch.float16, CPU) == "reference"


def test_auto_does_not_take_what_no_gpu_has_run_and_says_that_it_is_there() -> None:
    pytest.importorskip("triton", reason=ABSENT)
    with pytest.warns(UserWarning, match=r"--backend triton is there to be fast, but no GPU has run it yet"):
        assert choose_backend("auto", torch.bfloat16, torch.device("cuda")) == "reference"


def test_an_old_triton_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch 2.6 and 2.7 bring one that has no `tl.topk`: neither a traceback nor a word of what is there."""
    triton = pytest.importorskip("triton", reason=ABSENT)
    monkeypatch.setattr(triton, "__version__", "3.3.1")
    with pytest.raises(
        ConfigError, match=r"^backend triton cannot serve: its kernels need Triton 3\.4 .*, not 3\.3\.1; "
    ):
        choose_backend("triton", torch.bfloat16, torch.device("cuda"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose_backend("auto", torch.bfloat16, torch.device("cuda")) == "reference"


def test_where_it_is_missing_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minillm.checkpoint.find_spec", lambda name: None)  # noqa: ARG005
    with pytest.raises(ConfigError, match="triton is not installed"):
        choose_backend("triton", torch.bfloat16, torch.device("cuda"))
