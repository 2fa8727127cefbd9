"""Write docs/reference/ and the README's pass table out of the code: `python -m graphopt.commands.reference`.

Run it at the root of a checkout. A test compares the pages with what this module would write.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable
from pathlib import Path

import typer.core
import typer.main

from graphopt import ops
from graphopt.cli import app
from graphopt.commands import catalogue
from graphopt.options import Options

_NOTE = "<!-- Written by `python -m graphopt.commands.reference`; edit the code instead. -->\n"

_OPTIONS = """
Give them as `torch.compile(model, backend="graphopt", options={...})`, or as `options=graphopt.Options(...)`
to `graphopt.explain`. A wrong name or value raises `graphopt.OptionError` before any work.
"""

_ENVIRONMENT = """
## Environment

Defaults for debugging, which an option overrides: `GRAPHOPT_DEBUG`, `GRAPHOPT_DISABLE` (names with commas),
`GRAPHOPT_DUMP`, `GRAPHOPT_LIMIT`, `GRAPHOPT_VERIFY`. `GRAPHOPT_CACHE_DIR` is the folder for everything that
is kept on disk; it must belong to you and be closed to others.
"""

_DIALECT = """
Captured graphs are core ATen. Passes name a few operations more, `torch.ops.graphopt.*`, because no generic
fusion can derive them. The body of each is its meaning: it is the documentation, the shape rule, the fallback
of every lowering and the oracle of the tests.
"""

_PASSES = """
`bitwise` passes keep every bit, `rounding` passes do the same arithmetic in another order, `lossy` passes run
only when asked for by name. Passes that are not for training are left out of forward and backward graphs.
"""


def _passes() -> str:
    sections = [f"\n## {entry.name}\n\n```text\n{entry.text}\n```\n" for entry in catalogue.entries()]
    return "".join(["# Passes, in the order they run\n", _PASSES, "\n", catalogue.markdown_rows(), *sections])


def _options() -> str:
    text = inspect.getdoc(Options) or ""
    rows = ["| option | default | what it does |", "|---|---|---|"]
    for field in dataclasses.fields(Options):
        (described,) = re.findall(rf"^{field.name}: (.*?)(?=^\S|\Z)", text, flags=re.DOTALL | re.MULTILINE)
        rows.append(f"| `{field.name}` | `{field.default!r}` | {_cell(described)} |")
    return "\n".join(["# Options", _OPTIONS, *rows]) + "\n" + _ENVIRONMENT


def _dialect() -> str:
    sections = []
    for operation in ops.operations():
        meaning = inspect.unwrap(ops.meaning(operation) or operation)
        source = inspect.getsource(meaning)
        body = source[source.index("def ") :]
        sections += [f"## {meaning.__name__}", f"```text\n{operation._schema}\n```", f"```py\n{body}```"]
    return "\n".join(["# Dialect operations", _DIALECT]) + "\n" + "\n\n".join(sections) + "\n"


def _command_line() -> str:
    group = typer.main.get_command(app)
    assert isinstance(group, typer.core.TyperGroup)
    parts = ["# Command line\n"]
    for name, command in group.commands.items():
        parts.append(f"\n## graphopt {name}\n\n{command.help}\n")
        rows = []
        for parameter in command.params:
            shown = ", ".join(f"`{option}`" for option in parameter.opts)
            default = "" if parameter.default in (None, False) else f"`{parameter.default}`"
            rows.append(f"| {shown} | {default} | {_cell(getattr(parameter, 'help', None) or '')} |")
        if rows:
            parts.append(
                "\n" + "\n".join(["| option | default | what it does |", "|---|---|---|", *rows]) + "\n"
            )
    return "".join(parts)


PAGES: dict[str, Callable[[], str]] = {
    "passes": _passes,
    "options": _options,
    "dialect": _dialect,
    "command-line": _command_line,
}


def page(name: str) -> str:
    """The text of docs/reference/<name>.md."""
    return _NOTE + PAGES[name]()


def with_pass_table(readme: str) -> str:
    """The README's text with the pass table brought up to date."""
    table = f"<!-- passes -->\n{catalogue.markdown_rows()}<!-- /passes -->"
    return re.sub(r"<!-- passes -->\n.*?<!-- /passes -->", lambda _: table, readme, flags=re.DOTALL)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    for name in PAGES:
        Path("docs", "reference", f"{name}.md").write_text(page(name))
    readme = Path("README.md")
    readme.write_text(with_pass_table(readme.read_text()))
