"""Leave out whole layers of a model: what follows reads what they were given.

    h1 = layer(h0);  y = next_layer(h1)
becomes
    y = next_layer(h0)

Only with `options={"prune": graphopt.PruneLayers(...)}`. It runs first, where each operation still knows the module it
comes from. Keys and values that the layer writes into a cache are computed all the same: the cache keeps its shape.
"""

from __future__ import annotations

from torch import fx

from graphopt import edit
from graphopt.pipeline import graph_pass
from graphopt.prune_options import PruneLayers
from graphopt.pruning import layers


@graph_pass(exactness="lossy", stage="prune", training=False, before="canonicalize")
def drop_layers(graph_module: fx.GraphModule, *, names: tuple[str, ...] = ()) -> int:
    """Hand on what the named layers ("model.layers.3") were given."""
    count = 0
    for name in names:
        found = layers.ends(graph_module.graph, name)
        if isinstance(found, str):
            edit.refuse(graph_module.graph.output_node(), f"{name}: {found}")
            continue
        given, results = found
        for result in results:
            with edit.rewriting(graph_module, result) as rewrite:
                rewrite.replace(result, given)
            count += rewrite.applied
    return count


def names_of(prune: PruneLayers) -> tuple[str, ...]:
    """The layers that the options name, or their calibration finds least important."""
    if isinstance(prune.calibration, layers.LayerImportance) and prune.keep is not None:
        return prune.calibration.least(prune.keep)
    return prune.drop
