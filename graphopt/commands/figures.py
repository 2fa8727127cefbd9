"""What a benchmark measures, as data: written to JSON, printed as a table, drawn as a plot."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table


@dataclasses.dataclass(frozen=True)
class Limits:
    """What this machine reaches: bytes read from memory and matrix product operations, each a second."""

    read_bandwidth: float
    matmul_rate: float
    threads: int

    def best(self, other: Limits) -> Limits:
        """The higher of two measurements: whatever else the machine does can only lower them."""
        rate = max(self.matmul_rate, other.matmul_rate)
        return Limits(max(self.read_bandwidth, other.read_bandwidth), rate, self.threads)


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one step must at least do: bytes of weights and cache to read, operations, tokens made or read.

    cache_bytes: the part of `bytes` that is keys and values.
    """

    bytes: float
    flops: float
    tokens: int
    cache_bytes: float = 0.0

    def floor(self, limits: Limits) -> float:
        """The least milliseconds that a step can take within the machine's limits."""
        return 1e3 * max(self.bytes / limits.read_bandwidth, self.flops / limits.matmul_rate)


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How a system's answers compare with the reference's.

    equal, compared: greedy tokens (decode, prefill) or vectors (encode). near_ties: unequal tokens between which
    the reference itself hardly decided. max_error: the largest difference of a logit or an output.
    """

    equal: int
    compared: int
    near_ties: int
    max_error: float


@dataclasses.dataclass(frozen=True)
class Figures:
    """One system at one work. Times are milliseconds a step; compile_seconds is added by the first calls."""

    system: str
    work: str
    milliseconds: tuple[float, ...]
    compile_seconds: float
    peak_bytes: int
    agreement: Agreement

    @property
    def median(self) -> float:
        return statistics.median(self.milliseconds)

    @property
    def spread(self) -> tuple[float, float]:
        """The lower and the upper quartile."""
        low, _, high = statistics.quantiles(self.milliseconds, n=4)
        return low, high


@dataclasses.dataclass(frozen=True)
class PassWork:
    """What one pass did to all graphs that were compiled in a worker."""

    name: str
    stage: str
    exactness: str
    rewrites: int
    nodes_removed: int
    milliseconds: float


@dataclasses.dataclass(frozen=True)
class BenchResult:
    """All figures of one run of the benchmark, with what they were measured on."""

    model: str
    dtype: str
    batch: int
    machine: str
    versions: dict[str, str]
    limits: Limits
    cold: bool  # whether every system started with empty compile caches
    costs: dict[str, Cost]
    figures: tuple[Figures, ...]

    def of(self, work: str) -> list[Figures]:
        """The figures of one work, the reference first."""
        return [figures for figures in self.figures if figures.work == work]

    def save(self, path: Path) -> None:
        """Write everything as JSON, with the derived medians."""
        data: dict[str, Any] = dataclasses.asdict(self)
        for entry, figures in zip(data["figures"], self.figures, strict=True):
            entry["median"] = figures.median
        path.write_text(json.dumps(data, indent=2) + "\n")


def table(result: BenchResult, work: str) -> Table:
    """The figures of one work, a column for each system; "faster" is relative to the first column."""
    columns = result.of(work)
    cost, limits = result.costs[work], result.limits
    floor = cost.floor(limits)
    printed = Table(
        title=f"{work}: {result.model}, {result.dtype}, batch {result.batch}",
        caption=f"floor of this machine {floor:.2f} ms: {cost.bytes / 1e6:.0f} MB at"
        f" {limits.read_bandwidth / 1e9:.1f} GB/s, {cost.flops / 1e9:.1f} GFLOP at"
        f" {limits.matmul_rate / 1e9:.0f} GFLOP/s",
    )
    printed.add_column("")
    for column in columns:
        printed.add_column(column.system, justify="right")
    rows: dict[str, Callable[[Figures], str]] = {
        "ms a token" if work == "decode" else "ms": lambda column: f"{column.median:.2f}",
        "quartiles": lambda column: "{:.1f} - {:.1f}".format(*column.spread),
        "tokens/s": lambda column: f"{1e3 * cost.tokens / column.median:.1f}",
        "times faster": lambda column: f"{columns[0].median / column.median:.2f}",
        "share of the floor": lambda column: f"{floor / column.median:.0%}",
        "peak memory, MiB": lambda column: f"{column.peak_bytes / 2**20:.0f}",
        "compile, s": lambda column: f"{column.compile_seconds:.1f}" if column.compile_seconds else "-",
        "vectors equal" if work == "encode" else "tokens equal": lambda column: _agreement(column.agreement),
        "max error": lambda column: f"{column.agreement.max_error:.1e}",
    }
    for name, cell in rows.items():
        printed.add_row(name, *(cell(column) for column in columns))
    return printed


def plot(results: Sequence[BenchResult], path: Path) -> None:
    """Draw the medians as bars, a panel for each result and work, with the machine's floor as a line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = [(result, work) for result in results for work in result.costs]
    figure, axes = pyplot.subplots(1, len(panels), figsize=(4.5 * len(panels), 3.6), squeeze=False)
    for axis, (result, work) in zip(axes[0], panels, strict=True):
        rows = result.of(work)
        positions = range(len(rows))
        bars = axis.barh(positions, [row.median for row in rows], color="#4c78a8")
        axis.bar_label(bars, fmt="%.1f", padding=3)
        axis.set_yticks(positions, [row.system for row in rows])
        axis.invert_yaxis()
        axis.margins(x=0.15)
        axis.axvline(result.costs[work].floor(result.limits), color="#e45756", linestyle="--", label="machine's floor")
        axis.set_xlabel("ms a token" if work == "decode" else "ms")
        axis.set_title(f"{work}, {result.model}, {result.dtype}", fontsize=10)
        axis.legend(fontsize=8, loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _agreement(agreement: Agreement) -> str:
    text = f"{agreement.equal}/{agreement.compared}"
    return f"{text} ({agreement.near_ties} near ties)" if agreement.near_ties else text
