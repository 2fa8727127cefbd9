"""Experts that a router cannot choose: scores that are minus infinity whatever the input, and what follows from them.

A bias of minus infinity makes a score minus infinity, and a softmax or sigmoid of it zero. `topk` does not choose it
while enough other scores are finite.
"""

from __future__ import annotations

import dataclasses
import operator
from typing import Any, cast

import torch
from torch import fx

from graphopt import views
from graphopt.pruning import channels, evidence
from graphopt.pruning.evidence import Evidence, Known

aten, prims = torch.ops.aten, torch.ops.prims

ZEROED = (aten.sigmoid.default, aten.exp.default, aten._softmax.default)
"""What makes zero of minus infinity."""

_MOVES = (*views.RESHAPES, aten.permute.default, aten.expand.default, aten.slice.Tensor, aten.clone.default,
          prims.convert_element_type.default)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Scattered:
    """Results of a choice, written where they were chosen from: base is what stands elsewhere.

    plain: the chosen scores themselves are written. keeps_zero: where the chosen score is zero, zero is written.
    """

    choice: fx.Node
    base: float
    plain: bool
    keeps_zero: bool


def excluded(node: fx.Node, dim: int) -> Known:
    """The channels along `dim` of a node that are minus infinity whatever the (finite) inputs of the call."""
    if channels.extent(node, dim) is None:
        return {}
    if evidence.stored(node) is not None:
        return evidence.of_lines(node, dim, "minus_inf")
    if channels.is_linear_output(node, dim):
        bias = node.args[2] if len(node.args) > 2 else None
        return evidence.of_lines(bias, 0, "minus_inf") if isinstance(bias, fx.Node) else {}
    if node.target is aten.scatter.src:
        made = scattered(node, dim)
        return excluded(views.source(made.choice), dim) if made and made.base == -torch.inf and made.plain else {}
    found: Known = {}
    if node.target in _MOVES or (node.target is aten.add.Tensor and not node.kwargs):
        for edge in channels.edges(node, dim) or ():
            found |= evidence.carried(node, dim, edge, excluded)
    return found


def zeroed(node: fx.Node, dim: int) -> Known:
    """The channels that a sigmoid, exponential or softmax makes zero."""
    if node.target is aten._softmax.default and cast(int, node.args[1]) % node.meta["val"].dim() != dim:
        return {}
    known = excluded(views.source(node), dim)
    # A softmax of nothing but minus infinity is NaN.
    return _while_others(known, channels.extent(node, dim), 1) if node.target is aten._softmax.default else known


def never_chosen(choice: fx.Node) -> Known:
    """The channels that a `topk` never chooses: enough others are above minus infinity."""
    x, count, dim = _asked(choice)
    return _while_others(excluded(x, dim), channels.extent(x, dim), count)


def out_of_reach(choice: fx.Node) -> Known:
    """The channels that are not worth a `topk`'s choice: their scores are minus infinity, or zero by it."""
    x, _, dim = _asked(choice)
    while x.target is prims.convert_element_type.default:
        x = views.source(x)
    return zeroed(x, dim) if x.target in ZEROED else excluded(x, dim)


def scattered(node: fx.Node, dim: int) -> Scattered | None:
    """What `scatter` writes, if it writes results of a `topk` along `dim` into a constant."""
    base, along, index, written = cast(tuple[Any, ...], node.args)
    choice = index.args[0] if index.target is operator.getitem and index.args[1] == 1 else None
    if choice is None or choice.target is not aten.topk.default or base.target is not aten.full.default:
        return None
    if along % node.meta["val"].dim() != dim or _asked(choice)[2] != dim:
        return None
    plain, keeps_zero = written, written
    while plain.target is prims.convert_element_type.default:
        plain = plain.args[0]
    while keeps_zero.target in (prims.convert_element_type.default, aten.div.Tensor):
        keeps_zero = keeps_zero.args[0]
    return Scattered(choice, float(base.args[1]), _is_chosen(plain, choice), _is_chosen(keeps_zero, choice))


def _is_chosen(node: fx.Node, choice: fx.Node) -> bool:
    return node.target is operator.getitem and node.args == (choice, 0)


def _asked(choice: fx.Node) -> tuple[fx.Node, int, int]:
    """(scores, how many are chosen, along which dimension); of smallest ones none counts as chosen by its size."""
    x, count, *rest = cast(tuple[Any, ...], choice.args)
    dim, largest = (*rest, *(-1, True)[len(rest) :])[:2]
    extent = x.meta["val"].shape[dim]
    return x, count if largest and isinstance(count, int) else extent, dim % x.meta["val"].dim()


def _while_others(known: Known, extent: int | None, count: int) -> Known:
    """Known channels, together with what says that `count` others are above minus infinity; {} if they are not."""
    weights = {proof.weight for proofs in known.values() for proof in proofs}
    if extent is None or not known or extent - len(known) < count or len(weights) != 1:
        return {}
    (weight,) = weights
    if weight.meta["val"].shape != (extent,):
        return {}
    others = tuple(Evidence(weight, 0, line, "not_minus_inf") for line in range(extent) if line not in known)
    return {channel: (*proofs, *others) for channel, proofs in known.items()}
