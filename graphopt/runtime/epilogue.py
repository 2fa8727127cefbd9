"""Work done at call time after the compiled graph has run: results that are not plain tensors.

A pass writes such a result as an ordinary node that the graph returns, `kv_quantized_cache(codes, params, tail, ...)`.
`sink` takes these nodes out of the graph, so that it returns only tensors, and the `Epilogue` makes the results of what
the prologue made, of the graph's inputs, and of what the graph returns.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from graphopt import ops, views

_after_call: dict[str, Callable[..., Any]] = {}


def after_call(op: torch._ops.OpOverload) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Declare a function to be how `op`, returned by a graph, runs after the graph at call time."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        _after_call[str(op)] = function
        return function

    return register


def is_after_call(node: fx.Node) -> bool:
    """Whether the node's operation runs after the graph."""
    return str(node.target) in _after_call


@dataclasses.dataclass(frozen=True)
class Given:
    """The value number `index` of a call: an input of the graph as it was captured, or a step of the prologue."""

    index: int


@dataclasses.dataclass(frozen=True)
class Returned:
    """The result number `index` of the compiled graph."""

    index: int


@dataclasses.dataclass(frozen=True)
class Making:
    """A result that is made by the function declared for an operation."""

    function: str
    args: tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Epilogue:
    """How each result of a call is made; plain data, so that it can be stored."""

    results: tuple[Returned | Making, ...]

    def __call__(self, values: Sequence[Any], returned: Sequence[Any]) -> list[Any]:
        """The results of the call, from the values that the prologue knew and what the graph returned."""

        def resolve(argument: Any) -> Any:
            if isinstance(argument, Given):
                return values[argument.index]
            return returned[argument.index] if isinstance(argument, Returned) else argument

        made = []
        for result in self.results:
            if isinstance(result, Making):
                made.append(_after_call[result.function](*map(resolve, result.args)))
            else:
                made.append(returned[result.index])
        return made


def sink(graph_module: fx.GraphModule, known: Mapping[fx.Node, int]) -> Epilogue | None:
    """Take results that are made at call time out of the graph, in place; None if there are none.

    known: the nodes whose values are at hand at call time, with their numbers.
    """
    output = graph_module.graph.output_node()
    results: Any = output.args[0]
    if not isinstance(results, (tuple, list)) or not any(
        isinstance(node, fx.Node) and is_after_call(node) for node in results
    ):
        return None
    written = _written_into(graph_module, known)
    returned: list[Any] = []

    def argument_of(value: Any) -> Any:
        if not isinstance(value, fx.Node):
            return value
        if value in known or value in written:
            return Given(known[written.get(value, value)])
        returned.append(value)
        return Returned(len(returned) - 1)

    made: list[Returned | Making] = []
    for node in results:
        if isinstance(node, fx.Node) and is_after_call(node):
            assert isinstance(node.target, torch._ops.OpOverload) and not node.kwargs
            made.append(Making(str(node.target), tuple(map(argument_of, node.args))))
        else:
            returned.append(node)
            made.append(Returned(len(returned) - 1))
    output.args = (type(results)(returned),)
    for node in dict.fromkeys(results):
        if isinstance(node, fx.Node) and not node.users and is_after_call(node):
            graph_module.graph.erase_node(node)
    return Epilogue(tuple(made))


def _written_into(graph_module: fx.GraphModule, known: Mapping[fx.Node, int]) -> dict[fx.Node, fx.Node]:
    """Nodes that the graph copies whole into a value that is known at call time, or are that value, and the value."""
    copied = {
        node.args[1]: node.args[0]
        for node in graph_module.graph.nodes
        if node.target is torch.ops.aten.copy_.default and node.args[0] in known and isinstance(node.args[1], fx.Node)
    }
    written = {node: _written_room(node) for node in graph_module.graph.nodes}
    return copied | {node: room for node, room in written.items() if room in known}


def _written_room(node: fx.Node) -> Any:
    """The memory that a node is because rows were written there, by itself or in a region."""
    if node.target in ops.WRITES:
        return node.args[0]
    made = node.args[0] if node.target is operator.getitem else None
    return views.written_into(node) if isinstance(made, fx.Node) and made.op == "call_module" else None
