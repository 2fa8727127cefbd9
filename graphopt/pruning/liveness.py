"""Which channels of a value are always zero, and which elements of weights say so.

A channel of a linear is zero if its row of the weight and its bias are; zero passes through products, through
activations with f(0) = 0, and, a head at a time, from values to the result of attention. The score of an expert that
a router cannot choose becomes zero (`exclusion`). All of it holds for finite activations: zero times infinity is NaN
in eager.
"""

from __future__ import annotations

import operator
from typing import Any, cast

import torch
from torch import fx

from graphopt import ops, shapes, views
from graphopt.match.arguments import operands
from graphopt.pruning import channels, evidence, exclusion
from graphopt.pruning.evidence import Known

aten = torch.ops.aten


_SUMS = (aten.add.Tensor, aten.sub.Tensor)
_MOVES = (*views.RESHAPES, aten.permute.default, aten.expand.default, aten.slice.Tensor, operator.getitem)
_KEEP_ZERO = (
    *(getattr(aten, name).default for name in ("silu", "gelu", "relu", "tanh", "neg", "abs", "sin", "erf", "clone")),
    torch.ops.prims.convert_element_type.default,
)


def zero_columns(linear: fx.Node) -> Known:
    """The input channels that the weight of a linear multiplies by zero."""
    return evidence.of_lines(cast(fx.Node, linear.args[1]), 1)


def zero_channels(node: fx.Node, dim: int) -> Known:
    """The channels along `dim` of a node that are zero whatever the (finite) inputs of the call."""
    if channels.extent(node, dim) is None:
        return {}
    if evidence.stored(node) is not None:
        return evidence.of_lines(node, dim)
    if channels.is_linear_output(node, dim):
        return _zero_rows(node)
    if node.target is aten.slice_scatter.default:
        return _zero_written(node, dim)
    if node.target is aten.scatter.src:
        return _zero_scattered(node, dim)
    if node.target in exclusion.ZEROED:
        return exclusion.zeroed(node, dim)
    made = channels.edges(node, dim)
    if made is None and dim == 0 and node.target is aten.view.default:
        return _zero_runs(views.source(node), channels.extent(node, 0) or 0)
    if not made or (node.target is operator.getitem and channels.piece(node) is None):
        return {}
    if node.target is ops.attention:
        return _carried(node, dim, made[2])
    if node.target in _MOVES or node.target in _KEEP_ZERO or _keeps_zero_by_number(node):
        return _carried(node, dim, made[0])
    if node.target in (aten.mul.Tensor, aten.bmm.default):
        return {channel: why for edge in reversed(made) for channel, why in _carried(node, dim, edge).items()}
    if node.target in _SUMS and len(made) == len(operands(node)) == 2:
        one, other = (_carried(node, dim, edge) for edge in made)
        return {channel: (*one[channel], *other[channel]) for channel in one if channel in other}
    return {}


def _keeps_zero_by_number(node: fx.Node) -> bool:
    """Whether the node divides by a number that is not zero, or takes a positive power."""
    number = node.args[1] if len(node.args) > 1 else None
    if not isinstance(number, (int, float)):
        return False
    return (node.target is aten.div.Tensor and number != 0) or (node.target is aten.pow.Tensor_Scalar and number > 0)


def _carried(node: fx.Node, dim: int, edge: channels.Edge) -> Known:
    return evidence.carried(node, dim, edge, zero_channels)


def _zero_rows(linear: fx.Node) -> Known:
    _, weight, *bias = cast(tuple[fx.Node, ...], linear.args)
    rows = evidence.of_lines(weight, 0)
    if not rows or not bias or bias[0] is None:
        return rows
    added = evidence.of_lines(bias[0], 0)
    return {row: (*why, *added[row]) for row, why in rows.items() if row in added}


def _zero_scattered(node: fx.Node, dim: int) -> Known:
    """Zero channels of zeros into which the results of a choice (`topk`) are written: what is never chosen."""
    made = exclusion.scattered(node, dim)
    if made is None or made.base != 0:
        return {}
    never = exclusion.never_chosen(made.choice)
    # What is zero may be chosen where all else is zero too; what is written then is zero.
    zero = zero_channels(views.source(made.choice), dim) if made.keeps_zero else {}
    return {**zero, **never}


def _zero_runs(node: fx.Node, parts: int) -> Known:
    """Which of `parts` equally long runs of elements, in the order of a view, are zero; sizes may be symbolic."""
    if channels.extent(node, 0) == parts:
        return zero_channels(node, 0)
    if node.target in views.RESHAPES or node.target is aten.clone.default:
        return _zero_runs(views.source(node), parts)
    found: Known = {}
    for operand in operands(node) if node.target is aten.mul.Tensor else ():
        mine, whole = operand.meta["val"].shape, node.meta["val"].shape
        # Rows stay rows if the operand has as many, and is repeated along the other dimensions or not at all.
        spread = all(isinstance(size, int) and size == 1 for size in mine[1:])
        if len(mine) == len(whole) and shapes.same(mine[0], whole[0]) and (spread or shapes.same_sizes(mine, whole)):
            found |= _zero_runs(operand, parts)
    return found


def _zero_written(node: fx.Node, dim: int) -> Known:
    """Zero channels of a buffer that the node fills as a whole: what else it held came from the caller."""
    _, rows, *place = cast(tuple[Any, ...], node.args)
    written = (place[0] if place else 0) % node.meta["val"].dim()
    whole = rows.meta["val"].shape[written] == node.meta["val"].shape[written]
    first = place[1] if len(place) > 1 else 0
    return zero_channels(rows, dim) if whole is True and first in (0, None) and written != dim else {}
