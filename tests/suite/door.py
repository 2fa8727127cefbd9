"""The one door of these suites: `torch.compile` with the backend under test.

Nothing in `tests/suite` imports graphopt: a suite that can be pointed at another backend shows at once whether the
suite or graphopt is wrong. `GRAPHOPT_SUITE_BACKEND=inductor` (or `aot_eager`, `eager`) runs every test of the folder
on that backend; `GRAPHOPT_SUITE_ROTATION` sets the word that picks the everyday share of the rotating tests.
"""

import functools
import os
import pathlib
import subprocess
import zlib
from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo
import torch._dynamo.utils

BACKEND = os.environ.get("GRAPHOPT_SUITE_BACKEND", "graphopt")


def compiled(
    program: Callable[..., Any],
    *,
    target: str | None = None,
    dynamic: bool | None = None,
    fullgraph: bool = False,
    **options: Any,
) -> Any:
    """Compile `program` with the backend under test; `target` and `options` reach graphopt only."""
    if BACKEND != "graphopt":
        return torch.compile(program, backend=BACKEND, dynamic=dynamic, fullgraph=fullgraph)
    if target is not None:
        options["target"] = target
    chosen = {"options": options} if options else {}
    return torch.compile(program, backend="graphopt", dynamic=dynamic, fullgraph=fullgraph, **chosen)


def fresh() -> None:
    """Forget every compiled program and every count."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def graphs_compiled() -> int:
    """How many graphs Dynamo has handed to a backend since `fresh`."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def graph_breaks() -> dict[str, int]:
    """The reasons of the graph breaks since `fresh`, with their counts."""
    return dict(torch._dynamo.utils.counters["graph_break"])


@functools.cache
def rotation() -> str:
    """The word that picks today's share: the environment's, else the commit's hash, else a constant."""
    given = os.environ.get("GRAPHOPT_SUITE_ROTATION")
    if given:
        return given
    here = pathlib.Path(__file__).parent
    try:
        answer = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return "no-git"
    return answer.stdout.strip()


def in_rotation(name: str, one_in: int) -> bool:
    """Whether `name` belongs to today's share of one in `one_in`; each name comes round as commits go by."""
    return zlib.crc32(f"{rotation()}:{name}".encode()) % one_in == 0
