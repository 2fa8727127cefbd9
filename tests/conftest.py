"""What every test starts from: no downloads, quiet waiting threads, a fixed seed, no compiled code left over."""

from __future__ import annotations

import os

# Read by libraries when they are loaded, so set before anything imports them.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # several test processes share the cores

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    """The same seed for every test, and no compiled code of one test in another."""
    torch.manual_seed(0)
    yield
    torch.compiler.reset()
