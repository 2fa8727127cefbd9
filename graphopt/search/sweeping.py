"""Compile a model under every combination of some options and compare: bytes, predicted and measured time, error."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from torch.utils._pytree import tree_leaves

from graphopt import report
from graphopt.errors import OptionError
from graphopt.options import Options
from graphopt.report_tables import human


@dataclasses.dataclass(frozen=True)
class Row:
    """One combination. bytes, predicted: of all its graphs, on the device of the roofline; measured: seconds of a call.

    bytes counts what the optimised graphs move as they stand, each kernel its inputs and outputs. error: the largest
    relative error of the floating point outputs, sqrt(sum (y - x)^2 / sum x^2), against the model without compiling.
    """

    options: dict[str, Any]
    bytes: float
    predicted: float
    measured: float
    error: float

    @property
    def name(self) -> str:
        return ", ".join(f"{name}={_shown(value)}" for name, value in self.options.items()) or "default"


@dataclasses.dataclass(frozen=True)
class Sweep:
    """All combinations in the order of the grid; prints as a table. eager: seconds of a call without compiling."""

    rows: tuple[Row, ...]
    eager: float
    device: str

    def to_json(self) -> str:
        """All figures as JSON text."""
        rows = [{**dataclasses.asdict(row), "options": {k: _shown(v) for k, v in row.options.items()}}
                for row in self.rows]  # fmt: skip
        return json.dumps({"device": self.device, "eager": self.eager, "rows": rows}, indent=1)

    def plot(self, path: str | Path) -> None:
        """Draw bytes, predicted and measured time and error as bars into a file (png, svg, pdf). Needs matplotlib."""
        from matplotlib import pyplot

        panels = [
            ("bytes moved (MB)", [row.bytes / 1e6 for row in self.rows], None),
            (f"predicted on {self.device} (ms)", [row.predicted * 1e3 for row in self.rows], None),
            ("measured (ms)", [row.measured * 1e3 for row in self.rows], self.eager * 1e3),
            ("relative error", [row.error for row in self.rows], None),
        ]
        height = 1.2 + 0.35 * len(self.rows)
        figure, axes = pyplot.subplots(1, len(panels), figsize=(4 * len(panels), height), sharey=True)
        for axis, (title, values, line) in zip(axes, panels, strict=True):
            bars = axis.barh(range(len(values)), values, color="#4c78a8")
            axis.bar_label(bars, fmt="%.3g", padding=3, fontsize=8)
            axis.margins(x=0.25)
            axis.set_title(title, fontsize=10)
            if line is not None:
                axis.axvline(line, color="#e45756", linestyle="--", label="eager")
                axis.legend(fontsize=8)
        axes[0].set_yticks(range(len(self.rows)), [row.name for row in self.rows], fontsize=8)
        axes[0].invert_yaxis()
        figure.tight_layout()
        figure.savefig(path, dpi=150)
        pyplot.close(figure)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = Table("options", "bytes", "predicted ms", "measured ms", "x eager", "error", title=f"on {self.device}")
        for row in self.rows:
            speed = f"{self.eager / row.measured:.2f}"
            figures = (f"{row.predicted * 1e3:.3f}", f"{row.measured * 1e3:.3f}", speed, f"{row.error:.2g}")
            table.add_row(row.name, f"{human(row.bytes)}B", *figures)
        yield table


def sweep(
    model: Callable[..., Any],
    *inputs: Any,
    grid: Mapping[str, Sequence[Any]],
    fixed: Mapping[str, Any] | None = None,
    roofline: str = "auto",
    rounds: int = 20,
    plot: str | Path | None = None,
    **kwargs: Any,
) -> Sweep:
    """Compile `model` under each combination of `grid` (option to values), run it on the inputs and compare.

    Gradients are not recorded. fixed: options of all combinations. rounds: calls that are timed of each; all take
    turns, and the median counts. plot: also draw the figures into this file. Raises OptionError for a wrong option
    before any work.
    """
    if rounds < 1:
        raise OptionError(f"rounds must be at least 1, got {rounds}")
    combinations = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    for chosen in combinations:
        Options.parse(None, {**(fixed or {}), **chosen})
    with torch.no_grad():
        expected = model(*inputs, **kwargs)
        calls: list[Callable[..., Any]] = [model]
        studies, errors = [], []
        for chosen in combinations:
            calls.append(torch.compile(_apart(model), backend="graphopt", options={**(fixed or {}), **chosen}))
            with report.collecting(roofline) as collected:
                answer = calls[-1](*inputs, **kwargs)
            studies.append([graph.study.optimised for graph in collected.graphs if graph.study is not None])
            errors.append(_error(answer, expected))
        eager, *medians = _medians([functools.partial(call, *inputs, **kwargs) for call in calls], rounds)
    rows = [
        Row(
            chosen,
            sum(float(estimate.cost.at(estimate.sizes).bytes) for estimate in estimates),
            sum(estimate.seconds for estimate in estimates),
            median,
            error,
        )
        for chosen, estimates, median, error in zip(combinations, studies, medians, errors, strict=True)
    ]
    device = next((estimate.device for estimates in studies for estimate in estimates), "no device")
    result = Sweep(tuple(rows), eager, device)
    if plot is not None:
        result.plot(plot)
    return result


def _apart(model: Callable[..., Any]) -> Callable[..., Any]:
    """The model behind code of its own: Dynamo keeps what it compiles by code, and only so many forms of each."""

    def call(*inputs: Any, **kwargs: Any) -> Any:
        return model(*inputs, **kwargs)

    call.__code__ = call.__code__.replace()
    return call


def _medians(calls: Sequence[Callable[[], Any]], rounds: int) -> list[float]:
    """The median seconds of each call; they take turns, so that what else the machine does hits all alike."""
    seconds: list[list[float]] = [[] for _ in calls]
    for turn in range(rounds + 1):
        for call, kept in zip(calls, seconds, strict=True):
            started = time.perf_counter()
            call()
            if turn:  # the first turn warms up
                kept.append(time.perf_counter() - started)
    return [statistics.median(kept) for kept in seconds]


def _error(answer: Any, expected: Any) -> float:
    """The largest relative error of the floating point tensors among the outputs; 0 where there are none."""
    errors = [0.0]
    for got, want in zip(tree_leaves(answer), tree_leaves(expected), strict=True):
        if isinstance(want, torch.Tensor) and want.is_floating_point() and want.numel():
            size = max(float(want.double().norm()), 1e-300)
            errors.append(float((got.double() - want.double()).norm()) / size)
    return max(errors)


def _shown(value: Any) -> Any:
    """An option's value as plain data for the table and for JSON."""
    if isinstance(value, (list, tuple)):
        return [_shown(item) for item in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else getattr(value, "__name__", str(value))
