"""Choose for every dialect operation the first lowering that supports it, and decompose what is left.

A `Lowering` replaces one dialect node by a call of a kernel operator. `supports` is asked with the node (its
arguments carry fake values) and answers None, or the reason why the kernel cannot take it. Policy is the order of
the list, never hidden in `supports`. What no lowering supports is expanded to ATen by its meaning.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from graphopt import capture, edit, ops
from graphopt.runtime.artifact import Artifact

Supports = Callable[[fx.Node], str | None]
Emit = Callable[[edit.Rewrite, fx.Node], fx.Node]


@dataclasses.dataclass(frozen=True)
class Lowering:
    """One way to run a dialect operation: `emit` builds the replacement of a node that `supports` accepts."""

    name: str
    op: torch._ops.OpOverload
    supports: Supports
    emit: Emit


def same_arguments(target: torch._ops.OpOverload) -> Emit:
    """An `emit` that calls `target` with the dialect operation's arguments in the order of its schema."""

    def emit(rewrite: edit.Rewrite, node: fx.Node) -> fx.Node:
        return rewrite.call(target, *arguments(node).values())

    return emit


def arguments(node: fx.Node) -> dict[str, Any]:
    """All arguments of an operator's node by name, defaults filled in."""
    assert isinstance(node.target, torch._ops.OpOverload)
    declared = node.target._schema.arguments
    given = dict(zip((argument.name for argument in declared), node.args, strict=False)) | dict(node.kwargs)
    return {a.name: given.get(a.name, a.default_value if a.has_default_value() else None) for a in declared}


@dataclasses.dataclass(frozen=True)
class Choice:
    """How one node is run, and which better lowerings declined it and why."""

    node: str
    op: str
    lowering: str
    declined: tuple[tuple[str, str], ...] = ()


@dataclasses.dataclass(frozen=True)
class KernelSource:
    """The source of a kernel. language: "python" (Triton too) or "cpp"; nodes: what it computes, if known.

    calls: the nodes of the optimised graph that it runs, each by a call of its own, if known. built_for: the
    instruction set that it was compiled for, if it was.
    """

    name: str
    language: str
    source: str
    nodes: tuple[str, ...] = ()
    calls: tuple[str, ...] = ()
    built_for: str = ""


@dataclasses.dataclass
class Lowered:
    """A graph made ready to run. left_out: (what, why) for things that were left to torch; kernels: the code that it
    calls, besides what Inductor writes."""

    artifact: Artifact
    choices: list[Choice]
    left_out: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    kernels: list[KernelSource] = dataclasses.field(default_factory=list)


def choose(graph_module: fx.GraphModule, lowerings: Sequence[Lowering]) -> list[Choice]:
    """Replace every dialect node by the first of `lowerings` that supports it; the others stay. In place."""
    choices = []
    for node in list(graph_module.graph.nodes):
        if ops.meaning(node.target) is None:
            continue
        declined: list[tuple[str, str]] = []
        chosen = "meaning"
        for candidate in (lowering for lowering in lowerings if lowering.op is node.target):
            reason = candidate.supports(node)
            if reason is None:
                with edit.rewriting(graph_module, node) as rewrite:
                    rewrite.replace(node, candidate.emit(rewrite, node))
                chosen = candidate.name
                break
            declined.append((candidate.name, reason))
        choices.append(Choice(node.name, str(node.target), chosen, tuple(declined)))
    edit.eliminate_dead_code(graph_module)
    return choices


def expand(graph_module: fx.GraphModule, table: dict[Any, Callable[..., Any]]) -> None:
    """Decompose dialect operations by their meaning, and operations of `table` by their decomposition. In place."""
    complete = {**capture.decompositions(), **table}
    for node in list(graph_module.graph.nodes):
        function = ops.meaning(node.target) or (node.target if node.target in table else None)
        if function is None or not ops.is_traceable(node.target):
            continue
        with edit.rewriting(graph_module, node) as rewrite:
            new = rewrite.inline(function, *node.args, decompositions=complete, **node.kwargs)
            rewrite.replace(node, new)
    edit.eliminate_dead_code(graph_module)
