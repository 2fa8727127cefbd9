"""Remove input channels of a linear: from its weight and from everything that is computed only for them.

    y = graphopt.linear(x, w)        # of x only some channels are to be kept
becomes
    y = graphopt.linear(x', graphopt.prune_weight(w, "", "0:64,128:192", False, ...))

where x' is x without the other channels, made from smaller weights by the same operations.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, cast

import torch
from torch import fx

from graphopt import _compat, edit, ops, views
from graphopt.pruning import channels, heads, operations, region
from graphopt.pruning.evidence import Evidence
from graphopt.pruning.evidence import conditions as conditions_of
from graphopt.pruning.lines import numbers, spell

aten = torch.ops.aten

Dead = Mapping[int, tuple[Evidence, ...]]
"""Channels to remove, each with what shows that it is dead (nothing, if the user gave it up)."""

Conditions = Sequence[tuple[fx.Node, str]]
"""Weights, and what must hold of each, as `prune_weight` wants it."""


def kept_channels(part: region.Region, dead: Collection[int], alike: bool = False) -> list[int]:
    """The channels of a consumer's input that stay: whole heads, as many as attention needs; never none.

    alike: keep what graphs with and without a cache can do without, so that both compute the same.
    """
    x = cast(fx.Node, part.consumer.args[0])
    count = channels.extent(x, x.meta["val"].dim() - 1) or 0
    size = region.block(part)
    every = range(count // size)
    gone = {block for block in every if all(block * size + channel in dead for channel in range(size))}
    attention = part.attention
    if attention is None:
        kept = [block for block in every if block not in gone] or [0]
    else:
        if channels.extent(attention, 1) != len(every):
            return list(range(count))
        group = channels.heads_per_group(attention)
        kept = heads.settle(gone, len(every), group, alike or not _owns_cache(part, attention))
    return [channel for block in kept for channel in range(block * size, (block + 1) * size)]


def remove(
    graph_module: fx.GraphModule,
    part: region.Region,
    dead: Dead,
    conditions: Conditions = (),
    *,
    alike: bool = False,
) -> int:
    """Rewrite the consumer of a region without the dead channels; returns how many rewrites it made.

    conditions: what the removal rests on besides the evidence of the dead channels.
    """
    consumer = part.consumer
    kept = kept_channels(part, dead, alike)
    x, weight, *bias = cast(tuple[Any, ...], consumer.args)
    dim = x.meta["val"].dim() - 1
    count = channels.extent(x, dim) or 0
    if len(kept) == count:
        return 0
    rewrites = _separate_parts(graph_module, part)
    gone = set(range(count)).difference(kept)
    with edit.rewriting(graph_module, consumer) as rewrite:
        reduction = Reduction(rewrite, part)
        proofs = [proof for channel in sorted(gone) for proof in dead.get(channel, ())]
        less = reduction.of(x, dim, tuple(kept))
        rests_on = [*conditions_of(proofs), *conditions]
        smaller = reduction.weight(weight, columns=kept, conditions=rests_on)
        rewrite.replace(consumer, rewrite.call(ops.linear, less, smaller, *bias))
    edit.erase_unused(consumer)
    return rewrites + rewrite.applied


def _owns_cache(part: region.Region, attention: fx.Node) -> bool:
    """Whether keys and values are made for this attention alone, so that their heads may go."""
    return all(operand in part.inside for operand in cast(tuple[fx.Node, ...], attention.args)[1:3])


def _separate_parts(graph_module: fx.GraphModule, part: region.Region) -> int:
    """Give the parts of a fused linear that stay whole (keys and values of a cache) linears of their own."""
    count = 0
    for linear in part.sources:
        waiting = [user for seen in (linear, *linear.users) for user in seen.users if channels.piece(user) is not None]
        for user in waiting:
            found = channels.piece(user)
            if user in part.inside or found is None or found[0] is not linear or not user.users:
                continue
            _, first, width = found
            with edit.rewriting(graph_module, linear) as rewrite:
                reduction = Reduction(rewrite, part)
                new = reduction.of(linear, linear.meta["val"].dim() - 1, tuple(range(first, first + width)))
                changed = views.consequences(graph_module, user, new.meta["val"])
                if isinstance(changed, str):
                    raise RuntimeError(changed)
                rewrite.replace(user, new, same_layout=False)
                if rewrite.permitted:
                    for later, value in changed.items():
                        later.meta["val"] = value
            count += rewrite.applied
    return count


class Reduction:
    """New nodes for the nodes of a region, of which only some channels are kept."""

    def __init__(self, rewrite: edit.Rewrite, part: region.Region, conditions: Conditions = ()) -> None:
        self.rewrite = rewrite
        self.part = part
        self.conditions = conditions
        self.made: dict[tuple[fx.Node, int, tuple[int, ...]], fx.Node] = {}

    def of(self, node: fx.Node, dim: int, kept: tuple[int, ...]) -> fx.Node:
        """The node with the channels `kept` along `dim` alone."""
        if kept == tuple(range(channels.extent(node, dim) or 0)):
            return node
        key = node, dim, kept
        if key not in self.made:
            self.made[key] = self._make(node, dim, kept)
        return self.made[key]

    def _make(self, node: fx.Node, dim: int, kept: tuple[int, ...]) -> fx.Node:
        if node not in self.part.inside:
            return self._cut(node, dim, kept)
        if node.op == "placeholder":
            return cast(fx.Node, self.weight(node, rows=kept, conditions=self.conditions))
        if node.target is ops.linear and region.is_source(node, dim):
            x, *weights = cast(tuple[Any, ...], node.args)
            return self.rewrite.call(ops.linear, x, *(self.weight(weight, rows=kept) for weight in weights))
        if region.is_source(node, dim):
            table, *rest = cast(tuple[Any, ...], node.args)
            return self.rewrite.call(aten.embedding.default, self.weight(table, columns=kept), *rest, **node.kwargs)
        if node.target is ops.attention:
            return self._attention(node, kept)
        made = channels.edges(node, dim) or []
        less = {edge.source: self.of(edge.source, edge.dim, tuple(edge.needed(kept))) for edge in made}
        if channels.piece(node) is not None and dim == node.meta["val"].dim() - 1:
            return less[made[0].source]
        if made and made[0].source not in node.all_input_nodes:  # a result of layer norm
            norm, index = cast(tuple[Any, ...], node.args)
            smaller = self.rewrite.call(norm.target, less[norm.args[0]], *norm.args[1:])
            return self.rewrite.call(cast(Any, node.target), smaller, index)
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda operand: less.get(operand, operand))
        return self.rewrite.call(cast(Any, node.target), *_resized(node, args, dim, len(kept)), **kwargs)

    def _cut(self, node: fx.Node, dim: int, kept: Sequence[int]) -> fx.Node:
        """Some channels of a value that exists as a whole: a view if they are neighbours, else a copy."""
        if kept[-1] - kept[0] + 1 == len(kept):
            return self.rewrite.call(aten.slice.Tensor, node, dim, kept[0], kept[-1] + 1)
        with _compat.without_modes():
            index = torch.tensor(kept, device=node.meta["val"].device)
        # Not index_select: Inductor knows that only as what it decomposes into this.
        return self.rewrite.call(aten.index.Tensor, node, [*[None] * dim, self.rewrite.constant(index)])

    def _attention(self, node: fx.Node, kept: tuple[int, ...]) -> fx.Node:
        q, k, v, mask = (*cast(tuple[Any, ...], node.args), None)[:4]
        group = channels.heads_per_group(node)
        counts = [sum(head // group == number for head in kept) for number in range(k.meta["val"].shape[1])]
        if _owns_cache(self.part, node):
            living = tuple(number for number, count in enumerate(counts) if count)
            k, v, counts = self.of(k, 1, living), self.of(v, 1, living), [count for count in counts if count]
        operands = [self.of(q, 1, kept), k, v, mask]
        for edge in (channels.edges(node, 1) or [])[3:]:
            operands[3] = self.of(mask, edge.dim, kept)
        pieces = heads.pieces(counts)
        if len(pieces) == 1 and pieces[0].count == len(counts):
            return self.rewrite.call(ops.attention, *operands, **node.kwargs)
        cut = operands[3] is not mask
        results = [self._piece(node, piece, operands, cut) for piece in pieces]
        joined = results[0] if len(results) == 1 else self.rewrite.call(aten.cat.default, results, 2)
        return self.rewrite.call(aten.permute.default, joined, [0, 2, 1, 3])

    def _piece(self, node: fx.Node, piece: heads.Piece, operands: Sequence[Any], cut_mask: bool) -> fx.Node:
        """Attention of one piece, laid out [B, S, H, D]."""
        queries = tuple(range(piece.query, piece.query + piece.count * piece.group))
        keys = tuple(range(piece.first, piece.first + piece.count))
        q, k, v, mask = operands
        parts = [self._cut(q, 1, queries), self._cut(k, 1, keys), self._cut(v, 1, keys)]
        parts.append(self._cut(mask, mask.meta["val"].dim() - 3, queries) if cut_mask else mask)
        made = self.rewrite.call(ops.attention, *parts, **node.kwargs)
        return self.rewrite.call(aten.permute.default, made, [0, 2, 1, 3])

    def weight(
        self,
        weight: fx.Node | None,
        *,
        rows: Sequence[int] | None = None,
        columns: Sequence[int] | None = None,
        conditions: Conditions = (),
    ) -> fx.Node | None:
        """A weight or bias of which some rows or columns are kept; of a pruned one, some of those it has."""
        if weight is None:
            return None
        root = views.root(weight)
        if root.target is operations.prune_weight:
            root, *given = cast(tuple[Any, ...], root.args)
            before: list[str] = given[:2]
            transposed, facts, which = given[2:]
        else:
            before, facts, which = ["", ""], [], []
            transposed = weight is not root
        spelled = [_selected(old, new) for old, new in zip(before, (rows, columns), strict=True)]
        facts, which = [*facts, *(fact for fact, _ in conditions)], [*which, *(text for _, text in conditions)]
        made = self.rewrite.call(operations.prune_weight, root, *spelled, transposed, facts, which)
        made.meta["role"], made.meta["source"] = root.meta.get("role"), root.meta.get("source", "")
        return made


def _selected(before: str, kept: Sequence[int] | None) -> str:
    if kept is None:
        return before
    return spell([numbers(before)[index] for index in kept] if before else kept)


def _resized(node: fx.Node, args: Sequence[Any], dim: int, size: int) -> list[Any]:
    """The arguments of a node whose result has another size along `dim`."""
    if node.target not in (aten.view.default, aten.expand.default):
        return list(args)
    sizes = list(args[1])
    if sizes[dim] != -1:
        sizes[dim] = size
    return [args[0], sizes]
