"""`graphopt kernels`: what the generated Triton kernels of a model take on GPUs that need not be there."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from graphopt.commands.models import DTYPES, find_model, load_model
from graphopt.commands.progress import steps
from graphopt.errors import GraphoptError, OptionError

if TYPE_CHECKING:
    from graphopt.backends.triton.compile import CompiledGraph


def run(name: str, dtype: str, length: int, targets: Sequence[str], save: Path | None, console: Console) -> bool:
    """Print one table for each graph of the named model: a prompt of `length` tokens, then one token with its cache.

    Each kernel is compiled for each target; the generated files are written into the folder `save`. Returns whether
    every kernel fits: no spills, and no more shared memory than the target has.
    """
    from graphopt.backends.triton import target as triton_target

    if dtype not in DTYPES:
        raise OptionError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    reason = triton_target.unavailable_reason()
    if reason is not None:
        raise GraphoptError(f"{reason}; install it with: python -m pip install triton")
    _check_targets(targets)
    source = find_model(name)
    step = steps(Console(stderr=True) if not console.is_terminal else console)
    with step(f"load {source.name}"):
        loaded = load_model(source, dtype)
    with step("generate kernels"):
        graphs = _generate(loaded.model, loaded.generates, length)
    fits = True
    for title, graph in graphs:
        with step(f"compile the kernels of {title}"):
            table, good = _table(f"{source.name}, {dtype}: {title}", graph, targets)
        console.print(table)
        fits = fits and good
        if save is not None:
            path = save / f"{title.replace(' ', '_')}.py"
            path.write_text(graph.source)
            console.print(f"written to {path}", highlight=False)
    return fits


def _check_targets(targets: Sequence[str]) -> None:
    from graphopt.backends.triton.check import TARGETS

    for target in targets:
        if target not in TARGETS:
            raise OptionError(f"unknown target {target!r}; allowed are {', '.join(TARGETS)}")


def _generate(model: Any, generates: bool, length: int) -> list[tuple[str, CompiledGraph]]:
    """The generated program of each graph. The graphs themselves run by their meaning, so that the model goes on."""
    import torch

    from graphopt import _compat, backend, pipeline
    from graphopt.backends import reference
    from graphopt.backends.triton.compile import compile_graph
    from graphopt.capture import GraphInfo, capture
    from graphopt.options import Options
    from graphopt.runtime import cache, prologue

    options = Options(target="triton")
    found: list[CompiledGraph] = []

    def compile_captured(graph_module: torch.fx.GraphModule, fake: Sequence[Any], info: GraphInfo) -> Any:
        pipeline.run(graph_module, backend.arranged(options, "triton"), options)
        # What is done at call time (reserving room in caches) is no part of the program, as in the target itself.
        generated = torch.fx.GraphModule(graph_module, copy.deepcopy(graph_module.graph))
        prologue.hoist(generated, fake)
        found.append(compile_graph(generated, interpret=True))
        return reference.compile_graph(graph_module, fake, info, options).artifact

    def backend_of_command(dynamo_graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        return capture(dynamo_graph, inputs, compile_captured)

    compiled: Any = torch.compile(model, backend=backend_of_command)
    ids = torch.arange(length)[None] % model.config.vocab_size
    titles = []
    caches = _compat.compile_caches(str(cache.cache_dir("inductor")), "kernels", read=False)
    with torch.no_grad(), caches:
        if not generates:
            compiled(input_ids=ids, attention_mask=torch.ones_like(ids))
            titles = ["encode"] * len(found)
        else:
            output = compiled(input_ids=ids, use_cache=True, logits_to_keep=1)
            titles = ["prefill"] * len(found)
            compiled(input_ids=ids[:, -1:], past_key_values=output.past_key_values, use_cache=True, logits_to_keep=1)
            titles += ["decode"] * (len(found) - len(titles))
    return [
        (title if titles.count(title) == 1 else f"{title} {titles[:index].count(title) + 1}", graph)
        for index, (title, graph) in enumerate(zip(titles, found, strict=True))
    ]


def _table(title: str, graph: CompiledGraph, targets: Sequence[str]) -> tuple[Table, bool]:
    from graphopt.backends.triton.check import resources

    table = Table(
        "kernel", "kind", "target", "registers", "spills", "shared", "occupancy",
        title=f"{title}: {graph.launches} launches of {len(graph.kernels)} kernels",
        caption=f"{len(graph.fallbacks)} calls of ATen" if graph.fallbacks else None,
    )  # fmt: skip
    fits = True
    for name, kernel in graph.kernels.items():
        for place, target in enumerate(targets):
            found = resources(kernel, target)
            fits = fits and found.fits
            table.add_row(
                name if place == 0 else "",
                kernel.kind if place == 0 else "",
                target,
                str(found.registers),
                f"{found.spilled_bytes} B",
                f"{found.shared_bytes} B",
                f"{found.occupancy:.0%}",
                style=None if found.fits else "bold red",
            )
    return table, fits
