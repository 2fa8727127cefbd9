"""Write what a compilation did into a directory: numbered graphs that run, their differences, kernels, the report."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import fx

from graphopt import lowering, program, text

_MAIN = """if __name__ == "__main__":
    torch.manual_seed(0)
    for output in graph(*inputs()):
        print(output)
"""


class Dump:
    """The dump of one compiled graph: a new subdirectory `graph_0000`, `graph_0001`, ... of `directory`.

    graph() writes `00_name.py` (a program that runs the graph on random inputs), `00_name.txt` (the graph as text)
    and, from the second on, `01_name.diff`; kernel() writes `kernels/name`; report() writes `report.json`.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = _new_directory(Path(directory))
        self._count = 0
        self._last = ""

    def graph(self, name: str, graph_module: fx.GraphModule) -> Path:
        """Write the graph after step `name`; returns the path of the program."""
        stem = f"{self._count:02d}_{_file_name(name)}"
        self._count += 1
        rendered = text.render(graph_module, names="node", comments=True)
        (self.directory / f"{stem}.txt").write_text(rendered + "\n")
        if self._last:
            (self.directory / f"{stem}.diff").write_text(text.diff(self._last, rendered) + "\n")
        self._last = rendered
        path = self.directory / f"{stem}.py"
        path.write_text(source(name, graph_module))
        return path

    def kernel(self, name: str, source: str) -> Path:
        """Write the source of a kernel; `name` may have a suffix such as ".cpp", the default is ".py"."""
        folder = self.directory / "kernels"
        folder.mkdir(exist_ok=True)
        path = folder / (_file_name(name) if Path(name).suffix else f"{_file_name(name)}.py")
        path.write_text(source)
        return path

    def report(self, json: str) -> Path:
        """Write the report, which is given as JSON text."""
        path = self.directory / "report.json"
        path.write_text(json)
        return path


def source(name: str, graph_module: fx.GraphModule) -> str:
    """A program that runs the graph on random inputs of the traced sizes; large constants become zeros."""
    held = any(
        isinstance(getattr(graph_module, str(node.target), None), torch.Tensor)
        for node in graph_module.graph.nodes
        if node.op == "get_attr"
    )
    parts = [
        f'"""The graph after {name}. Inputs are random, whole numbers are 0; run this file to try it."""\n\n'
        + program.HEADER,
        program.STRIDED,
        *filter(None, [lowering.definitions(graph_module)]),
        *([program.constants(graph_module)] if held else []),
        program.function(graph_module, "graph"),
        program.example_inputs(graph_module),
        _MAIN,
    ]
    return program.join(parts)


def _new_directory(parent: Path) -> Path:
    parent.mkdir(parents=True, exist_ok=True)
    number = sum(1 for _ in parent.glob("graph_*"))
    while True:
        candidate = parent / f"graph_{number:04d}"
        try:
            candidate.mkdir()
            return candidate
        except FileExistsError:  # another thread or process took the number
            number += 1


def _file_name(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", name).strip("._") or "step"
