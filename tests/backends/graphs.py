"""Captured graphs for the tests of the Triton backend: a function through Dynamo into `compile_graph`."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from graphopt import capture
from graphopt.backends.triton.compile import CompiledGraph, compile_graph
from graphopt.passes.fuse.expand_rows import expand_rows

Prepare = Callable[[GraphModule], Any]


def run(
    function: Callable[..., Any], *inputs: Any, prepare: Prepare | None = None, dynamic: bool | None = None,
    **keywords: Any,
) -> tuple[Any, list[CompiledGraph]]:
    """The result of a function through the interpreted kernels, and the compiled graphs.

    prepare changes each captured graph in place before it is compiled; by default the graph becomes one region.
    """
    compiled: list[CompiledGraph] = []

    def compile_captured(graph_module: GraphModule, fake: Sequence[Any], info: Any) -> Callable[[list[Any]], Any]:
        if prepare is None:
            expand_rows(graph_module)
            graph_module = as_one_region(graph_module)
        else:
            prepare(graph_module)
        current = compile_graph(graph_module, interpret=True)
        compiled.append(current)

        def call(arguments: list[Any]) -> Any:
            given = list(arguments)
            arguments.clear()
            return current(*given)

        call._boxed_call = True  # type: ignore[attr-defined]
        return call

    def backend(dynamo_graph: GraphModule, fake: Sequence[Any]) -> Callable[..., Any]:
        return capture.capture(dynamo_graph, fake, compile_captured)

    torch._dynamo.reset()
    with torch.no_grad(), torch._functorch.config.patch(enable_autograd_cache=False):
        result = torch.compile(function, backend=backend, dynamic=dynamic)(*inputs, **keywords)
    return result, compiled


def as_one_region(inner: GraphModule) -> GraphModule:
    """A graph whose only call is the given graph as a region; its constants become inputs of the region."""
    outer, root = Graph(), torch.nn.Module()
    arguments = []
    placeholders = [n for n in inner.graph.nodes if n.op == "placeholder"]
    for node in placeholders:
        argument = outer.placeholder(node.name)
        argument.meta.update(node.meta)
        arguments.append(argument)
    for node in [n for n in inner.graph.nodes if n.op == "get_attr"]:
        value = getattr(inner, str(node.target))
        root.register_buffer(node.name, value)
        argument = outer.get_attr(node.name)
        argument.meta["val"] = value
        arguments.append(argument)
        _lift(inner, node, value)
    inner.recompile()
    root.add_module("region_0", inner)
    call = outer.call_module("region_0", tuple(arguments))
    results = []
    for place, value in enumerate(inner.graph.output_node().args[0]):  # type: ignore[arg-type]
        result = outer.call_function(operator.getitem, (call, place))
        assert isinstance(value, Node)
        result.meta.update(value.meta)
        results.append(result)
    outer.output(tuple(results))
    return GraphModule(root, outer)


def _lift(inner: GraphModule, node: Node, value: torch.Tensor) -> None:
    placeholders = [n for n in inner.graph.nodes if n.op == "placeholder"]
    first = next(iter(inner.graph.nodes))
    place = inner.graph.inserting_after(placeholders[-1]) if placeholders else inner.graph.inserting_before(first)
    with place:
        lifted = inner.graph.placeholder(f"lifted_{node.name}")
    lifted.meta["val"] = value
    node.replace_all_uses_with(lifted)
    inner.graph.erase_node(node)
