"""Choose for every dialect operation the first lowering that supports it, and decompose what is left.

A `Lowering` replaces one dialect node by a call of a kernel operator. `supports` is asked with the node (its
arguments carry fake values) and answers None, or the reason why the kernel cannot take it. Policy is the order of
the list, never hidden in `supports`. What no lowering supports is expanded to ATen by its meaning.

A user's kernel comes before all of these, on every target: `@lowering(op)` makes it a pass.
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from graphopt import capture, edit, ops, standalone
from graphopt.errors import OptionError
from graphopt.pipeline import Exactness, PassInfo
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
    calls, besides what Inductor writes; notes: what an option asked for and was not done."""

    artifact: Artifact
    choices: list[Choice]
    left_out: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    kernels: list[KernelSource] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)


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
    """Decompose operations of `table` by what it says, and other dialect operations by their meaning. In place."""
    complete = {**capture.decompositions(), **table}
    for node in list(graph_module.graph.nodes):
        function = node.target if node.target in table else ops.meaning(node.target)
        if function is None or not ops.is_traceable(node.target):
            continue
        with edit.rewriting(graph_module, node) as rewrite:
            new = rewrite.inline(function, *node.args, decompositions=complete, **node.kwargs)
            rewrite.replace(node, new)
    edit.eliminate_dead_code(graph_module)


USERS_KERNELS = "graphopt_kernels"
"""The namespace of the operators that `lowering` makes."""
_kernels = torch.library.Library(USERS_KERNELS, "DEF")
_made: dict[str, CustomLowering] = {}


@dataclasses.dataclass(frozen=True)
class CustomLowering:
    """A kernel of the user's, as a pass that calls it in place of each operation `op` that it supports.

    kernel: the operator `torch.ops.graphopt_kernels.NAME`, with the arguments of `op`, which launches it by `function`.
    """

    op: torch._ops.OpOverload
    kernel: torch._ops.OpOverload
    function: Callable[..., Any]
    supports: Supports
    graph_pass: PassInfo

    @property
    def __name__(self) -> str:
        return self.graph_pass.name

    def __call__(self, graph_module: fx.GraphModule) -> int:
        """Replace what is supported, refuse the rest with the reason; returns the number of replacements."""
        count = 0
        for node in graph_module.graph.find_nodes(op="call_function", target=self.op):
            reason = self.supports(node)
            if reason is not None:
                edit.refuse(node, reason)
                continue
            given = arguments(node)
            named = {a.name: given.pop(a.name) for a in self.op._schema.arguments if a.kwarg_only}
            with edit.rewriting(graph_module, node) as rewrite:
                rewrite.replace(node, rewrite.call(self.kernel, *given.values(), **named))
            count += rewrite.applied
        return count


def lowering(
    op: torch._ops.OpOverload, supports: Supports, *, exactness: Exactness = "rounding"
) -> Callable[[Callable[..., Any]], CustomLowering]:
    """Make a function that launches a kernel the way to run `op`, an operation of the dialect or any pure operator.

    supports: asked with each node (its arguments carry fake values in `meta["val"]`); answers None, or the reason why
    the kernel cannot take it. The function takes the arguments of `op` and returns new tensors of the dtypes, shapes
    and strides that `op` has. Hand the result over as `options={"passes": [...]}`: it runs on every target, after all
    passes of the library but the forming of regions, and is verified, numbered and reported as any other pass.
    Raises OptionError where `op` updates or returns its arguments, or the function cannot take them.
    """
    if not isinstance(op, torch._ops.OpOverload):
        raise OptionError(f"lowering: an operator overload is needed, such as graphopt.ops.rms_norm, got {op!r}")
    if any(value.alias_info is not None for value in (*op._schema.arguments, *op._schema.returns)):
        raise OptionError(f"lowering: {op} updates its arguments or returns views of them, which no kernel may do")

    def declare(function: Callable[..., Any]) -> CustomLowering:
        _check_parameters(op, function)
        name = _unused(function.__name__)
        schema = str(op._schema)
        _kernels.define(name + schema[schema.index("(") :], tags=[torch.Tag.pt2_compliant_tag])
        _kernels.impl(name, _with_defaults(op, function), "CompositeExplicitAutograd")
        torch.library.register_fake(f"graphopt_kernels::{name}", op, lib=_kernels)
        kernel: torch._ops.OpOverload = getattr(torch.ops.graphopt_kernels, name).default
        declared = PassInfo(function.__name__, exactness, "fuse", training=True)
        _made[name] = CustomLowering(op, kernel, function, supports, declared)
        return _made[name]

    return declare


def users_kernels(graph_module: fx.GraphModule) -> list[KernelSource]:
    """The kernels of the user's that a graph calls, each with its own source and all that it needs."""
    found = []
    for name, nodes in _calls(graph_module).items():
        try:
            text = standalone.source(_made[name].function)
        except standalone.Unwritable as error:
            text = f"# There is no source of {name} that stands alone: {error}.\n"
        found.append(KernelSource(name, "python", text, nodes, nodes))
    return found


def definitions(graph_module: fx.GraphModule) -> str:
    """A piece of a program that defines the kernels of the user's that a graph calls; "" if it calls none."""
    parts = []
    for kernel in users_kernels(graph_module):
        made = _made[kernel.name]
        own = made.function.__name__
        parts.append(kernel.source.rstrip("\n"))
        if own != kernel.name:
            parts.append(f"{own}.__name__ = {kernel.name!r}")
        parts.append(f"lowering(torch.ops.{made.op}, lambda node: None)({own})")
    return "\n\n".join(["from graphopt.lowering import lowering", *parts]) if parts else ""


def _calls(graph_module: fx.GraphModule) -> dict[str, tuple[str, ...]]:
    """By name of the kernel the nodes that call it, inside of fused regions too."""
    found: dict[str, tuple[str, ...]] = {}
    for module in graph_module.modules():
        for node in module.graph.nodes if isinstance(module, fx.GraphModule) else ():
            if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == USERS_KERNELS:
                name = node.target._schema.name.partition("::")[2]
                found[name] = (*found.get(name, ()), node.name)
    return found


def _check_parameters(op: torch._ops.OpOverload, function: Callable[..., Any]) -> None:
    declared = op._schema.arguments
    try:
        inspect.signature(function).bind(
            *(a.name for a in declared if not a.kwarg_only), **{a.name: None for a in declared if a.kwarg_only}
        )
    except TypeError as error:
        raise OptionError(f"lowering: {function.__name__} cannot take the arguments of {op._schema}: {error}") from None


def _with_defaults(op: torch._ops.OpOverload, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function called with all arguments: the dispatcher leaves out those at the end that have their defaults."""
    places = [a for a in op._schema.arguments if not a.kwarg_only]
    names = {a.name: a.default_value for a in op._schema.arguments if a.kwarg_only and a.has_default_value()}

    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, *(a.default_value for a in places[len(args) :]), **{**names, **kwargs})

    return call


def _unused(name: str) -> str:
    """The name, or with a number if there is such a kernel already: a cell of a notebook is run again."""
    names = itertools.chain([name], (f"{name}_{number}" for number in itertools.count(1)))
    return next(each for each in names if not hasattr(torch.ops.graphopt_kernels, each))
