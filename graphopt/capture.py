"""From a Dynamo graph to functional ATen graphs whose inputs are named.

The decomposition table is Inductor's without the operations in `KEPT`, which passes and reports want to see whole;
`lowering.expand` decomposes them when nothing has claimed them.
"""

from __future__ import annotations

import dataclasses
import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import fx

from graphopt import _compat

aten = torch.ops.aten

Kind = Literal["inference", "forward", "backward"]
Role = Literal["weight", "buffer", "input"]
Compiler = Callable[[fx.GraphModule, Sequence[Any], "GraphInfo"], Callable[[list[Any]], Any]]

KEPT = (
    aten.silu.default,
    aten.gelu.default,
    aten.native_layer_norm.default,
    aten._fused_rms_norm.default,
    aten._softmax.default,
    aten.index_copy.default,
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
)

# Where Inductor's decomposition or code differs from eager: of integers linspace rounds instead of truncating; the
# gradient of average pooling with ceil_mode and padding is divided by another count.
NEVER_DECOMPOSED = (aten.linspace.default, aten.avg_pool2d_backward.default, aten.avg_pool3d_backward.default)


@dataclasses.dataclass(frozen=True)
class GraphInfo:
    """What a captured graph is: for inference, or one half of training; kept in `graph_module.meta["graphopt"]`.

    sources: for each placeholder the Python value it stands for ("L['self']._parameters['weight']"), "" if unknown.
    roles: for each placeholder whether it is a weight, a buffer or an input of the call.
    """

    kind: Kind
    sources: tuple[str, ...]
    roles: tuple[Role, ...]

    @property
    def training(self) -> bool:
        return self.kind != "inference"


def info(graph_module: fx.GraphModule) -> GraphInfo:
    """The `GraphInfo` of a captured graph; a graph made by hand counts as inference on unnamed inputs."""
    known = graph_module.meta.get("graphopt")
    if isinstance(known, GraphInfo):
        return known
    count = sum(node.op == "placeholder" for node in graph_module.graph.nodes)
    return GraphInfo("inference", ("",) * count, ("input",) * count)


@functools.cache
def decompositions() -> dict[Any, Any]:
    """The table that captured graphs are decomposed with."""
    whole = {*KEPT, *NEVER_DECOMPOSED}
    table = {op: function for op, function in _compat.inductor_decompositions().items() if op not in whole}
    unpool = table[aten.max_unpool2d.default]

    def max_unpool2d(x: torch.Tensor, indices: torch.Tensor, output_size: list[int]) -> torch.Tensor:
        return _compat.in_memory_format_of(x, unpool(x, indices, output_size))

    return {**table, aten.max_unpool2d.default: max_unpool2d}


@functools.cache
def undecomposed() -> dict[Any, Any]:
    """The decompositions of the operations that captured graphs still hold whole."""
    return {op: function for op, function in _compat.inductor_decompositions().items() if op in KEPT}


def capture(
    dynamo_graph: fx.GraphModule, inputs: Sequence[Any], compile_graph: Compiler
) -> Callable[..., Any]:
    """Run AOTAutograd and hand each graph it makes to `compile_graph`; returns the callable for Dynamo.

    A call under no_grad or inference_mode gives one "inference" graph, else a "forward" and a "backward" one.
    What `compile_graph` returns is kept by torch's AOT cache if it is an Inductor artifact.
    """
    sources = [
        _compat.dynamo_source(node) or "" for node in dynamo_graph.graph.nodes if node.op == "placeholder"
    ]

    def compiler(kind: Kind) -> Callable[..., Any]:
        def compile_captured(graph_module: fx.GraphModule, fake_inputs: Sequence[Any]) -> Any:
            graph_info = _describe(graph_module, kind, sources, inputs)
            graph_module.meta["graphopt"] = graph_info
            return compile_graph(graph_module, fake_inputs, graph_info)

        return compile_captured

    return _compat.aot(
        dynamo_graph,
        inputs,
        forward=compiler("forward"),
        backward=compiler("backward"),
        inference=compiler("inference"),
        decompositions=decompositions(),
    )


def weight_tensor(placeholder: fx.Node) -> torch.Tensor | None:
    """The parameter or buffer that a placeholder stands for in the call being compiled, if it is still alive.

    Only for decisions that the user asked to depend on values: the compiled graph serves other weights too.
    """
    reference = placeholder.meta.get("tensor")
    return reference() if reference is not None else None


def _describe(
    graph_module: fx.GraphModule, kind: Kind, sources: Sequence[str], inputs: Sequence[Any]
) -> GraphInfo:
    static = set(_compat.static_input_indices())
    names, roles = [], []
    for node in graph_module.graph.nodes:
        if node.op != "placeholder":
            continue
        index = _compat.aot_input_index(node)
        name = sources[index] if index is not None and index < len(sources) else ""
        role: Role = "input"
        if index is not None and index in static:
            role = "weight" if "_parameters[" in name else "buffer"
            if isinstance(inputs[index], torch.Tensor):
                node.meta["tensor"] = weakref.ref(inputs[index])
        node.meta["source"], node.meta["role"] = name, role
        names.append(name)
        roles.append(role)
    return GraphInfo(kind, tuple(names), tuple(roles))
