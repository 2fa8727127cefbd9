"""Write docs/reference/ and the README's tables out of the code: `python -m graphopt.commands.reference`.

Run it at the root of a checkout. A test compares the pages with what this module would write.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

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


_PYTHON = """
What a user of the backend, an author of passes or kernels and an experimenter call, out of the docstrings.
"""

_MODULES = (
    "graphopt",
    "graphopt.match",
    "graphopt.edit",
    "graphopt.testing",
    "graphopt.verify",
    "graphopt.lowering",
    "graphopt.cost",
    "graphopt.search",
)


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
    meanings = {operation: inspect.unwrap(ops.meaning(operation) or operation) for operation in ops.operations()}
    # As they stand in their files, whichever was imported first.
    for operation in sorted(
        meanings, key=lambda each: (meanings[each].__module__, inspect.getsourcelines(meanings[each])[1])
    ):
        meaning = meanings[operation]
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
            parts.append("\n" + "\n".join(["| option | default | what it does |", "|---|---|---|", *rows]) + "\n")
    return "".join(parts)


def _python() -> str:
    sections = ["# Python\n", _PYTHON]
    for module_name in _MODULES:
        module = importlib.import_module(module_name)
        purpose = (inspect.getdoc(module) or "").split("\n\n")[0]
        sections.append(f"\n## {module_name}\n\n{purpose}\n")
        sections += [_entry(module_name, name, item) for name, item in _public(module)]
    return "".join(sections)


def _public(module: ModuleType) -> list[tuple[str, Any]]:
    """The functions and classes that a module offers: its `__all__`, else those defined in its package."""
    listed = getattr(module, "__all__", None)
    names = sorted(listed if listed is not None else (name for name in vars(module) if not name.startswith("_")))
    found = [(name, getattr(module, name)) for name in names]
    return [
        (name, item)
        for name, item in found
        if (inspect.isfunction(item) or inspect.isclass(item))
        and (listed is not None or item.__module__.startswith(module.__name__))
    ]


def _entry(module_name: str, name: str, item: Any) -> str:
    """A heading, the signature and the docstring of a function or class."""
    try:
        signature = re.sub(r" at 0x[0-9a-f]+|<factory>", "...", str(inspect.signature(item)))
    except ValueError:
        signature = "(...)"
    text = inspect.getdoc(item) or ""
    return f"\n### {name}\n\n```text\n{module_name}.{name}{signature}\n\n{text}\n```\n"


PAGES: dict[str, Callable[[], str]] = {
    "passes": _passes,
    "python": _python,
    "options": _options,
    "dialect": _dialect,
    "command-line": _command_line,
}


def page(name: str) -> str:
    """The text of docs/reference/<name>.md."""
    return _NOTE + PAGES[name]()


def readme(text: str, measured: Sequence[Mapping[str, Any]]) -> str:
    """The README's text with its tables brought up to date. measured: what `graphopt bench --json` wrote, parsed."""
    for name, rows in (("passes", catalogue.markdown_rows()), ("measured", _measured_rows(measured))):
        begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        before, _, rest = text.partition(begin)
        text = before + begin + rows + end + rest.partition(end)[2] if rest else text
    return text


def read_measured(root: Path) -> list[dict[str, Any]]:
    """The benchmark results that are kept in docs/measured/, in the order of their names."""
    return [json.loads(path.read_text()) for path in sorted((root / "docs" / "measured").glob("*.json"))]


def _measured_rows(results: Sequence[Mapping[str, Any]]) -> str:
    """Medians as Markdown tables, one for all results that compare the same systems: a row for each work of each
    result, a column for each system."""
    tables: dict[tuple[str, ...], list[str]] = {}
    for result in results:
        systems = tuple(dict.fromkeys(entry["system"] for entry in result["figures"]))
        head = ["| model, work | dtype | " + " | ".join(systems) + " |", "|---|---|" + "---:|" * len(systems)]
        lines = tables.setdefault(systems, head)
        for work in result["costs"]:
            cells = {entry["system"]: _measured_cell(entry) for entry in result["figures"] if entry["work"] == work}
            unit = "ms a token" if work == "decode" else "ms"
            row = [f"{result['model']}, {work}, batch {result['batch']} ({unit})", result["dtype"]]
            lines.append("| " + " | ".join(row + [cells.get(system, "") for system in systems]) + " |")
    machines = dict.fromkeys(
        f"{result['machine']}, {result['limits']['threads']} threads, torch {result['versions']['torch']}"
        for result in results
    )
    parts = ["\n".join(lines) for lines in tables.values()]
    return "\n\n".join([*parts, "Measured on " + "; ".join(machines) + "."]) + "\n" if parts else ""


def _measured_cell(entry: Mapping[str, Any]) -> str:
    return f"{entry['median']:.1f}, {entry['peak_bytes'] / 2**20:.0f} MiB"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    for name in PAGES:
        Path("docs", "reference", f"{name}.md").write_text(page(name))
    path = Path("README.md")
    path.write_text(readme(path.read_text(), read_measured(Path())))
