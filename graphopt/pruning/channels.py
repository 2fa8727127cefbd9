"""How the channels of a value follow from those of its operands: what a head or channel is made from, node by node.

`edges(node, dim)` says for each operand which of its channels are needed for a channel along `dim` of the result. A
rule exists only for operations that never mix channels; where there is none, channels cannot be followed further.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from torch import fx

from graphopt import ops, views
from graphopt.match.arguments import operands

aten, prims = torch.ops.aten, torch.ops.prims


@dataclasses.dataclass(frozen=True)
class Edge:
    """Channels of `source` along `dim` from which the channels of a node are made.

    Both count the same elements: a channel of the node covers `mine` of them, one of the source `its`; the node begins
    at channel `start` of the source.
    """

    source: fx.Node
    dim: int
    mine: int = 1
    its: int = 1
    start: int = 0

    def needed(self, kept: Iterable[int]) -> list[int]:
        """The channels of the source from which the channels `kept` of the node are made, ascending."""
        if self.mine >= self.its:
            each = self.mine // self.its
            return [self.start + channel * each + part for channel in kept for part in range(each)]
        return sorted({self.start + channel * self.mine // self.its for channel in kept})

    def block(self, inner: int) -> int:
        """How many channels of the node go together if those of the source go together in blocks of `inner`."""
        return max(1, inner * self.its // self.mine)


def extent(node: fx.Node, dim: int) -> int | None:
    """The number of channels, None if it is symbolic."""
    size = node.meta["val"].shape[dim]
    return size if isinstance(size, int) else None


def edges(node: fx.Node, dim: int) -> list[Edge] | None:
    """What the channels along `dim` of a node are made from; None if the operation is not one that keeps them apart."""
    rule = _RULES.get(node.target)
    if rule is not None:
        return rule(node, dim)
    return _by_broadcast(node, dim, operands(node)) if is_pointwise(node) else None


def is_pointwise(node: fx.Node) -> bool:
    """Whether each element of the result depends on one element of each operand, and not on chance."""
    target = node.target
    if target in (prims.convert_element_type.default, aten.clone.default):
        return True
    if not isinstance(target, torch._ops.OpOverload) or torch.Tag.nondeterministic_seeded in target.tags:
        return False
    return torch.Tag.pointwise in target.tags and not target._schema.is_mutable


def is_linear_output(node: fx.Node, dim: int) -> bool:
    """Whether the channels are the output features of a linear."""
    return node.target is ops.linear and dim == node.meta["val"].dim() - 1


def heads_per_group(attention: fx.Node) -> int:
    """How many query heads read one key/value head."""
    q, k = cast(tuple[fx.Node, ...], attention.args)[:2]
    return int(q.meta["val"].shape[1]) // int(k.meta["val"].shape[1])


def piece(node: fx.Node) -> tuple[fx.Node, int, int] | None:
    """(whole, first channel, channels) if the node is a contiguous part of the last dimension of `whole`."""
    args = cast(tuple[Any, ...], node.args)
    if node.target not in (operator.getitem, aten.slice.Tensor):
        return None
    value = node.meta["val"]
    if node.target is operator.getitem and args[0].target is aten.split.Tensor:
        whole, size, *dim = args[0].args
        last = whole.meta["val"].dim() - 1
        if isinstance(size, int) and (*dim, 0)[0] % (last + 1) == last:
            return whole, args[1] * size, int(value.shape[-1])
    if node.target is aten.slice.Tensor:
        whole, dim, start, end, step = (*args, None, None, None, 1)[:5] if len(args) < 5 else args
        last = value.dim() - 1
        if (dim or 0) % value.dim() == last and step in (1, None) and isinstance(start or 0, int):
            size = whole.meta["val"].shape[-1]
            first = (start or 0) + (size if (start or 0) < 0 else 0)
            return whole, first, int(value.shape[-1])
    return None


def _by_broadcast(node: fx.Node, dim: int, given: Sequence[fx.Node]) -> list[Edge]:
    rank = node.meta["val"].dim()
    found = []
    for operand in given:
        own = dim - rank + operand.meta["val"].dim()
        if own >= 0 and (extent(operand, own) != 1 or extent(node, dim) == 1):
            found.append(Edge(operand, own))
    return found


def _view(node: fx.Node, dim: int) -> list[Edge] | None:
    source = views.source(node)
    theirs, mine = list(source.meta["val"].shape), list(node.meta["val"].shape)
    found = _segment(theirs, mine, dim)
    if found is None:
        return None
    (low, high), (own_low, own_high) = found
    leading = [index for index in range(low, high) if theirs[index] != 1] or [low]
    if math.prod(mine[own_low:dim]) != 1:
        return None  # an inner part of the dimension that was divided
    return [Edge(source, leading[0], math.prod(mine[dim + 1 : own_high]), math.prod(theirs[leading[0] + 1 : high]))]


def _segment(theirs: list[Any], mine: list[Any], dim: int) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """The fewest dimensions of both shapes, from the right, that hold `dim` of `mine` and as many elements."""
    low, own_low = len(theirs), len(mine)
    while own_low > dim:
        high, own_high = low, own_low
        low, own_low = low - 1, own_low - 1
        if low < 0:
            return None
        count, own_count = theirs[low], mine[own_low]
        while count is not own_count and count != own_count:
            if not (isinstance(count, int) and isinstance(own_count, int)):
                return None
            if count < own_count:
                low -= 1
                count *= theirs[low]
            else:
                own_low -= 1
                own_count *= mine[own_low]
            if low < 0 or own_low < 0:
                return None
        if own_low <= dim and not isinstance(count, int):
            return None
    return (low, high), (own_low, own_high)


def _permute(node: fx.Node, dim: int) -> list[Edge]:
    order: Any = node.args[1]
    return [Edge(views.source(node), order[dim] % len(order))]


def _expand(node: fx.Node, dim: int) -> list[Edge]:
    return _by_broadcast(node, dim, [views.source(node)])


def _slice(node: fx.Node, dim: int) -> list[Edge] | None:
    args = cast(tuple[Any, ...], node.args)
    if (args[1] if len(args) > 1 else 0) % node.meta["val"].dim() != dim:
        return [Edge(args[0], dim)]
    found = piece(node)
    return [Edge(found[0], dim, start=found[1])] if found is not None else None


def _getitem(node: fx.Node, dim: int) -> list[Edge] | None:
    found = piece(node)
    if found is not None:
        return [Edge(found[0], dim, start=found[1] if dim == node.meta["val"].dim() - 1 else 0)]
    made, index = cast(tuple[Any, ...], node.args)
    if made.target in (aten.native_layer_norm.default, aten._fused_rms_norm.default) and index == 0:
        return [Edge(made.args[0], dim)] if dim < node.meta["val"].dim() - len(made.args[1]) else None
    return None


def _linear(node: fx.Node, dim: int) -> list[Edge] | None:
    return None if is_linear_output(node, dim) else [Edge(views.source(node), dim)]


def _bmm(node: fx.Node, dim: int) -> list[Edge] | None:
    """The matrices of a stack, if the model keeps one of the stacks: experts, each with a matrix of its own."""
    stacks = cast(tuple[fx.Node, fx.Node], node.args)
    return [Edge(stack, 0) for stack in stacks] if dim == 0 and any(map(views.is_constant_input, stacks)) else None


def _rope(node: fx.Node, dim: int) -> list[Edge] | None:
    return None if dim == node.meta["val"].dim() - 1 else _by_broadcast(node, dim, operands(node))


def _rms_norm(node: fx.Node, dim: int) -> list[Edge] | None:
    return None if dim == node.meta["val"].dim() - 1 else [Edge(views.source(node), dim)]


def _attention(node: fx.Node, dim: int) -> list[Edge] | None:
    """Heads: a query head each, a part of what their group's key/value head serves, and their part of the mask."""
    if dim != 1:
        return None
    q, k, v, mask = (*cast(tuple[Any, ...], node.args), None)[:4]
    group = heads_per_group(node)
    found = [Edge(q, 1), Edge(k, 1, its=group), Edge(v, 1, its=group)]
    return found if mask is None else [*found, *_by_broadcast(node, dim, [mask])]


_RULES: dict[Any, Callable[[fx.Node, int], list[Edge] | None]] = {
    **dict.fromkeys(views.RESHAPES, _view),
    aten.permute.default: _permute,
    aten.expand.default: _expand,
    aten.slice.Tensor: _slice,
    operator.getitem: _getitem,
    ops.linear: _linear,
    aten.bmm.default: _bmm,
    ops.rope: _rope,
    ops.rms_norm: _rms_norm,
    ops.attention: _attention,
}
