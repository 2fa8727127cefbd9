"""Facts about views: which nodes alias their input, and which element of it they show."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from graphopt import shapes

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


def is_view(node: fx.Node) -> bool:
    """Whether the node's result is a view of its first argument."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target.is_view


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
    """The node whose memory this one shows."""
    *_, last = chain(node)
    return last


def is_constant_input(node: fx.Node) -> bool:
    """Whether the node shows a parameter or buffer of the model."""
    return root(node).meta.get("role") in ("weight", "buffer")


def transpose_source(node: fx.Node) -> fx.Node | None:
    """The [N, K] tensor that `node` [..., K, N] is the transpose of, repeated over all other dimensions, if any.

    Compared are addresses (strides and offset), so that any chain of permute, expand, unsqueeze and view is seen through.
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
