"""Drop copies that undo each other's layout.

    a = permute(y, [0, 2, 1, 3]);  b = clone(a);  c = permute(b, [0, 2, 1, 3]);  d = clone(c)
becomes, when `d` lies in memory as `permute(permute(y))` does
    d = y

The pass looks at every copy of a copy: if the views between them, applied to what the first copy was made from,
lie in memory as the second copy does, both copies are superfluous.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import fx
from torch._ops import OpOverload

from graphopt import edit, shapes, views
from graphopt.match import paths
from graphopt.pipeline import graph_pass

aten = torch.ops.aten


@graph_pass(exactness="bitwise", stage="recognize")
def drop_relayouts(graph_module: fx.GraphModule) -> int:
    """Replace a copy of a rearranged copy by views of the original, where those lie in memory alike."""
    exposure = views.Exposure(graph_module.graph)
    count = 0
    for node in list(graph_module.graph.nodes):
        if node.target is aten.clone.default and node.users:
            count += _drop(graph_module, node, exposure)
    return count


def _drop(graph_module: fx.GraphModule, node: fx.Node, exposure: views.Exposure) -> int:
    path = paths.walk(node).nodes
    copies = [index for index, seen in enumerate(path) if seen.target is aten.clone.default]
    if len(copies) < 2:
        return 0
    last = copies[1]
    with edit.rewriting(graph_module, node) as rewrite:
        new = path[last + 1]
        for seen in reversed(path[1:last]):
            if not views.is_view(seen) or seen.target is aten.view.default:
                return 0  # a view may not exist on the other layout
            new = rewrite.call(cast(OpOverload, seen.target), new, *seen.args[1:], **seen.kwargs)
        same = views.original(new)
        if not shapes.difference(node.meta["val"], new.meta["val"]) and exposure.may_become(node, same):
            rewrite.replace(node, same)
            exposure.became(node, same)
    return rewrite.applied
