"""Experts that are computed for every token although a router cannot choose them: where they stand in a graph.

Two ways of writing a mixture of experts compute all of them: one stack of matrices whose results are summed (`bmm`,
then `sum` over the experts), and a loop that adds what each expert gives times a gate. Others compute for each token
only what was chosen (grouped products, gathered weights): there nothing is left to remove.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import fx

from graphopt import shapes, views
from graphopt.match.arguments import operands
from graphopt.pruning import channels, evidence, liveness, region
from graphopt.pruning.evidence import Evidence

aten, prims = torch.ops.aten, torch.ops.prims

_GATES = (aten.scatter.src, aten.sigmoid.default, aten._softmax.default)
_SAME_ELEMENTS = (*views.RESHAPES, aten.expand.default, aten.permute.default, aten.clone.default,
                  prims.convert_element_type.default)  # fmt: skip


def stack(total: fx.Node) -> region.Region | None:
    """What makes the terms of a `sum` over one dimension from stacked weights of the model; None if it is none."""
    args = cast(tuple[Any, ...], total.args)
    if total.target is not aten.sum.dim_IntList or len(args[1] or ()) != 1:
        return None
    x, dim = args[0], args[1][0] % args[0].meta["val"].dim()
    part = region.Region(total)
    position = {node: number for number, node in enumerate(total.graph.nodes)}
    waiting = {x: dim}
    while waiting:  # from the last node to the first: all users of a node have been seen before it
        node = max(waiting, key=position.__getitem__)
        along = waiting.pop(node)
        made = channels.edges(node, along) if _is_ours(part, node) else None
        if evidence.stored(node) is not None and along == 0:
            part.inside[node] = along
        elif made and all(waiting.get(edge.source, edge.dim) == edge.dim for edge in made):
            part.inside[node] = along
            waiting |= {edge.source: edge.dim for edge in made}
    return part if any(node.target is aten.bmm.default for node in part.inside) else None


def _is_ours(part: region.Region, node: fx.Node) -> bool:
    """Whether only the region uses the node, directly or in pieces."""
    for user in node.users:
        readers = user.users if user.target is aten.split.Tensor else [user]
        if any(reader not in part.inside and reader is not part.consumer for reader in readers):
            return False
    return True


def dead_terms(graph: fx.Graph) -> Iterator[tuple[fx.Node, fx.Node, tuple[Evidence, ...]]]:
    """(sum, its other operand, why) for sums of two of which one is zero because a gate is."""
    for node in graph.nodes:
        if node.target is not aten.add.Tensor or node.kwargs or len(operands(node)) != 2:
            continue
        for term, other in (node.args, node.args[::-1]):
            why = _why_zero(term)
            if why and not shapes.difference(node.meta["val"], other.meta["val"]):
                yield node, other, why
                break


def _why_zero(node: fx.Node) -> tuple[Evidence, ...]:
    """What shows that all elements of a node are zero; () if nothing does."""
    if node.target in _SAME_ELEMENTS:
        return _why_zero(views.source(node))
    if node.target is aten.mul.Tensor:
        return next(filter(None, map(_why_zero, operands(node))), ())
    if node.target not in (aten.select.int, aten.slice.Tensor):
        return ()
    gates = views.source(node)
    made = gates
    while made.target in _SAME_ELEMENTS:
        made = views.source(made)
    return _why_seen_zero(node, gates) if made.target in _GATES else ()


def _why_seen_zero(node: fx.Node, gates: fx.Node) -> tuple[Evidence, ...]:
    _, dim, *bounds = cast(tuple[Any, ...], (*node.args, 0)[: max(3, len(node.args))])
    dim %= gates.meta["val"].dim()
    extent = channels.extent(gates, dim)
    if extent is None or not all(isinstance(bound, int) for bound in bounds):
        return ()
    seen = [bounds[0] % extent] if node.target is aten.select.int else list(range(extent)[slice(*bounds)])
    zero = liveness.zero_channels(gates, dim)
    if not seen or any(channel not in zero for channel in seen):
        return ()
    return tuple(proof for channel in seen for proof in zero[channel])


def why_skipped(choice: fx.Node) -> str:
    """Why nothing is removed behind a `topk` that never chooses some experts."""
    waiting, seen = [choice], {choice}
    while waiting:
        for user in waiting.pop().users:
            if "grouped_mm" in str(user.target) or _gathers_weights(user):
                return "only experts that are chosen are computed: those that never are cost nothing"
            if user.target is not operator.getitem or user.args[1] != 0 or user.args[0] is not choice:
                waiting += [user] if user not in seen else []
                seen.add(user)
    return "what is computed for each expert cannot be told apart from the rest"


def _gathers_weights(node: fx.Node) -> bool:
    gathers = node.target in (aten.index.Tensor, aten.index_select.default)
    return gathers and views.is_constant_input(views.source(node))
