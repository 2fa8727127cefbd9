"""Set two of each four neighbouring weights to zero, where GPUs then multiply in half the operations.

    y = graphopt.linear(x, weight, bias)
becomes
    y = graphopt.linear(x, graphopt.sparsify_weight(weight, "magnitude", "", False), bias)
and, on a GPU with kernels for it,
    y = graphopt.sparse_linear(x, graphopt.compress_weight(graphopt.sparsify_weight(...)), bias)

Only with `options={"prune": "2:4"}` or `graphopt.Sparsify(...)`. The weights are made at the first call, and again when
one has changed. On a CPU nothing is gained; the report says so for each weight.
"""

from __future__ import annotations

import operator
from typing import Any, cast

import torch
from torch import fx

from graphopt import edit, ops, views
from graphopt.pipeline import graph_pass
from graphopt.prune_options import Sparsify
from graphopt.pruning import evidence, operations, sparsity
from graphopt.quantization import rounding
from graphopt.quantization.calibration import Calibration
from graphopt.quantization.names import weight_name

aten = torch.ops.aten
MAGNITUDE = Sparsify()


@graph_pass(exactness="lossy", stage="prune", training=False)
def sparsify_linears(graph_module: fx.GraphModule, *, sparsify: Sparsify = MAGNITUDE) -> int:
    """Make the weights of linears 2:4 sparse where the options ask for it."""
    count = 0
    for node in list(graph_module.graph.nodes):
        if node.target is not ops.linear or _is_sparse(node):
            continue
        root = views.root(cast(fx.Node, node.args[1]))
        name = weight_name(root.meta.get("source", ""))
        reason = sparsify.why_not(name) or _why_not(node) or _why_unseen(sparsify, name)
        if reason:
            edit.refuse(node, f"{name}: {reason}" if name else reason)
        else:
            count += _rewrite(graph_module, node, sparsify, name)
    return count


def _is_sparse(linear: fx.Node) -> bool:
    return cast(fx.Node, linear.args[1]).target is sparsity.sparsify_weight


def _why_not(linear: fx.Node) -> str:
    weight = cast(fx.Node, linear.args[1])
    root, value = views.root(weight), weight.meta["val"]
    if root.target is not operations.prune_weight and evidence.stored(weight) is None:
        return "the weight is computed in the graph, given by the caller, or written"
    if not value.dtype.is_floating_point or value.element_size() < 2:
        return f"the weight is kept in {value.dtype}"
    if value.shape[1] % sparsity.GROUP:
        return f"its {value.shape[1]} columns do not divide into fours"
    # A pruned weight stands for its parameter, which may be looked up in all the same.
    stored = cast(fx.Node, root.args[0]) if root.target is operations.prune_weight else root
    readers = [user for seen in (stored, *stored.users) for user in seen.users]
    if any(user.target is aten.embedding.default for user in readers):
        return "it is a table that is looked up in as well (tied)"
    return ""


def _why_unseen(sparsify: Sparsify, name: str) -> str:
    known = sparsify.calibration
    if sparsify.choice == "wanda" and not (isinstance(known, Calibration) and known.find(name) is not None):
        return "the calibration has not seen it"
    return ""


def _rewrite(graph_module: fx.GraphModule, linear: fx.Node, sparsify: Sparsify, name: str) -> int:
    x, weight, *bias = cast(tuple[Any, ...], linear.args)
    root = views.root(weight)
    method, columns = "magnitude", ""
    if isinstance(sparsify.calibration, Calibration) and sparsify.choice == "wanda":
        method = rounding.spell("wanda", sparsify.calibration, name)
        columns = cast(str, root.args[2]) if root.target is operations.prune_weight else ""
    dense = sparsity.why_dense(weight)
    if dense:
        edit.refuse(linear, f"{name}: {dense}")
    with edit.rewriting(graph_module, linear) as rewrite:
        sparse = rewrite.call(sparsity.sparsify_weight, root, method, columns, weight is not root)
        sparse.meta["role"], sparse.meta["source"] = root.meta.get("role"), root.meta.get("source", "")
        if dense:
            rewrite.replace(linear, rewrite.call(ops.linear, x, sparse, *bias))
        else:
            packed = rewrite.call(sparsity.compress_weight, sparse)
            parts = [rewrite.call(operator.getitem, packed, index) for index in range(2)]
            rewrite.replace(linear, rewrite.call(sparsity.sparse_linear, x, parts, *(bias or [None])))
    return rewrite.applied
