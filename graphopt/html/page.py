"""Render a report: Jinja fills in the template and escapes every value; the script draws differences of graphs."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import Any

import jinja2
import torch
from markupsafe import Markup, escape

from graphopt.html import charts
from graphopt.lowering import KernelSource
from graphopt.report import GraphReport, Report
from graphopt.study import Line, Snapshot, Study

# Longer sources of a kernel are cut: a page must stay one that a browser opens at once.
_LONGEST_SOURCE = 200_000


def render(report: Report, title: str) -> str:
    """The page. Without a study of its graphs (`explain` makes one) it has no graphs, kernels and memory to show."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("graphopt.html", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"si": charts.human, "ms": charts.milliseconds, "breakable": _breakable}
    graphs = [_graph(number, graph) for number, graph in enumerate(report.graphs, 1)]
    return environment.get_template("page.html").render(
        title=title,
        report=report,
        graphs=graphs,
        torch_version=torch.__version__,
        differences=[graph.pop("differences") for graph in graphs],
    )


def _breakable(name: str) -> Markup:
    """A name that may be broken after its underscores and dots."""
    return Markup(re.sub(r"([_.])", r"\1<wbr>", str(escape(name))))


def _graph(number: int, graph: GraphReport) -> dict[str, Any]:
    snapshots = graph.study.snapshots if graph.study is not None else ()
    steps = {shot.step: place for place, shot in enumerate(snapshots)}
    return {
        "number": number,
        "report": graph,
        "passes": [(done, steps.get(done.name)) for done in graph.passes],
        "refusals": charts.counted(
            (refusal.pass_name, refusal.reason, refusal.where) for done in graph.passes for refusal in done.refusals
        ),
        "lowerings": charts.counted((choice.op, choice.lowering, choice.declined) for choice in graph.lowerings),
        "study": graph.study,
        "bars": charts.roofline_bars(graph.study.optimised) if graph.study is not None else [],
        "memory": charts.memory_chart(graph.study) if graph.study is not None else None,
        "kernels": [_kernel(kernel, graph.study) for kernel in graph.kernels],
        "calls_known": any(kernel.calls for kernel in graph.kernels),
        "differences": _differences(snapshots),
    }


def _kernel(kernel: KernelSource, study: Study | None) -> dict[str, Any]:
    return {
        "name": kernel.name,
        "language": {"cpp": "C++", "python": "Python"}[kernel.language],
        "built_for": kernel.built_for,
        "nodes": kernel.nodes,
        "bars": charts.kernel_bars(kernel.calls, study.optimised) if study is not None else [],
        "lines": len(kernel.source.splitlines()),
        "source": kernel.source[:_LONGEST_SOURCE],
        "cut": len(kernel.source) > _LONGEST_SOURCE,
    }


def _differences(snapshots: Sequence[Snapshot]) -> dict[str, Any]:
    """All distinct lines once, each snapshot as numbers of lines, and what changed between neighbours.

    A change is (kind, first and last line before, first and last line after), as difflib's opcodes.
    """
    numbers: dict[Line, int] = {}
    steps: list[dict[str, Any]] = []
    before: tuple[Line, ...] = ()
    for shot in snapshots:
        # Where a node came from is shown but does not make it another node.
        texts = [[line.text for line in side] for side in (before, shot.lines)]
        matcher = difflib.SequenceMatcher(None, texts[0], texts[1], autojunk=False)
        steps.append(
            {
                "name": shot.step,
                "lines": [numbers.setdefault(line, len(numbers)) for line in shot.lines],
                "changes": matcher.get_opcodes() if before else [],
            }
        )
        before = shot.lines
    return {"lines": [[line.text, line.made_by, line.where] for line in numbers], "steps": steps}
