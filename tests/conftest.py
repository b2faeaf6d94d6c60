"""Fixtures that every test may use: the folder of real artefacts, and one thread so that results repeat."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of processes that tests start, beside tests in other processes
import torch

import minillm.download  # noqa: F401  # its log handler keeps the stderr of its import, which may be that of one test

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # asked when Triton is imported first
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real tokenizers, texts and a checkpoint: $MINILLM_TEST_DATA, else ../shared/data beside the repository."""
    folder = Path(os.environ.get("MINILLM_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no folder of real artefacts at {folder}: set MINILLM_TEST_DATA to run this test")
    return folder


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Tiny models are fastest on one thread, and threads that wait for each other crawl on a busy machine."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _one_thread_again() -> Iterator[None]:
    """Training and tools choose their own number; the tests after them should not have it."""
    yield
    torch.set_num_threads(1)
