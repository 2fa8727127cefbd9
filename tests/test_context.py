"""The cost of a token against the context: arithmetic, what is printed and saved, what is refused before any work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from graphopt.commands import context
from graphopt.commands.figures import Agreement, Limits
from graphopt.commands.progress import steps
from graphopt.errors import OptionError


def result() -> context.ContextResult:
    milliseconds = {128: 10.0, 4096: 16.0}
    curve = context.Curve("graphopt", milliseconds, {128: 9.0, 4096: 13.0}, 2**30, Agreement(8, 8, 0, 0.0), 1500.0)
    read = {128: 1e6, 4096: 21e6}
    return context.ContextResult("tiny", "float32", "a machine", {}, Limits(1e10, 1e12, 2), read, (curve,))


def test_growth_is_measured_in_floors() -> None:
    made = result()
    assert made.floor == pytest.approx(2.0)  # 20 MB at 10 GB/s
    assert made.growth(made.curves[0]) == pytest.approx(2.0)  # 4 ms


def test_table_json_and_plot_hold_the_figures(tmp_path: Path) -> None:
    console = Console(width=200, record=True)
    console.print(context.table(result()))
    text = console.export_text()
    assert all(word in text for word in ("graphopt", "4096", "16.0", "2.0", "1500", "1024", "8/8"))
    result().save(tmp_path / "context.json")
    saved = json.loads((tmp_path / "context.json").read_text())
    assert saved["curves"][0]["growth"] == pytest.approx(2.0) and saved["cache_bytes"]["4096"] == 21e6
    context.plot(result(), tmp_path / "context.png")
    assert (tmp_path / "context.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"dtype": "float64"}, "dtype"),
        ({"lengths": [128]}, "two or more rising"),
        ({"lengths": [512, 128]}, "two or more rising"),
        ({"lengths": [0, 128]}, "two or more rising"),
        ({"rounds": 0}, "at least 1"),
        ({"systems": "inductr"}, "did you mean"),
    ],
)
def test_wrong_requests_are_refused(changed: dict[str, object], message: str) -> None:
    asked = {
        "model": "llama:64x1",
        "systems": "eager",
        "dtype": "float32",
        "lengths": [8, 16],
        "checked": 2,
        "rounds": 1,
        "cold": False,
    }
    with pytest.raises(OptionError, match=message):
        context.measure(**{**asked, **changed}, step=steps(Console()))  # type: ignore[arg-type]


def test_what_is_measured_is_kept_after_each_length() -> None:
    kept: list[context.ContextResult] = []
    whole = context.measure("llama:64x1", "eager", "float32", [4, 8, 16], 2, 1, False, steps(Console()), kept.append)
    assert [list(one.cache_bytes) for one in kept] == [[4, 8], [4, 8, 16]]
    assert all(set(one.curves[0].milliseconds) == set(one.cache_bytes) for one in (*kept, whole))
    assert kept[-1].curves[0].milliseconds == whole.curves[0].milliseconds
    assert whole.limits.read_bandwidth >= kept[-1].limits.read_bandwidth
