"""The figures of the page as plain numbers: bars of the roofline, the outline of memory over time, counted rows."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

from graphopt.estimate import Estimate, KernelEstimate, MemoryPoint
from graphopt.report_tables import amount
from graphopt.report_tables import human as human
from graphopt.study import Study

WIDTH, HEIGHT = 1000, 220
# Bars on the page, and the share of the time below which kernels have none of their own.
_MOST_BARS, _LEAST = 24, 0.002


@dataclasses.dataclass(frozen=True)
class Bar:
    """Equal kernels: their two sides of the roofline and their launches, in percent of the longest bar beside it."""

    what: str
    count: int
    nodes: tuple[str, ...]
    where: tuple[str, ...]
    bytes: str
    flops: str
    bound: str
    seconds: float
    share: float
    memory: float
    compute: float
    launch: float


@dataclasses.dataclass(frozen=True)
class Memory:
    """Memory over time: outlines of both graphs for an SVG of WIDTH by HEIGHT, and the peaks."""

    captured: str
    optimised: str
    captured_peak: MemoryPoint
    optimised_peak: MemoryPoint
    top: int


def counted(rows: Iterable[Hashable]) -> list[tuple[Any, int]]:
    """Distinct rows and how often each came, in the order of their first coming."""
    return list(collections.Counter(rows).items())


def milliseconds(seconds: float) -> str:
    """Seconds as text with three digits: "1.23 ms", "4.5 µs"."""
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-4 else f"{seconds * 1e6:.3g} µs"


def roofline_bars(estimate: Estimate) -> list[Bar]:
    """The kernels that the predicted time goes to, longest first; what is left over is one bar."""
    groups: dict[tuple[str, Any], list[KernelEstimate]] = collections.defaultdict(list)
    for kernel in estimate.kernels:
        groups[kernel.op, kernel.cost].append(kernel)
    ordered = sorted(groups.values(), key=lambda kernels: -sum(kernel.seconds for kernel in kernels))
    worth = [kernels for kernels in ordered[:_MOST_BARS] if sum(k.seconds for k in kernels) > _LEAST * estimate.seconds]
    rest = [kernel for kernels in ordered[len(worth) :] for kernel in kernels]
    shown = [(kernels[0].op, kernels) for kernels in worth] + ([("all others", rest)] if rest else [])
    return _bars(shown, estimate)


def kernel_bars(calls: Sequence[str], estimate: Estimate) -> list[Bar]:
    """The bars of one kernel, one for each set of shapes that it is called with, longest first."""
    called, groups = frozenset(calls), collections.defaultdict(list)
    for kernel in estimate.kernels:
        if kernel.node in called:
            groups[kernel.shapes].append(kernel)
    return _bars(sorted(groups.items(), key=lambda item: -sum(kernel.seconds for kernel in item[1])), estimate)


def _bars(groups: Sequence[tuple[str, Sequence[KernelEstimate]]], estimate: Estimate) -> list[Bar]:
    longest = max((sum(kernel.seconds for kernel in kernels) for _, kernels in groups), default=0.0) or 1.0
    return [_bar(what, kernels, estimate, longest) for what, kernels in groups]


def _bar(what: str, kernels: Sequence[KernelEstimate], estimate: Estimate, longest: float) -> Bar:
    memory, compute, launch = (
        sum(getattr(kernel, f"{side}_seconds") for kernel in kernels) for side in ("memory", "compute", "launch")
    )
    seconds = sum(kernel.seconds for kernel in kernels)
    same = len({kernel.cost for kernel in kernels}) == 1
    return Bar(
        what,
        len(kernels),
        tuple(kernel.node for kernel in kernels),
        tuple(dict.fromkeys(kernel.where for kernel in kernels if kernel.where)),
        amount(kernels[0].cost.bytes, estimate.sizes, "B") if same else "",
        amount(kernels[0].cost.flops, estimate.sizes, "FLOP") if same else "",
        kernels[0].bound if same else "",
        seconds,
        seconds / (estimate.seconds or 1.0),
        100 * memory / longest,
        100 * compute / longest,
        100 * launch / longest,
    )


def memory_chart(study: Study) -> Memory:
    """Bytes over nodes, both graphs on one scale of bytes; each graph takes the whole width."""
    top = max(study.captured.peak.bytes, study.optimised.peak.bytes, 1)
    captured, optimised = (
        _outline([point.bytes for point in each.memory], top) for each in (study.captured, study.optimised)
    )
    return Memory(captured, optimised, study.captured.peak, study.optimised.peak, top)


def _outline(values: Sequence[int], top: int) -> str:
    """The points of an SVG polygon of steps: each node keeps its memory for its share of the width."""
    if not values:
        return ""
    step = WIDTH / len(values)
    points = [(0.0, float(HEIGHT))]
    for place, value in enumerate(values):
        height = HEIGHT - value / top * HEIGHT
        points += [(place * step, height), ((place + 1) * step, height)]
    points.append((float(WIDTH), float(HEIGHT)))
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
