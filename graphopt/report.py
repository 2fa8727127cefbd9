"""What graphopt did: one `GraphReport` for each compiled graph, gathered by `explain` into a `Report`."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import json
import warnings
from collections.abc import Iterator
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.markup import escape

from graphopt.lowering import Choice, KernelSource
from graphopt.pipeline import PassReport
from graphopt.report_tables import cost_table, kernel_table, lowering_table, pass_table
from graphopt.runtime.counters import counters as counters
from graphopt.study import Study


@dataclasses.dataclass(frozen=True)
class Fallback:
    """Something left to torch: what, and why."""

    what: str
    reason: str


@dataclasses.dataclass
class GraphReport:
    """One captured graph: its passes, how its nodes were lowered, and what was left to torch.

    kernels: the code that was generated. study: what takes time to find out; only `explain` does. notes: what was asked
    for and not done, with the reason, where no answer and no error shows it.
    """

    kind: str
    target: str
    nodes: int
    passes: list[PassReport] = dataclasses.field(default_factory=list)
    lowerings: list[Choice] = dataclasses.field(default_factory=list)
    fallbacks: list[Fallback] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    verification: dict[str, Any] | None = None
    kernels: list[KernelSource] = dataclasses.field(default_factory=list)
    study: Study | None = None
    notes: list[str] = dataclasses.field(default_factory=list)

    @property
    def rewrites(self) -> int:
        return sum(report.rewrites for report in self.passes)

    def fall_back(self, what: str, reason: str) -> None:
        """Record that something was left to torch."""
        self.fallbacks.append(Fallback(what, reason))
        counters["fallbacks"] += 1


@dataclasses.dataclass
class Report:
    """All graphs compiled during one `explain`, the reasons of graph breaks and of recompilations.

    roofline: the name of the device that times are predicted for, None for no prediction.
    """

    graphs: list[GraphReport] = dataclasses.field(default_factory=list)
    graph_breaks: list[str] = dataclasses.field(default_factory=list)
    recompiles: list[str] = dataclasses.field(default_factory=list)
    roofline: str | None = None

    def to_json(self) -> str:
        """The report as JSON text."""
        return json.dumps(dataclasses.asdict(self), indent=1, default=str)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for number, graph in enumerate(self.graphs, 1):
            yield pass_table(number, graph)
            for done in graph.passes:
                for note in done.notes:
                    yield escape(f"{done.name}: {note}")
            yield lowering_table(graph)
            if graph.study is not None:
                yield cost_table(graph.study.captured, graph.study.optimised)
                yield kernel_table(graph.study.optimised)
            if graph.verification is not None:
                counts = ", ".join(f"{value} {name}" for name, value in graph.verification.items())
                yield f"rewrites verified: {counts}"
            for fallback in graph.fallbacks:
                yield f"[yellow]left to torch[/]: {fallback.what}: {fallback.reason}"
            for note in graph.notes:
                yield escape(note)
        for title, reasons in (("graph break", self.graph_breaks), ("recompiled", self.recompiles)):
            for reason in reasons:
                yield f"[yellow]{title}[/]: {reason}"

    def __str__(self) -> str:
        console = Console(width=120)
        with console.capture() as captured:
            console.print(self)
        return captured.get()


_collector: contextvars.ContextVar[Report | None] = contextvars.ContextVar("graphopt_report", default=None)


@contextlib.contextmanager
def collecting(roofline: str | None = None) -> Iterator[Report]:
    """Gather the reports of all graphs compiled inside the block.

    roofline: also study each graph (`graphopt.study`) on the device of that name ("auto": its own).
    """
    report = Report(roofline=roofline)
    token = _collector.set(report)
    try:
        yield report
    finally:
        _collector.reset(token)


def collector() -> Report | None:
    """The report that gathers now, if any (then nothing may come from a cache of compiled graphs)."""
    return _collector.get()


# What runs because an option asks for it by name: who asks must hear where it was not done.
_ASKED_FOR = {"quantize_cache": "kv_dtype", "page_cache": "kv_cache"}


def add(graph: GraphReport) -> None:
    """Count a compiled graph and hand it to the collecting report, if any. Warns of KV caches that stay as they are."""
    for entry in graph.passes:
        if entry.name in _ASKED_FOR and entry.refusals:
            reasons = "; ".join(dict.fromkeys(refusal.reason for refusal in entry.refusals))
            warnings.warn(f"option {_ASKED_FOR[entry.name]!r}: KV caches stay as they are: {reasons}", stacklevel=2)
    counters["graphs"] += 1
    counters["rewrites"] += graph.rewrites
    counters["passes_undone"] += sum(bool(report.error) for report in graph.passes)
    report = _collector.get()
    if report is not None:
        report.graphs.append(graph)
