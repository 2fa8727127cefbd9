"""Look rows up in a packed table instead of the full-precision one.

    rows = embedding(table, indices)
becomes
    packed = graphopt.quantize_weight(table, "int8-g64")
    rows = graphopt.quantized_embedding(indices, [packed[0], packed[1]], 64, bfloat16, "int8-g64")

Only with `Quantize(embeddings=True)`: a look-up reads few bytes anyway, so that this saves memory, not time. A table
that is also the weight of a quantised linear (tied) takes that linear's scheme, and both read one pack.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from graphopt import edit, views
from graphopt.passes.quantize import packable, planned
from graphopt.pipeline import graph_pass
from graphopt.quantization import operations, plan, schemes
from graphopt.quantize_options import Quantize

aten = torch.ops.aten
INT8 = Quantize("int8", embeddings=True)


@graph_pass(exactness="lossy", stage="quantize", training=False, after="quantize_linears")
def quantize_embeddings(graph_module: fx.GraphModule, *, quantize: Quantize = INT8) -> int:
    """Replace look-ups in weights by `graphopt.quantized_embedding` where the options ask for it."""
    count = 0
    for node in list(graph_module.graph.nodes):
        if node.target is not aten.embedding.default or not quantize.embeddings:
            continue
        table, indices, *_ = planned.arguments(node)
        name = planned.name_of(table)
        scheme, reason = _tied_scheme(table) or plan.choose(quantize, name, False, dict(quantize.assigned))
        reason = reason or _why_not(table, scheme)
        if scheme is None or reason:
            edit.refuse(node, f"{name}: {reason}" if name else reason)
            continue
        value = node.meta["val"]
        with edit.rewriting(graph_module, node) as rewrite:
            packed = rewrite.call(operations.quantize_weight, table, scheme.name, None)
            parts = [rewrite.call(operator.getitem, packed, index) for index in range(scheme.parts)]
            rows = rewrite.call(
                operations.quantized_embedding, indices, parts, value.shape[-1], value.dtype, scheme.name
            )
            rewrite.replace(node, rows)
        count += rewrite.applied
    return count


def _tied_scheme(table: fx.Node) -> tuple[schemes.Scheme, str] | None:
    """The scheme in which a linear reads the same table, if one does and its pack is the plain one."""
    for user in table.users:
        plain = user.target is operations.quantize_weight and len(user.args) > 2 and user.args[2] is None
        if plain and not user.kwargs:
            return schemes.named(planned.arguments(user)[1]), ""
    return None


def _why_not(table: fx.Node, scheme: schemes.Scheme | None) -> str:
    if table.meta["val"].dim() != 2 or table is not views.root(table):
        return "the table is not a parameter [V, D] as it is kept"
    return packable.why_not(table, scheme)
