"""`python -m graphopt.commands.context`: what a token costs as the KV cache behind it grows.

Each system decodes with 128 to 4096 tokens in its cache, a few steps in turns. What the growth of the cost should be
is known: the bytes of keys and values that are read more, at the speed of this machine's memory. Bytes that an append
copies are counted, not timed.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from graphopt.commands import bench
from graphopt.commands.figures import Agreement, Limits
from graphopt.commands.models import DTYPES, find_model
from graphopt.commands.progress import Step, steps
from graphopt.commands.systems import parse_systems
from graphopt.commands.worker import Worker, workers
from graphopt.commands.works import WorkRequest
from graphopt.errors import OptionError

_SYSTEMS = "eager,inductor,inductor-static,graphopt"
_LENGTHS = "128,512,1024,2048,4096"
_STEPS_A_TURN = 2


@dataclasses.dataclass(frozen=True)
class Curve:
    """One system: milliseconds a token (median and minimum) at each context length, and what it took."""

    system: str
    milliseconds: dict[int, float]
    fastest: dict[int, float]
    peak_bytes: int
    agreement: Agreement
    copied_per_token: float | None  # bytes that growing the cache copied, counted; None where nothing counts them


@dataclasses.dataclass(frozen=True)
class ContextResult:
    """The curves, and the bytes of cache that one token reads at each length."""

    model: str
    dtype: str
    machine: str
    versions: dict[str, str]
    limits: Limits
    cache_bytes: dict[int, float]
    curves: tuple[Curve, ...]

    @property
    def floor(self) -> float:
        """Milliseconds that reading the cache adds from the shortest to the longest context."""
        lengths = list(self.cache_bytes)
        return 1e3 * (self.cache_bytes[lengths[-1]] - self.cache_bytes[lengths[0]]) / self.limits.read_bandwidth

    def growth(self, curve: Curve) -> float:
        """How many times the floor the cost of a token grows by from the shortest to the longest context."""
        lengths = list(self.cache_bytes)
        return (curve.fastest[lengths[-1]] - curve.fastest[lengths[0]]) / self.floor

    def save(self, path: Path) -> None:
        """Write everything as JSON, with the derived growth."""
        data: dict[str, Any] = dataclasses.asdict(self) | {"floor": self.floor}
        for entry, curve in zip(data["curves"], self.curves, strict=True):
            entry["growth"] = self.growth(curve)
        path.write_text(json.dumps(data, indent=2) + "\n")


def measure(
    model: str,
    systems: str,
    dtype: str,
    lengths: list[int],
    checked: int,
    rounds: int,
    cold: bool,
    step: Step,
    keep: Callable[[ContextResult], None] | None = None,
) -> ContextResult:
    """Decode on every system at every length. Raises OptionError before any work.

    keep: gets what is known after each length from the second on, so that a run that is cut off is not lost.
    """
    from graphopt.commands.limits import measure_limits

    if dtype not in DTYPES:
        raise OptionError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if len(lengths) < 2 or sorted(set(lengths)) != lengths or lengths[0] < 1:
        raise OptionError(f"lengths must be two or more rising numbers, got {lengths}")
    if min(checked, rounds) < 1:
        raise OptionError(f"tokens and rounds must be at least 1, got {checked} and {rounds}")
    source = find_model(model)
    wanted = parse_systems(systems, source)
    with step("measure what this machine can do"):
        limits = measure_limits(dtype)
    times: dict[str, dict[int, list[float]]] = {system.name: {} for system in wanted}
    cache_bytes: dict[int, float] = {}
    agreements: dict[str, Agreement] = {}

    def result(running: list[Worker], copied: dict[str, float | None]) -> ContextResult:
        curves = tuple(
            Curve(
                name,
                {length: statistics.median(found) for length, found in times[name].items()},
                {length: min(found) for length, found in times[name].items()},
                worker.call("peak"),
                agreements[name],
                copied.get(name),
            )
            for name, worker in ((worker.system.name, worker) for worker in running)
        )
        return ContextResult(source.name, dtype, bench.machine(), bench.versions(), limits, dict(cache_bytes), curves)

    with workers(wanted, cold) as running:
        for worker in running:
            with step(f"{worker.system.name}: load {source.name}"):
                worker.call("load", source, dtype, worker.system)
        for length in lengths:
            request = WorkRequest("decode", 1, length, checked, False, room=lengths[-1] + checked)
            first = None
            for worker in running:
                with step(f"{worker.system.name}: {length} tokens, compile and compare"):
                    own = dataclasses.replace(request, static_cache=worker.system.static_cache)
                    cache_bytes[length] = worker.call("prepare", own).cache_bytes
                    answers = worker.call("check", first.given if first is not None else None)
                    first = first or answers
                    agreements[worker.system.name] = bench.agree(answers, first, "decode", dtype)
            with step(f"{length} tokens: {rounds} rounds"):
                for name, found in _in_turns(running, rounds).items():
                    times[name][length] = found
            if keep is not None and length != lengths[0]:
                keep(result(running, {}))
        with step("count copied bytes"):
            copied = {worker.system.name: worker.call("copied_per_token", 64) for worker in running}
        with step("measure the machine again"):
            limits = limits.best(measure_limits(dtype))
        return result(running, copied)


def _in_turns(running: list[Worker], rounds: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {worker.system.name: [] for worker in running}
    for turn in range(rounds):
        for place in range(len(running)):
            worker = running[(turn + place) % len(running)]
            time.sleep(bench.SETTLE_SECONDS)
            times[worker.system.name] += worker.call("steps", _STEPS_A_TURN)
    return times


def table(result: ContextResult) -> Table:
    """A row for each system."""
    shown = Table(
        title=f"ms a token by context: {result.model}, {result.dtype}",
        caption=f"reading the longest cache takes {result.floor:.2f} ms more than the shortest at"
        f" {result.limits.read_bandwidth / 1e9:.1f} GB/s",
    )
    for heading in (
        "",
        *map(str, result.cache_bytes),
        "growth / floor",
        "copied, B/token",
        "peak, MiB",
        "tokens equal",
    ):
        shown.add_column(heading, justify="right" if heading else "left")
    for curve in result.curves:
        shown.add_row(
            curve.system,
            *(f"{milliseconds:.1f}" for milliseconds in curve.milliseconds.values()),
            f"{result.growth(curve):.1f}",
            "-" if curve.copied_per_token is None else f"{curve.copied_per_token:.0f}",
            f"{curve.peak_bytes / 2**20:.0f}",
            f"{curve.agreement.equal}/{curve.agreement.compared}",
        )
    return shown


def plot(result: ContextResult, path: Path) -> None:
    """Draw the medians over the context length, and the floor above the cheapest system's first value."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(8, 4))
    for curve in result.curves:
        axis.plot(list(curve.milliseconds), list(curve.milliseconds.values()), marker="o", label=curve.system)
    lengths = list(result.cache_bytes)
    first = min(curve.milliseconds[lengths[0]] for curve in result.curves)
    axis.plot([lengths[0], lengths[-1]], [first, first + result.floor], "--", color="grey", label="reading the cache")
    axis.set(xlabel="tokens in the cache", ylabel="ms a token", title=f"{result.model}, {result.dtype}", yscale="log")
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main(
    model: Annotated[str, typer.Option(help="As in `graphopt bench`.")] = "smollm2",
    systems: Annotated[str, typer.Option(help="As in `graphopt bench`.")] = _SYSTEMS,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    lengths: Annotated[str, typer.Option(help="Tokens in the cache, rising, with commas.")] = _LENGTHS,
    tokens: Annotated[int, typer.Option(help="Decoded tokens compared with the first system's at each length.")] = 4,
    rounds: Annotated[int, typer.Option(help="Turns that each system gets at each length.")] = 8,
    warm: Annotated[bool, typer.Option("--warm", help="Use the compile caches of earlier runs.")] = False,
    json: Annotated[Path | None, typer.Option(help="Write all figures to this file.")] = None,
    plot_to: Annotated[Path | None, typer.Option("--plot", help="Draw the curves into this file.")] = None,
) -> None:
    """Measure the cost of a token against the length of the context, system by system."""
    console = Console()
    try:
        numbers = [int(length) for length in lengths.split(",")]
    except ValueError:
        raise typer.BadParameter(f"lengths must be whole numbers with commas, got {lengths!r}") from None

    def keep(result: ContextResult) -> None:
        console.print(table(result))
        if json is not None:
            result.save(json)
        if plot_to is not None:
            plot(result, plot_to)

    keep(measure(model, systems, dtype, numbers, tokens, rounds, not warm, steps(console), keep))


if __name__ == "__main__":
    typer.run(main)
