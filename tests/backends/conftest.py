"""What tests of the C++ kernels share: the instruction sets this machine runs, and numbers of threads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from graphopt.backends import cpp
from graphopt.backends.cpp.isa import INSTRUCTION_SETS, InstructionSet, runnable


@pytest.fixture(scope="session")
def loaded_isas(cpp_library: None) -> dict[str, bool]:
    """Whether this machine runs an instruction set; those asked for before are loaded."""
    return {}


def _by_turns(each: InstructionSet) -> Any:
    """The kernels take half a minute to compile for each: always for the best that this machine runs."""
    rotates = () if each is runnable()[0] else pytest.mark.rotate(one_in=3, by=each.name)
    return pytest.param(each.name, marks=rotates)


@pytest.fixture(params=map(_by_turns, INSTRUCTION_SETS))
def isa(loaded_isas: dict[str, bool], request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set this machine runs, forced."""
    name = request.param
    if name not in loaded_isas:
        loaded_isas[name] = cpp.load_instruction_set(name)
    if not loaded_isas[name]:
        pytest.skip(f"this machine does not run {name}")
    torch.ops.graphopt_cpp.set_isa(name)
    yield name
    torch.ops.graphopt_cpp.set_isa("")


@pytest.fixture(params=(1, 2))
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Numbers of threads; torch's own is put back."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)
