"""A prologue keeps all packs of a call while no weight has changed, and nothing longer than that."""

from __future__ import annotations

import gc
import pickle

import pytest
import torch

import graphopt.quantization  # noqa: F401  (registers the packing operations)
from graphopt.quantization import schemes
from graphopt.runtime import packs
from graphopt.runtime.prologue import Input, Prologue, Step

PACK = "graphopt.quantize_weight.default"


@pytest.fixture
def prologue() -> Prologue:
    """Inputs x, a, b; packs of a and b; a sum of sizes that must be computed at each call."""
    steps = (
        Step(PACK, (Input(1), "int8", None)),
        Step("getitem", (Input(3), 0)),
        Step("add", (Input(0), 1)),
        Step(PACK, (Input(2), "int8", None)),
        Step("getitem", (Input(6), 1)),
    )
    return Prologue(steps, (4, 5, 7))


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    seen: list[str] = []
    real = schemes.Scheme.pack
    monkeypatch.setattr(schemes.Scheme, "pack", lambda self, weight: seen.append(self.name) or real(self, weight))
    packs.refresh()
    return seen


def check(prologue: Prologue, x: int, a: torch.Tensor, b: torch.Tensor) -> None:
    codes, size, scale = prologue([x, a, b])
    scheme = schemes.named("int8")
    expected = [part.detach() for part in (scheme.pack(a)[0], scheme.pack(b)[1])]
    assert torch.equal(codes, expected[0]) and torch.equal(scale, expected[1]) and size == x + 1


def test_other_steps_run_at_each_call(prologue: Prologue, count: list[str]) -> None:
    a, b = torch.randn(3, 4), torch.randn(2, 4)
    for x in (1, 5, 9):
        check(prologue, x, a, b)
    assert len(count) == 2 + 3 * 2  # two packs in all; the others are those of `check` itself


@pytest.mark.parametrize("change", ["in place", "data", "other tensor", "swapped"])
def test_a_changed_weight_is_seen(prologue: Prologue, count: list[str], change: str) -> None:
    a, b = torch.nn.Parameter(torch.randn(3, 4)), torch.nn.Parameter(torch.randn(3, 4))
    check(prologue, 1, a, b)
    with torch.no_grad():
        if change == "in place":
            b.neg_()
        elif change == "data":
            b.data = torch.randn(3, 4)
        elif change == "other tensor":
            b = torch.nn.Parameter(torch.randn(3, 4))
        else:
            a, b = b, a
    check(prologue, 1, a, b)


def test_refresh_is_seen(prologue: Prologue, count: list[str]) -> None:
    a, b = torch.randn(3, 4), torch.randn(2, 4)
    prologue([1, a, b])
    a.data.add_(1)
    packs.refresh()
    check(prologue, 1, a, b)


def test_packs_die_with_their_weights(prologue: Prologue, count: list[str]) -> None:
    a, b = torch.randn(300, 4), torch.randn(2, 4)
    codes = prologue([1, a, b])[0]
    assert prologue._kept
    del a
    gc.collect()
    assert not prologue._kept and codes.numel() == 1200


def test_stored_without_packs(prologue: Prologue, count: list[str]) -> None:
    a, b = torch.randn(3, 4), torch.randn(2, 4)
    check(prologue, 1, a, b)
    again = pickle.loads(pickle.dumps(prologue))
    assert again == prologue and not again._kept
    check(again, 1, a, b)
