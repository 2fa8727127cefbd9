"""Tiny models of many architectures through the backend: forward, padding, generation, bfloat16, gradients."""

import pytest

from tests.suite import architectures

CASES = [
    pytest.param(architecture.name, kind, id=f"{architecture.name}-{kind}")
    for architecture in architectures.ARCHITECTURES
    for kind in architecture.checks
]


@pytest.mark.rotate(one_in=20)
@pytest.mark.parametrize("name, kind", CASES)
def test_meaning(name: str, kind: str) -> None:
    architectures.check(name, kind, target="reference")


@pytest.mark.rotate(one_in=72)
@pytest.mark.parametrize("name, kind", CASES)
def test_generated_code(name: str, kind: str) -> None:
    architectures.check(name, kind, target="cpu", strict=True)


def test_there_are_enough() -> None:
    assert len(architectures.ARCHITECTURES) >= 25
