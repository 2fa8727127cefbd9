"""CUDA graphs for `mode="reduce-overhead"`: a compiled graph is recorded once and replayed, without Python's launches.

Recording, memory pools, the state of random numbers, static addresses and a recording for each set of sizes are the
work of Inductor's CUDA graph trees. Here it is decided whether a graph may be recorded, and what is static: parameters
and buffers are read where they are, other inputs are copied to where the recording reads them. What is returned is
copied out of the recording's memory, so that an answer stays as it was when the next call replays.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from graphopt import _compat, ops, views


@dataclasses.dataclass(frozen=True)
class Recording:
    """How a graph is recorded; plain data, stored with its artifact.

    static, updated: positions of the inputs that stay at their addresses, and of those that are updated in place.
    fresh: for each output whether it is memory of the graph's own. placeholders: what messages say of the inputs.
    """

    static: tuple[int, ...]
    updated: tuple[int, ...]
    fresh: tuple[bool, ...]
    device_index: int
    placeholders: tuple[Any, ...] = ()

    def around(self, compiled: Callable[[list[Any]], Any]) -> Callable[[list[Any]], Any]:
        """A boxed callable that records `compiled` and replays it."""
        replayed = _compat.cuda_graphs(
            compiled,
            static=self.static,
            updated=self.updated,
            outputs=len(self.fresh),
            device_index=self.device_index,
            placeholders=self.placeholders,
        )
        return lambda inputs: copies(replayed(inputs), self.fresh)


def plan(graph_module: fx.GraphModule, training: bool) -> Recording | str:
    """How a lowered graph is recorded, or the reason why it is not."""
    if training:
        return "the graph is one half of training"
    devices = {value.device for node in graph_module.graph.nodes for value in _tensors(node)}
    if not devices:
        return "the graph has no tensors"
    if any(device.type != "cuda" for device in devices):
        return f"they replay work of one GPU, and the graph works on {', '.join(sorted(map(str, devices)))}"
    if len(devices) > 1:
        return f"the graph works on several devices: {', '.join(sorted(map(str, devices)))}"
    node = _compat.incompatible_node(graph_module) or next(filter(_waits, graph_module.graph.nodes), None)
    if node is not None:
        return f"{node.target} cannot be recorded: it waits for values, or the size of its result depends on them"
    placeholders = graph_module.graph.find_nodes(op="placeholder")
    static = tuple(i for i, node in enumerate(placeholders) if node.meta.get("role") in ("weight", "buffer"))
    updated = _updated(graph_module.graph, placeholders)
    moving = [placeholders[i].name for i in updated if i not in static]
    if moving:
        return f"input {moving[0]} is updated in place and may lie elsewhere at the next call"
    (device,) = devices
    fresh = tuple(_is_fresh(output) for output in _outputs(graph_module.graph))
    index = torch.cuda.current_device() if device.index is None else device.index
    return Recording(static, updated, fresh, index, _compat.placeholder_facts(graph_module.graph))


def _waits(node: fx.Node) -> bool:
    """Does the operator hand values of tensors to the processor that launches?"""
    tags = getattr(node.target, "tags", ())
    return torch.Tag.data_dependent_output in tags or torch.Tag.dynamic_output_shape in tags


def copies(outputs: Sequence[Any], fresh: Sequence[bool]) -> list[Any]:
    """The outputs, those that are memory of the graph's own as copies; such as share memory go on sharing it."""
    owned = [isinstance(value, torch.Tensor) and own for value, own in zip(outputs, fresh, strict=True)]
    users = Counter(value.untyped_storage()._cdata for value, own in zip(outputs, owned, strict=True) if own)
    storages: dict[int, torch.UntypedStorage] = {}

    def copy(value: torch.Tensor) -> torch.Tensor:
        storage = value.untyped_storage()
        if users[storage._cdata] == 1 and _fills_its_span(value):
            empty = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
            return empty.copy_(value)
        if storage._cdata not in storages:
            storages[storage._cdata] = storage.clone()
        empty = torch.empty(0, dtype=value.dtype, device=value.device)
        return empty.set_(storages[storage._cdata], value.storage_offset(), value.shape, value.stride())

    return [copy(value) if own else value for value, own in zip(outputs, owned, strict=True)]


def _fills_its_span(value: torch.Tensor) -> bool:
    """Has each element a place of its own, with none between them that is not the tensor's?"""
    span = 1 + sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
    return value.numel() in (0, span)


def _tensors(node: fx.Node) -> list[torch.Tensor]:
    value = node.meta.get("val")
    return [v for v in (value if isinstance(value, (tuple, list)) else (value,)) if isinstance(v, torch.Tensor)]


def _outputs(graph: fx.Graph) -> list[Any]:
    returned = graph.output_node().args[0]
    return list(returned) if isinstance(returned, (tuple, list)) else [returned]


def _is_fresh(output: Any) -> bool:
    """Does an output show memory that the graph makes anew at each call?"""
    return isinstance(output, fx.Node) and _owner(output).op in ("call_function", "call_module")


def _owner(node: fx.Node) -> fx.Node:
    """The node that allocated the memory which a node shows; `kv_write` answers the memory that it is given."""
    found = views.storage(node)
    while found.target in ops.WRITES:
        found = views.storage(found.all_input_nodes[0])
    return found


def _updated(graph: fx.Graph, placeholders: Sequence[fx.Node]) -> tuple[int, ...]:
    """The positions of the inputs whose memory the graph may write to."""
    writers = [
        n
        for n in graph.nodes
        if n.op == "call_module" or n.target in ops.WRITES or (n.op == "call_function" and views.may_write(n))
    ]
    written = {_owner(read) for node in writers for read in _written(node)}
    return tuple(i for i, node in enumerate(placeholders) if node in written)


def _written(node: fx.Node) -> list[fx.Node]:
    """The operands that a node may write to: all of one that does not say."""
    schema = getattr(node.target, "_schema", None)
    if node.target in ops.WRITES:
        return node.all_input_nodes[:1]
    if node.op == "call_module":
        return [room for room in views.rooms_of(node) if room is not None]
    if schema is None:
        return node.all_input_nodes
    given = [
        (a, node.args[i] if i < len(node.args) else node.kwargs.get(a.name)) for i, a in enumerate(schema.arguments)
    ]
    values = [v for a, v in given if a.is_write for v in (v if isinstance(v, (tuple, list)) else (v,))]
    return [value for value in values if isinstance(value, fx.Node)]
