"""Memory of continuations: what is counted, and what is refused before any work."""

from __future__ import annotations

from typing import Any

import pytest
from rich.console import Console

from graphopt.commands import continuations
from graphopt.commands.progress import steps
from graphopt.errors import OptionError


def measured(**changed: Any) -> dict[str, int]:
    asked = {"model": "llama:64x1", "dtype": "float32", "prompt": 200, "continuations": 8, "tokens": 3, **changed}
    return continuations.measure(**asked, step=steps(Console(quiet=True)))


@pytest.mark.slow
def test_paged_caches_hold_the_prompt_once() -> None:
    held = measured()
    assert held["eager, DynamicCache"] == 8 * 203 * 2 * 64 * 4  # sequences, rows, keys and values, numbers, bytes
    assert held["graphopt"] <= 1.5 * held["eager, DynamicCache"] + 8 * 32 * 2 * 64 * 4
    assert held["graphopt, paged"] < 0.4 * held["eager, DynamicCache"]
    console = Console(width=100, record=True)
    console.print(continuations.table(held, "title"))
    assert "1.000" in console.export_text()


@pytest.mark.parametrize(
    ("changed", "message"),
    [({"dtype": "float64"}, "dtype"), ({"tokens": 0}, "at least 1"), ({"model": "x"}, "no model")],
)
def test_wrong_requests_are_refused(changed: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        measured(**changed)
