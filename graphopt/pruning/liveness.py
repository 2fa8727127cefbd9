"""Which channels of a value are always zero, and which elements of weights say so.

A channel of a linear is zero if its row of the weight and its bias are; zero passes through products, through
activations with f(0) = 0, and, a head at a time, from values to the result of attention. All of it holds for finite
activations: zero times infinity is NaN in eager.
"""

from __future__ import annotations

import dataclasses
import operator
from typing import Any, cast

import torch
from torch import fx

from graphopt import _compat, capture, ops, views
from graphopt.match.arguments import operands
from graphopt.pruning import channels, lines

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class Evidence:
    """The elements of a weight at `index` along `dim` are zero."""

    weight: fx.Node
    dim: int
    index: int


Zero = dict[int, tuple[Evidence, ...]]
"""For each channel that is always zero the elements it rests on."""

_SUMS = (aten.add.Tensor, aten.sub.Tensor)
_MOVES = (*views.RESHAPES, aten.permute.default, aten.expand.default, aten.slice.Tensor, operator.getitem)
_KEEP_ZERO = (
    *(getattr(aten, name).default for name in ("silu", "gelu", "relu", "tanh", "neg", "abs", "sin", "erf", "clone")),
    torch.ops.prims.convert_element_type.default,
)


def zero_columns(linear: fx.Node) -> Zero:
    """The input channels that the weight of a linear multiplies by zero."""
    return _zero_lines(cast(fx.Node, linear.args[1]), 1)


def zero_channels(node: fx.Node, dim: int) -> Zero:
    """The channels along `dim` of a node that are zero whatever the (finite) inputs of the call."""
    if channels.extent(node, dim) is None:
        return {}
    if stored(node) is not None:
        return _zero_lines(node, dim)
    if channels.is_linear_output(node, dim):
        return _zero_rows(node)
    if node.target is aten.slice_scatter.default:
        return _zero_written(node, dim)
    made = channels.edges(node, dim)
    if not made or (node.target is operator.getitem and channels.piece(node) is None):
        return {}
    if node.target is ops.attention:
        return _carried(node, dim, made[2])
    if node.target in _MOVES or node.target in _KEEP_ZERO or _keeps_zero_by_number(node):
        return _carried(node, dim, made[0])
    if node.target is aten.mul.Tensor:
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


def _carried(node: fx.Node, dim: int, edge: channels.Edge) -> Zero:
    """The channels of a node all of whose elements come from zero channels of the edge's source."""
    zero = zero_channels(edge.source, edge.dim)
    found: Zero = {}
    for channel in range(channels.extent(node, dim) or 0) if zero else ():
        needed = edge.needed([channel])
        if needed and all(part in zero for part in needed):
            found[channel] = tuple(evidence for part in needed for evidence in zero[part])
    return found


def _zero_rows(linear: fx.Node) -> Zero:
    _, weight, *bias = cast(tuple[fx.Node, ...], linear.args)
    rows = _zero_lines(weight, 0)
    if not rows or not bias or bias[0] is None:
        return rows
    added = _zero_lines(bias[0], 0)
    return {row: (*why, *added[row]) for row, why in rows.items() if row in added}


def _zero_written(node: fx.Node, dim: int) -> Zero:
    """Zero channels of a buffer that the node fills as a whole: what else it held came from the caller."""
    _, rows, *place = cast(tuple[Any, ...], node.args)
    written = (place[0] if place else 0) % node.meta["val"].dim()
    whole = rows.meta["val"].shape[written] == node.meta["val"].shape[written]
    first = place[1] if len(place) > 1 else 0
    return zero_channels(rows, dim) if whole is True and first in (0, None) and written != dim else {}


def _zero_lines(weight: fx.Node, dim: int) -> Zero:
    """The lines of a weight along `dim` that are zero now, if its elements are at hand and the graph leaves them."""
    found = stored(weight)
    if found is None:
        return {}
    placeholder, transposed = found
    own = 1 - dim if transposed else dim
    tensor = capture.weight_tensor(placeholder)
    if not lines.can_be_read(tensor) or tensor is None or tensor.shape != placeholder.meta["val"].shape:
        return {}
    with _compat.without_modes(), torch.no_grad():
        zero = lines.zero_lines(tensor, own)
    return {line: (Evidence(placeholder, own, line),) for line in zero}


def stored(weight: fx.Node) -> tuple[fx.Node, bool] | None:
    """The parameter that a node is or is the transpose of, and which; None for other nodes and for written ones."""
    placeholder = views.root(weight)
    transposed = weight.target is aten.permute.default and weight.args == (placeholder, [1, 0])
    if placeholder.op != "placeholder" or not views.is_constant_input(weight):
        return None
    if (weight is not placeholder and not transposed) or any(map(views.may_write, placeholder.users)):
        return None
    return placeholder, transposed
