"""Leave out heads and channels whose contribution is zero, whatever the input.

    h = attention(linear(x, wq), ...);  y = linear(h, wo)      # wo multiplies the second head by zero
becomes the same with `graphopt.prune_weight(wq, "0:64", "", False, [], [])` in the place of wq and
`graphopt.prune_weight(wo, "", "0:64", False, [wo], ["zero 1 64:128"])` in that of wo.

A channel is dead if the weight that reads it is zero there, or if it is itself zero: a zero row of a value or up
projection, of a gate under an activation with f(0) = 0, or a gate's zero factor. The removal holds while the weights it
rests on are zero there: `prune_weight` looks again when one has changed. Activations must be finite (0 * inf is NaN).
"""

from __future__ import annotations

from typing import cast

from torch import fx

from graphopt import edit, ops, views
from graphopt.pipeline import graph_pass
from graphopt.pruning import liveness, operations, region, removal


@graph_pass(exactness="rounding", stage="prune", training=False)
def prune_dead(graph_module: fx.GraphModule) -> int:
    """Remove dead heads and channels from linears and from all that is computed only for them."""
    count = 0
    for node in list(graph_module.graph.nodes):
        if node._erased or node.target is not ops.linear or _is_pruned(node):
            continue
        x = cast(fx.Node, node.args[0])
        dead = liveness.zero_channels(x, x.meta["val"].dim() - 1) | liveness.zero_columns(node)
        if not dead:
            continue
        found = region.explore(node)
        if isinstance(found, str):
            edit.refuse(node, found)
        else:
            count += removal.remove(graph_module, found, dead)
    return count


def _is_pruned(linear: fx.Node) -> bool:
    """Whether input channels of the linear have been removed already."""
    weight = views.root(cast(fx.Node, linear.args[1]))
    return weight.target is operations.prune_weight and bool(weight.args[2])
