"""Fixtures of the suites: a clean Dynamo for every test, rotation of the costly ones."""

import pathlib
from collections.abc import Iterator

import pytest
import torch

from tests.suite import door

HERE = pathlib.Path(__file__).parent


def pytest_configure(config: pytest.Config) -> None:
    """Declare the marker used here."""
    config.addinivalue_line("markers", "rotate(one_in): slow, but for the share that the commit's hash picks")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as slow what rotates and is not in today's share."""
    for item in items:
        mark = item.get_closest_marker("rotate")
        if mark is None or HERE not in item.path.parents:
            continue
        if not door.in_rotation(item.name, mark.kwargs["one_in"]):
            item.add_marker(pytest.mark.slow)


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
