"""What tests of the C++ kernels share: every instruction set this machine runs, and numbers of threads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from graphopt.backends import cpp

ISAS = ("amx", "avx512bf16", "avx512vnni", "avx512", "avx2", "plain")


@pytest.fixture(scope="session")
def cpp_library() -> None:
    """The built kernels; without a compiler the test is skipped with the reason."""
    if reason := cpp.unavailable_reason():
        pytest.skip(reason)


@pytest.fixture(params=ISAS)
def isa(cpp_library: None, request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set this machine runs, forced."""
    kernels = torch.ops.graphopt_cpp
    if request.param not in kernels.isas().split():
        pytest.skip(f"this machine does not run {request.param}")
    kernels.set_isa(request.param)
    yield request.param
    kernels.set_isa("")


@pytest.fixture(params=(1, 2))
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Numbers of threads; torch's own is put back."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)
