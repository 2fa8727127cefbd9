"""`graphopt demo`: a real chat model answers through graphopt, then the systems are shown side by side."""

from __future__ import annotations

import collections
import time
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from graphopt.commands import bench
from graphopt.commands.figures import Figures, PassWork
from graphopt.commands.progress import Step, steps
from graphopt.commands.worker import Worker, workers
from graphopt.commands.works import WorkRequest
from graphopt.errors import OptionError

_ROUNDS = 12


def run(prompt: str, tokens: int, dtype: str, systems: str, console: Console) -> None:
    """Ask SmolLM2 `prompt` through every system; print the answer as it is made, then the comparison."""
    lengths = {"decode": 1, "prefill": 1}
    plan = bench.plan("smollm2", "decode,prefill", systems, dtype, 1, lengths, tokens, _ROUNDS)
    if not any(system.name.startswith("graphopt") for system in plan.systems):
        raise OptionError("the demo shows graphopt: name it among the systems")
    step = steps(console)
    with workers(plan.systems, plan.cold) as running:
        speaking = next(worker for worker in running if worker.system.name.startswith("graphopt"))
        spoken: dict[str, list[int]] = {}
        started: dict[str, float] = {}
        for worker in sorted(running, key=lambda worker: worker is not speaking):
            name = worker.system.name
            with step(f"{name}: load SmolLM2-135M-Instruct in {dtype}"):
                worker.call("load", plan.source, dtype, worker.system)
                ids = worker.call("chat", prompt)
            before = time.perf_counter()
            with step(f"{name}: first answer" + (", compiling prefill and decode" if worker.system.arguments else "")):
                spoken[name] = worker.call("answer", ids, tokens, False)
            started[name] = time.perf_counter() - before
            if worker is speaking:
                _speak(worker, ids, prompt, tokens, console)
        decode, prefill = _compare(running, ids, tokens, dtype, step)
        _print(decode, prefill, spoken, started, running, console)
        _print_passes(speaking.call("pass_work"), console)


def _speak(worker: Worker, ids: list[list[int]], prompt: str, tokens: int, console: Console) -> None:
    console.print(f"\n[bold cyan]you[/]      {escape(prompt)}", highlight=False)
    console.print("[bold green]smollm2[/]  ", end="")
    started = time.perf_counter()
    said = worker.call("answer", ids, tokens, True, heard=lambda text: console.out(text, end="", highlight=False))
    seconds = time.perf_counter() - started
    console.print(f"\n[dim]{len(said)} tokens through model.generate in {seconds:.2f} s[/]\n", highlight=False)


def _compare(
    running: Sequence[Worker], ids: list[list[int]], tokens: int, dtype: str, step: Step
) -> tuple[list[Figures], list[Figures]]:
    found = []
    for work in ("decode", "prefill"):
        request = WorkRequest(work, 1, len(ids[0]), tokens, static_cache=False, tokens=ids)
        found.append(bench.compare(running, request, dtype, _ROUNDS, step)[1])
    return found[0], found[1]


def _print(
    decode: Sequence[Figures],
    prefill: Sequence[Figures],
    spoken: dict[str, list[int]],
    started: dict[str, float],
    running: Sequence[Worker],
    console: Console,
) -> None:
    reference = decode[0].system
    table = Table(title="side by side, in turns, on this machine")
    table.add_column("")
    for row in decode:
        table.add_column(row.system, justify="right")
    usual = {row.system: len(spoken[row.system]) * row.median / 1e3 for row in decode}
    compiled = {worker.system.name for worker in running if worker.system.arguments is not None}
    table.add_row("decode, tokens/s", *(f"{1e3 / row.median:.1f}" for row in decode))
    table.add_row("decode, ms/token", *(f"{row.median:.1f}" for row in decode))
    table.add_row("prefill latency, ms", *(f"{row.median:.1f}" for row in prefill))
    table.add_row("peak memory, MiB", *(f"{row.peak_bytes / 2**20:.0f}" for row in prefill))
    table.add_row(
        "compile time, s",
        *(f"{started[row.system] - usual[row.system]:.1f}" if row.system in compiled else "-" for row in decode),
    )
    table.add_row(
        f"{len(spoken[reference])} tokens equal to {reference}'s",
        *("yes" if spoken[row.system] == spoken[reference] else "[red]no[/]" for row in decode),
    )
    console.print(table)


def _print_passes(work: Sequence[PassWork], console: Console) -> None:
    table = Table("pass", "stage", "exactness", "rewrites", "nodes removed", "ms", title="what graphopt's passes did")
    table.columns[0].no_wrap = True
    total: collections.Counter[str] = collections.Counter()
    for entry in work:
        total.update(rewrites=entry.rewrites, nodes=entry.nodes_removed)
        cells = (str(entry.rewrites), str(entry.nodes_removed), f"{entry.milliseconds:.0f}")
        table.add_row(entry.name, entry.stage, entry.exactness, *cells)
    table.caption = f"{total['rewrites']} rewrites removed {total['nodes']} nodes"
    console.print(table)
