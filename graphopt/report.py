"""What graphopt did: one `GraphReport` for each compiled graph, gathered by `explain` into a `Report`."""

from __future__ import annotations

import collections
import contextlib
import contextvars
import dataclasses
import json
from collections.abc import Iterator
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table

from graphopt.lowering import Choice
from graphopt.pipeline import PassReport
from graphopt.runtime.counters import counters as counters


@dataclasses.dataclass(frozen=True)
class Fallback:
    """Something left to torch: what, and why."""

    what: str
    reason: str


@dataclasses.dataclass
class GraphReport:
    """One captured graph: its passes, how its nodes were lowered, and what was left to torch."""

    kind: str
    target: str
    nodes: int
    passes: list[PassReport] = dataclasses.field(default_factory=list)
    lowerings: list[Choice] = dataclasses.field(default_factory=list)
    fallbacks: list[Fallback] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    verification: dict[str, Any] | None = None

    @property
    def rewrites(self) -> int:
        return sum(report.rewrites for report in self.passes)

    def fall_back(self, what: str, reason: str) -> None:
        """Record that something was left to torch."""
        self.fallbacks.append(Fallback(what, reason))
        counters["fallbacks"] += 1


@dataclasses.dataclass
class Report:
    """All graphs compiled during one `explain`, the reasons of graph breaks and of recompilations."""

    graphs: list[GraphReport] = dataclasses.field(default_factory=list)
    graph_breaks: list[str] = dataclasses.field(default_factory=list)
    recompiles: list[str] = dataclasses.field(default_factory=list)

    def to_json(self) -> str:
        """The report as JSON text."""
        return json.dumps(dataclasses.asdict(self), indent=1, default=str)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for number, graph in enumerate(self.graphs, 1):
            yield _pass_table(number, graph)
            yield _lowering_table(graph)
            if graph.verification is not None:
                counts = ", ".join(f"{value} {name}" for name, value in graph.verification.items())
                yield f"rewrites verified: {counts}"
            for fallback in graph.fallbacks:
                yield f"[yellow]left to torch[/]: {fallback.what}: {fallback.reason}"
        for title, reasons in (("graph break", self.graph_breaks), ("recompiled", self.recompiles)):
            for reason in reasons:
                yield f"[yellow]{title}[/]: {reason}"

    def __str__(self) -> str:
        console = Console(width=120)
        with console.capture() as captured:
            console.print(self)
        return captured.get()


def _pass_table(number: int, graph: GraphReport) -> Table:
    title = f"graph {number}: {graph.kind}, {graph.nodes} nodes, target {graph.target}, {graph.seconds:.2f} s"
    table = Table("stage", "pass", "exactness", "rewrites", "nodes", "ms", "refused", title=title)
    for report in graph.passes:
        refused = report.error or "; ".join(_grouped(refusal.reason for refusal in report.refusals))
        table.add_row(
            report.stage,
            report.name,
            report.exactness,
            str(report.rewrites),
            f"{report.nodes_before} -> {report.nodes_after}",
            f"{report.seconds * 1e3:.1f}",
            refused,
        )
    return table


def _lowering_table(graph: GraphReport) -> Table:
    table = Table("operation", "lowered to", "nodes", "declined because")
    groups: dict[tuple[str, str, tuple[tuple[str, str], ...]], int] = collections.Counter(
        (choice.op, choice.lowering, choice.declined) for choice in graph.lowerings
    )
    for (op, lowering, declined), count in groups.items():
        table.add_row(op, lowering, str(count), "; ".join(f"{name}: {reason}" for name, reason in declined))
    return table


def _grouped(reasons: Iterator[str] | Any) -> list[str]:
    counts = collections.Counter(reasons)
    return [reason if count == 1 else f"{reason} (x{count})" for reason, count in counts.items()]


_collector: contextvars.ContextVar[Report | None] = contextvars.ContextVar("graphopt_report", default=None)


@contextlib.contextmanager
def collecting() -> Iterator[Report]:
    """Gather the reports of all graphs compiled inside the block."""
    report = Report()
    token = _collector.set(report)
    try:
        yield report
    finally:
        _collector.reset(token)


def is_collecting() -> bool:
    """Whether somebody gathers reports now (then nothing may come from a cache of compiled graphs)."""
    return _collector.get() is not None


def add(graph: GraphReport) -> None:
    """Count a compiled graph and hand it to the collecting report, if any."""
    counters["graphs"] += 1
    counters["rewrites"] += graph.rewrites
    counters["passes_undone"] += sum(bool(report.error) for report in graph.passes)
    report = _collector.get()
    if report is not None:
        report.graphs.append(graph)
