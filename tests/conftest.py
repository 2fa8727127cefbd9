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

from graphopt.backends import cpp
from graphopt.backends.cpp import build


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    """The same seed for every test, and no compiled code of one test in another."""
    torch.manual_seed(0)
    yield
    torch.compiler.reset()


@pytest.fixture(scope="session")
def cpp_library() -> None:
    """The built C++ kernels. Skips on a machine that cannot build any; kernels that do not compile are a failure."""
    if reason := build.unavailable_reason():
        pytest.skip(reason)
    assert cpp.unavailable_reason() is None
