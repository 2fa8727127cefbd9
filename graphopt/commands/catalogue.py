"""The table of passes, for the command line and the documentation, out of the passes themselves."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable

from rich.table import Table

from graphopt import passes, pipeline


@dataclasses.dataclass(frozen=True)
class PassEntry:
    """A pass as its own file describes it. purpose is the docstring's first paragraph, text all of it.

    default: whether it runs without an option or a target that asks for it.
    """

    name: str
    stage: str
    exactness: str
    training: bool
    module: str
    purpose: str
    text: str
    default: bool


def entries() -> list[PassEntry]:
    """Every pass of the library in the order it runs."""
    return [_entry(function) for function in pipeline.arrange((*passes.PIPELINE, *passes.OPTIONAL))]


def _entry(function: Callable[..., int]) -> PassEntry:
    declared = pipeline.describe(function)
    text = inspect.getdoc(inspect.getmodule(function)) or inspect.getdoc(function) or ""
    return PassEntry(
        declared.name,
        declared.stage,
        declared.exactness,
        declared.training,
        function.__module__,
        " ".join(text.split("\n\n")[0].split()),
        text,
        function in passes.PIPELINE,
    )


def pass_table() -> Table:
    """The passes as a table for the terminal."""
    columns = ("stage", "pass", "exactness", "runs", "training", "what it does")
    table = Table(*columns, title="passes, in the order they run")
    for entry in entries():
        runs = "always" if entry.default else "on request"
        table.add_row(entry.stage, entry.name, entry.exactness, runs, "yes" if entry.training else "no", entry.purpose)
    return table


def markdown_rows() -> str:
    """The passes as a Markdown table."""
    lines = ["| stage | pass | exactness | runs | in training | what it does |", "|---|---|---|---|---|---|"]
    for entry in entries():
        cells = (
            entry.stage,
            f"`{entry.name}`",
            entry.exactness,
            "always" if entry.default else "on request",
            "yes" if entry.training else "no",
            entry.purpose,
        )
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"
