"""Fixtures that every test may use: the folder of real artefacts, and one thread so that results repeat."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real tokenizers, texts and a trained checkpoint: $MINILLM_TEST_DATA, else ../shared/data beside the
    repository.
    """
    folder = Path(os.environ.get("MINILLM_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no folder of real artefacts at {folder}: set MINILLM_TEST_DATA to run this test")
    return folder


@pytest.fixture(autouse=True, scope="session")
def _two_threads() -> None:
    torch.set_num_threads(min(2, os.cpu_count() or 1))
