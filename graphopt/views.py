"""Facts about views: which nodes alias their input, and which element of it they show."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import fx

from graphopt import _compat, ops, shapes

aten = torch.ops.aten

# Views that list the elements of their input in the same order.
RESHAPES = (
    aten.view.default,
    aten.unsqueeze.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.alias.default,
)


# Views that differ from their input in shape, strides and offset only (a conjugate or another dtype is no such view).
VIEWS = (
    *RESHAPES,
    aten.permute.default,
    aten.expand.default,
    aten.slice.Tensor,
    aten.select.int,
    aten.transpose.int,
    aten.t.default,
    aten.detach.default,
    aten.as_strided.default,
    aten.diagonal.default,
    aten.unfold.default,
)


def is_view(node: fx.Node) -> bool:
    """Whether the node shows elements of its first argument, unchanged."""
    return node.target in VIEWS


def source(node: fx.Node) -> fx.Node:
    """What a view node looks at: its first argument."""
    seen = node.args[0]
    assert isinstance(seen, fx.Node)
    return seen


def chain(node: fx.Node, targets: tuple[object, ...] | None = None) -> Iterator[fx.Node]:
    """The node, what it is a view of, and so on; stops at the first node that is no view (or none of `targets`)."""
    yield node
    while is_view(node) and (targets is None or node.target in targets):
        node = source(node)
        yield node


def root(node: fx.Node) -> fx.Node:
    """The node whose elements this one shows."""
    *_, last = chain(node)
    return last


def original(node: fx.Node) -> fx.Node:
    """The farthest node whose elements this chain of views shows in their very places; itself if there is none."""
    value, found = node.meta["val"], node
    for seen in chain(node):
        other = seen.meta["val"]
        if not shapes.difference(value, other) and shapes.same(value.storage_offset(), other.storage_offset()):
            found = seen
    return found


def storage(node: fx.Node) -> fx.Node:
    """The node that allocated the memory which this one shows or was written into."""
    while (seen := _aliased(node)) is not None:
        node = seen
    return node


def written_into(node: fx.Node) -> fx.Node | None:
    """The memory that a result of a region lies in because the region writes it there with `kv_write`, if it does."""
    call, place = node.args
    assert isinstance(call, fx.Node) and isinstance(place, int)
    return rooms_of(call)[place]


def rooms_of(call: fx.Node) -> list[fx.Node | None]:
    """For each result of a region (a `call_module` node) the argument that the region writes it into, or None."""
    region = cast(fx.GraphModule, call.graph.owning_module).get_submodule(str(call.target))
    assert isinstance(region, fx.GraphModule)
    given = dict(zip(region.graph.find_nodes(op="placeholder"), call.args, strict=True))
    results: Any = region.graph.output_node().args[0]
    listed = results if isinstance(results, (tuple, list)) else (results,)
    written = [r.args[0] if isinstance(r, fx.Node) and r.target in ops.WRITES else None for r in listed]
    return [cast(fx.Node, given[room]) if isinstance(room, fx.Node) else None for room in written]


def _aliased(node: fx.Node) -> fx.Node | None:
    if node.target is operator.getitem:
        made = cast(fx.Node, node.args[0])
        return written_into(node) if made.op == "call_module" else _aliased(made)
    if not isinstance(node.target, torch._ops.OpOverload):
        return None
    returned = node.target._schema.returns
    if not returned or returned[0].alias_info is None or not isinstance(node.args[0], fx.Node):
        return None
    return node.args[0]


class Exposure:
    """Which memory of a graph its callers see, and which is written: there, a copy is more than its values.

    outputs: the nodes that are results of the graph. shared: the memory they show. written: memory that is updated in
    place, as far as is known.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.outputs = set(graph.output_node().all_input_nodes)
        self.shared = {storage(node) for node in self.outputs}
        self.written = {storage(seen) for node in graph.nodes if may_write(node) for seen in node.all_input_nodes}

    def may_become(self, copy: fx.Node, original: fx.Node) -> bool:
        """Whether users of `copy`, equal in value, may see `original` instead."""
        if self.written & {storage(copy), storage(original)}:
            return False
        if copy in self.outputs and (original in self.outputs or original.op in ("placeholder", "get_attr")):
            return False
        if storage(copy) is storage(original) or storage(copy) not in self.shared:
            return True
        return storage(original) not in self.shared and storage(original).op not in ("placeholder", "get_attr")

    def became(self, copy: fx.Node, original: fx.Node) -> None:
        """Note that users of `copy` now see `original`."""
        if copy in self.outputs:
            self.outputs.add(original)
        if storage(copy) in self.shared:
            self.shared.add(storage(original))


def may_write(node: fx.Node) -> bool:
    """Whether the node may write into memory it is given."""
    if node.op != "call_function" or node.target is operator.getitem or _is_symbolic(node):
        return node.op == "call_module"
    return not isinstance(node.target, torch._ops.OpOverload) or node.target._schema.is_mutable


def _is_symbolic(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), (torch.SymInt, torch.SymFloat, torch.SymBool))


def is_constant_input(node: fx.Node) -> bool:
    """Whether the node shows a parameter or buffer of the model."""
    return root(node).meta.get("role") in ("weight", "buffer")


def transpose_source(node: fx.Node) -> fx.Node | None:
    """The [N, K] tensor that `node` [..., K, N] is the transpose of, repeated over all other dimensions, if any.

    Addresses (strides and offset) are compared, so any chain of permute, expand, unsqueeze and view is seen through.
    """
    value = node.meta["val"]
    if value.dim() < 2:
        return None
    for candidate in chain(node):
        seen = candidate.meta["val"]
        if candidate is node or not isinstance(seen, torch.Tensor) or seen.dim() != 2:
            continue
        if _is_repeated_transpose(seen, value):
            return candidate
    return None


def _is_repeated_transpose(seen: torch.Tensor, value: torch.Tensor) -> bool:
    (rows, columns), (row_stride, column_stride) = seen.shape, seen.stride()
    return (
        shapes.same(value.storage_offset(), seen.storage_offset())
        and shapes.same(value.shape[-1], rows)
        and shapes.same(value.shape[-2], columns)
        and (shapes.same(value.stride(-1), row_stride) or shapes.same(rows, 1))
        and (shapes.same(value.stride(-2), column_stride) or shapes.same(columns, 1))
        and all(
            shapes.same(stride, 0) or shapes.same(size, 1)
            for size, stride in zip(value.shape[:-2], value.stride()[:-2], strict=True)
        )
    )


def consequences(graph_module: fx.GraphModule, node: fx.Node, value: torch.Tensor) -> dict[fx.Node, Any] | str:
    """The new values of all later nodes if `node` had the strides of `value`, or why it may not."""
    changed: dict[fx.Node, Any] = {node: value}

    def seen(argument: fx.Node) -> Any:
        return changed.get(argument, argument.meta.get("val"))

    nodes = list(graph_module.graph.nodes)
    with _compat.fake_execution(graph_module):
        for user in nodes[nodes.index(node) + 1 :]:
            if user.op != "call_function" or not any(source in changed for source in user.all_input_nodes):
                continue
            args, kwargs = fx.map_arg((user.args, user.kwargs), seen)
            assert callable(user.target)
            try:
                result = user.target(*args, **kwargs)
            except (RuntimeError, ValueError) as error:
                return f"{user.target} needs the cache's own strides: {str(error).splitlines()[0]}"
            difference = shapes.difference(user.meta.get("val"), result)
            if difference and not difference.startswith("stride"):
                return f"{user.target} would have another {difference}"
            if difference:
                changed[user] = result
    del changed[node]
    return changed
