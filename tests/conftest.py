"""What every test starts from: no downloads, quiet waiting threads, a fixed seed, no compiled code left over;
and of what rotates, today's share."""

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
from tests.suite import door


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as slow what rotates and is not in today's share."""
    for item in items:
        mark = item.get_closest_marker("rotate")
        if mark is not None and not door.in_rotation(mark.kwargs.get("by", item.name), mark.kwargs["one_in"]):
            item.add_marker(pytest.mark.slow)


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
