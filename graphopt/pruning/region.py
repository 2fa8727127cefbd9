"""The part of a graph that makes the input channels of a linear, and only them: what shrinks when some are removed.

It reaches back through views, elementwise operations, rotary embeddings and attention to the linears whose output
features the channels are. Where something else needs a value as a whole, there is no such part, and the reason says so.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Iterable
from typing import cast

import torch
from torch import fx

from graphopt import ops, views
from graphopt.pruning import channels, evidence, operations

aten = torch.ops.aten


@dataclasses.dataclass
class Region:
    """What can be computed without some channels. inside: for each node of it the dimension of its channels."""

    consumer: fx.Node
    inside: dict[fx.Node, int] = dataclasses.field(default_factory=dict)

    @property
    def sources(self) -> list[fx.Node]:
        """The linears and tables in which the region begins."""
        return [node for node, dim in self.inside.items() if is_source(node, dim)]

    @property
    def attention(self) -> fx.Node | None:
        """The attention whose heads the channels are, if they are heads."""
        return next((node for node in self.inside if node.target is ops.attention), None)


def explore(consumer: fx.Node) -> Region | str:
    """The region that makes the input of a linear, or why its channels cannot be removed where they are made."""
    region = Region(consumer)
    x = cast(fx.Node, consumer.args[0])
    dim = x.meta["val"].dim() - 1
    reason = _explore(region, x, dim) or _why_shared(region, region.inside)
    if not reason and not region.sources:
        reason = "its input is not made by a linear of the model"
    return reason or region


def _explore(region: Region, node: fx.Node, dim: int) -> str:
    if node in region.inside:
        return "" if region.inside[node] == dim else f"{node.name} is read along two of its dimensions"
    if channels.extent(node, dim) is None:
        return "the number of its channels is symbolic"
    region.inside[node] = dim
    if is_source(node, dim):
        return ""
    made = channels.edges(node, dim)
    if made is None:
        return _why_mixed(node)
    for edge in made:
        if not _is_optional(node, edge):
            reason = _explore(region, edge.source, edge.dim)
            if reason:
                return reason
    for edge in made:
        if _is_optional(node, edge):
            branch = Region(region.consumer, dict(region.inside))
            if not _explore(branch, edge.source, edge.dim) and not _why_shared(branch, _new(branch, region)):
                region.inside = branch.inside
    return ""


def _new(branch: Region, region: Region) -> list[fx.Node]:
    return [node for node in branch.inside if node not in region.inside]


def is_source(node: fx.Node, dim: int) -> bool:
    """Whether the channels are rows or columns of a weight."""
    if channels.is_linear_output(node, dim):
        return True
    return node.target is aten.embedding.default and dim == node.meta["val"].dim() - 1


def _is_optional(node: fx.Node, edge: channels.Edge) -> bool:
    """Whether an operand may be cut to size at each call: masks, caches and small constants."""
    if node.target is ops.attention:
        return edge.source is not node.args[0]
    return edge.source.op in ("placeholder", "get_attr") or views.is_constant_input(edge.source)


def _why_mixed(node: fx.Node) -> str:
    if node.target is operator.getitem:
        node = views.source(node)
    made = views.root(node)
    if made.target in (aten.bmm.default, aten.mm.default):
        softmax = _softmax_of(made)
        if softmax is not None and any(user.op == "output" for user in _returned(softmax)):
            return "attention weights are returned to the caller"
    if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
        return "it draws random numbers (dropout), one for each channel"
    return f"{node.target} does not keep its channels apart"


def _softmax_of(product: fx.Node) -> fx.Node | None:
    node = product.args[0]
    while isinstance(node, fx.Node) and node.target is not aten._softmax.default:
        node = node.args[0] if node.args and (views.is_view(node) or channels.is_pointwise(node)) else None
    return node if isinstance(node, fx.Node) else None


def _returned(softmax: fx.Node) -> list[fx.Node]:
    """The users of attention weights, behind views, copies and casts."""
    found, waiting = [], [softmax]
    while waiting:
        for user in waiting.pop().users:
            found.append(user)
            if views.is_view(user) or channels.is_pointwise(user):
                waiting.append(user)
    return found


def _why_shared(region: Region, nodes: Iterable[fx.Node]) -> str:
    """Why some of the nodes must be computed as a whole anyway, or ""."""
    for node in nodes:
        for user in node.users:
            if user in region.inside or user is region.consumer or channels.piece(user) is not None:
                continue
            if user.target is aten.split.Tensor and all(channels.piece(part) for part in user.users):
                continue
            if user.op == "output":
                return f"{node.name} is returned to the caller, or seen by a hook"
            return f"{node.name} is used by {user.name} too (a shared projection, or a hook that reads it)"
        if node in region.sources:
            reason = _why_tied(node)
            if reason:
                return reason
    return _why_tied(region.consumer)


def _why_tied(linear: fx.Node) -> str:
    for weight in linear.args[1:] if linear.target is ops.linear else linear.args[:1]:
        root = views.root(weight) if isinstance(weight, fx.Node) else None
        if root is None or root.target is operations.prune_weight:
            continue
        if evidence.stored(cast(fx.Node, weight)) is None:
            return f"the weight of {linear.name} is computed in the graph, given by the caller, or written"
        seen = [root, *(user for user in root.users if views.is_view(user))]
        uses = {user for node in seen for user in node.users if not views.is_view(user)}
        # A pruned copy of the same weight belongs to a part of the same fused linear, or is evidence.
        uses = {user for user in uses if user.target is not operations.prune_weight}
        if len(uses) > 1:
            return f"a weight of {linear.name} is used twice (tied): the heads may be alive in its other use"
    return ""


def block(region: Region, node: fx.Node | None = None) -> int:
    """How many channels go together: the size of a head, or 1. node: by default the consumer's input."""
    node = cast(fx.Node, region.consumer.args[0]) if node is None else node
    dim = region.inside[node]
    if is_source(node, dim):
        return 1
    made = channels.edges(node, dim) or ()
    inner = [edge.block(block(region, edge.source)) for edge in made if _decides(region, node, edge)]
    return math.lcm(*inner)


def _decides(region: Region, node: fx.Node, edge: channels.Edge) -> bool:
    return edge.source in region.inside and (node.target is not ops.attention or edge.source is node.args[0])
