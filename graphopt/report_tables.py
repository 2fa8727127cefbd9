"""The tables of a printed report."""

from __future__ import annotations

import collections
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import sympy
from rich.table import Table

from graphopt.estimate import Estimate

if TYPE_CHECKING:
    from graphopt.report import GraphReport

_MOST_KERNELS = 8


def pass_table(number: int, graph: GraphReport) -> Table:
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


def lowering_table(graph: GraphReport) -> Table:
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


def cost_table(captured: Estimate, optimised: Estimate) -> Table:
    """Bytes and FLOPs before and after the passes and at the least, and the time that the device needs for them."""
    sizes = ", ".join(f"{name} = {value}" for name, value in captured.sizes.items())
    title = f"roofline of {captured.device}" + (f" with {sizes}" if sizes else "")
    table = Table("", "bytes", "FLOPs", "kernels", "ms", "memory at the peak", title=title)
    for name, found in (("captured", captured), ("after the passes", optimised)):
        table.add_row(
            name,
            amount(found.cost.bytes, found.sizes, "B"),
            amount(found.cost.flops, found.sizes, "FLOP"),
            str(found.cost.launches),
            f"{found.seconds * 1e3:.3f}",
            f"{human(found.peak.bytes)}B at {found.peak.node}" if found.peak.node else "",
        )
    least = amount(optimised.least, optimised.sizes, "B")
    table.add_row("as one kernel", least, "", "1", f"{optimised.least_seconds * 1e3:.3f}", "")
    return table


def kernel_table(estimate: Estimate) -> Table:
    """The kernels that the predicted time goes to, equal ones together."""
    table = Table("operation", "nodes", "bytes", "FLOPs", "ms", "share", "bound by", title="where the time should go")
    groups: dict[tuple[str, Any], list[Any]] = collections.defaultdict(list)
    for kernel in estimate.kernels:
        groups[kernel.op, kernel.cost].append(kernel)
    longest = sorted(groups.items(), key=lambda item: -sum(kernel.seconds for kernel in item[1]))
    for (op, cost), kernels in longest[:_MOST_KERNELS]:
        seconds = sum(kernel.seconds for kernel in kernels)
        table.add_row(
            op,
            str(len(kernels)),
            amount(cost.bytes, estimate.sizes, "B"),
            amount(cost.flops, estimate.sizes, "FLOP"),
            f"{seconds * 1e3:.3f}",
            f"{seconds / max(estimate.seconds, 1e-30):.0%}",
            kernels[0].bound,
        )
    return table


def amount(expression: Any, sizes: dict[str, int], unit: str) -> str:
    """A number of bytes or operations: the expression in its symbols, and what it is for the given sizes."""
    expression = sympy.sympify(expression)
    at = expression.subs({symbol: sizes.get(symbol.name, 1) for symbol in expression.free_symbols})
    shown = f"{human(float(at))}{unit}"
    return f"{expression} = {shown}" if expression.free_symbols else shown


def human(number: float) -> str:
    """A number with three digits and a decimal prefix: "1.5 k"."""
    for prefix in ("", "k", "M", "G", "T"):
        if abs(number) < 1000 or prefix == "T":
            return f"{number:.3g} {prefix}"
        number /= 1000
    raise AssertionError
