"""Fixtures of the suites: a clean Dynamo for every test, and the targets."""

from collections.abc import Iterator

import pytest
import torch

from tests.suite import door


@pytest.fixture(autouse=True)
def _clean_compiler() -> Iterator[None]:
    """No compiled code, seed, mode or default of one test reaches the next."""
    door.fresh()
    torch.manual_seed(0)
    grad, dtype = torch.is_grad_enabled(), torch.get_default_dtype()
    yield
    torch.set_grad_enabled(grad)
    torch.set_default_dtype(dtype)
    door.fresh()


@pytest.fixture(
    params=["reference", pytest.param("cpu", marks=pytest.mark.rotate(one_in=8))],
)
def target(request: pytest.FixtureRequest) -> str:
    """Every program runs by the meaning of its graph, and by turns in generated code."""
    return str(request.param)
