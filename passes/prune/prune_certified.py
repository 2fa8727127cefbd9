"""Leave out heads that can change the output of attention by no more than a given error, whatever the input.

Only with `options={"prune_heads": graphopt.PruneHeads(max_error=...)}`. In each layer as many heads go as the bound of
`graphopt.pruning.bounds` allows. It is computed from the weights, and again when one of them has changed.
"""

from __future__ import annotations

import dataclasses

from torch import fx

from graphopt import _compat, edit, ops
from graphopt.pipeline import graph_pass
from graphopt.prune_options import PruneHeads
from graphopt.pruning import blocks, bounds, region, removal

SMALL = PruneHeads(max_error=1e-3)


@graph_pass(exactness="lossy", stage="prune", training=False, before="prune")
def prune_certified(graph_module: fx.GraphModule, *, prune: PruneHeads = SMALL) -> int:
    """Remove heads within `prune.max_error`."""
    count = 0
    for node in list(graph_module.graph.nodes):
        if node._erased or node.target is not ops.linear or prune.max_error is None:
            continue
        part = region.explore(node)
        if isinstance(part, str) or part.attention is None:
            continue
        found = blocks.certified_block(part, prune.max_error)
        if isinstance(found, str):
            edit.refuse(node, found)
        else:
            count += _remove(graph_module, part, *found)
    return count


def _remove(graph_module: fx.GraphModule, part: region.Region, block: bounds.Block, placeholders: list[fx.Node]) -> int:
    weights = blocks.tensors(placeholders)
    attention = part.attention
    if weights is None or attention is None:
        edit.refuse(part.consumer, "its weights are not at hand")
        return 0
    with _compat.without_modes():
        chosen = bounds.choose(block, weights, int(attention.meta["val"].shape[1]))
    if not chosen:
        edit.refuse(part.consumer, f"no head stays within max_error={block.limit}")
        return 0
    given_up = {head * block.size + channel: () for head in chosen for channel in range(block.size)}
    texts = [f"bound {dataclasses.replace(block, heads=chosen).spell()}", *["with"] * (len(placeholders) - 1)]
    conditions = list(zip(placeholders, texts, strict=True))
    return removal.remove(graph_module, part, given_up, conditions, alike=True)
