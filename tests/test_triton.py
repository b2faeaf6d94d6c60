"""The Triton backend: its kernels in a process that interprets them, and who may choose it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from minillm import ConfigError
from minillm.checkpoint import choose_backend, triton_missing

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")


def interpreted(*command: str) -> str:
    """What a Python prints whose Triton kernels are interpreted; Triton looks at that once, when it is imported."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, cwd=ROOT, env=environment, check=False
    )
    assert ran.returncode == 0, ran.stdout[-8000:] + ran.stderr[-2000:]
    return ran.stdout


def test_every_kernel_beside_the_reference() -> None:
    pytest.importorskip("triton", reason="triton is not installed: pip install triton, on Linux")
    told = interpreted("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/triton_cases.py")
    assert "passed" in told
    print(told)


def test_it_is_refused_on_a_cpu_in_one_line() -> None:
    assert triton_missing(CPU) is not None
    with pytest.raises(ConfigError, match=r"^backend triton cannot serve: .*; use --backend auto$"):
        choose_backend("triton", torch.float32, CPU)


def test_auto_never_takes_it_on_a_cpu() -> None:
    assert choose_backend("auto", torch.bfloat16, CPU) == "cpu"
    assert choose_backend("auto", torch.float16, CPU) == "reference"


def test_auto_takes_it_on_cuda() -> None:
    pytest.importorskip("triton", reason="triton is not installed: pip install triton, on Linux")
    assert choose_backend("auto", torch.bfloat16, torch.device("cuda")) == "triton"


def test_auto_falls_back_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minillm.checkpoint.find_spec", lambda name: None)  # noqa: ARG005
    assert choose_backend("auto", torch.bfloat16, torch.device("cuda")) == "reference"
    with pytest.raises(ConfigError, match="triton is not installed"):
        choose_backend("triton", torch.bfloat16, torch.device("cuda"))
