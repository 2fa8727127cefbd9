"""What verification adds to compiling SmolLM2: seconds of compiling with and without, nothing out of caches, in turns.

    python -m tests.benchmarks.verify_cost [--turns 1] [--level sample] [--target cpu] [--json cost.json]

CPU seconds count this process and the compilers that it starts, whatever else the machine does.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import torch

import graphopt
from graphopt.commands.models import find_model, load_model


def cost(model: Any, ids: torch.Tensor, options: dict[str, Any]) -> dict[str, Any]:
    """Wall and CPU seconds of compiling one call and of running it once, and what was verified."""
    torch.compiler.reset()
    started, before = time.perf_counter(), os.times()
    with torch.no_grad():
        report = graphopt.explain(model, input_ids=ids, options=options)
    after = os.times()
    counts = [graph.verification for graph in report.graphs if graph.verification]
    undone = [done.error for graph in report.graphs for done in graph.passes if done.error]
    assert not undone, undone
    return {
        "wall": time.perf_counter() - started,
        "cpu": sum(after[:4]) - sum(before[:4]),
        "rewrites": sum(graph.rewrites for graph in report.graphs),
        "verified": counts,
    }


def main() -> None:
    """Print both, and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=1)
    parser.add_argument("--level", default="sample", choices=("sample", "all"))
    parser.add_argument("--target", default="cpu")
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    model = load_model(find_model("smollm2"), "float32").model.requires_grad_(False)
    ids = torch.arange(32)[None] + 100
    found: dict[str, list[dict[str, Any]]] = {"off": [], chosen.level: []}
    graphopt.explain(torch.nn.Linear(8, 8), torch.randn(2, 8), options={"target": chosen.target})  # builds the kernels
    for _ in range(chosen.turns):
        for level, costs in found.items():
            costs.append(cost(model, ids, {"target": chosen.target, "verify": level}))
            print(f"verify={level}: {costs[-1]}", flush=True)
    for what in ("wall", "cpu"):
        off, on = (min(each[what] for each in costs) for costs in found.values())
        print(f"{what}: {off:.1f} s without, {on:.1f} s with verify={chosen.level!r}: {on / off:.2f} times")
    if chosen.json:
        chosen.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
