"""Leave out the least important heads and FFN channels, for a share that is to be kept.

Only with `options={"prune_heads": graphopt.PruneHeads(keep=..., ...)}`. All layers of a graph share one budget. Which
heads go depends on the options (and for "norm" on the weights when the graph is compiled), never on the input.
"""

from __future__ import annotations

from typing import cast

from torch import fx

from graphopt import _compat, capture, edit, ops
from graphopt.pipeline import graph_pass
from graphopt.prune_options import PruneHeads
from graphopt.pruning import evidence, lines, region, removal, selection
from graphopt.quantization.names import weight_name

MOST = PruneHeads(keep=0.9, choice="norm")


@graph_pass(exactness="lossy", stage="prune", training=False, before="prune")
def prune_by_importance(graph_module: fx.GraphModule, *, prune: PruneHeads = MOST) -> int:
    """Remove heads until `prune.keep`, and FFN channels until `prune.keep_channels` of them are left."""
    count = 0
    for keep, wants_heads in ((prune.keep, True), (prune.keep_channels, False)):
        if keep is None:
            continue
        found = _candidates(graph_module, wants_heads)
        candidates = [candidate for _, candidate in found]
        with _compat.without_modes():
            chosen = selection.give_up(candidates, keep, prune)
            if isinstance(chosen, str):
                edit.refuse(graph_module.graph.output_node(), chosen)
                continue
            if candidates:
                what = "heads" if wants_heads else "channels"
                edit.note(f"{what}: {selection.comparison(candidates, chosen, keep, prune)}")
        for (linear, candidate), gone in zip(found, chosen, strict=True):
            count += _remove(graph_module, linear, candidate, gone)
    return count


def _candidates(graph_module: fx.GraphModule, wants_heads: bool) -> list[tuple[fx.Node, selection.Candidate]]:
    """The linears whose input is made of heads, or of FFN channels, each with its weight as it is."""
    found = []
    for node in graph_module.graph.nodes:
        weight = evidence.stored(cast(fx.Node, node.args[1])) if node.target is ops.linear else None
        part = region.explore(node) if weight is not None else ""
        if weight is None or isinstance(part, str) or (part.attention is not None) != wants_heads:
            continue
        tensor = capture.weight_tensor(weight[0])
        if tensor is not None and lines.can_be_read(tensor):
            name = weight_name(weight[0].meta.get("source", ""))
            turned = tensor.t() if weight[1] else tensor
            found.append((node, selection.Candidate(name, turned, region.block(part))))
    return found


def _remove(graph_module: fx.GraphModule, linear: fx.Node, candidate: selection.Candidate, gone: list[int]) -> int:
    part = region.explore(linear)
    if not gone or isinstance(part, str):
        return 0
    size = candidate.size
    given_up = {head * size + channel: () for head in gone for channel in range(size)}
    return removal.remove(graph_module, part, given_up, alike=True)
