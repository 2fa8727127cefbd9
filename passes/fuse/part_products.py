"""Make a product of its own of each part of a product's columns, where a part is new rows of a cache (GPT-2).

    y = addmm(b, x, w);  q, k, v = split(y, n, -1);  keys = kv_write(room, view(k), 2, S, S + 1)
becomes
    q, k, v = parallel_linear(x, [w.t()[:n], w.t()[n : 2 * n], w.t()[2 * n :]], [b[:n], b[n : 2 * n], b[2 * n :]])

The weights are views, and one launch computes all parts as before; but each part is stored by itself, so that the write
can end the product's kernel (`fuse/writes.py`) and no other reads the rows again.
"""

from __future__ import annotations

import itertools
import operator
from typing import Any

import torch
from torch import fx

from graphopt import edit, ops, shapes, views
from graphopt.index_inverse import base_of
from graphopt.index_map import RESHAPES
from graphopt.pipeline import graph_pass

aten = torch.ops.aten

_SPLITS = (aten.split.Tensor, aten.split_with_sizes.default)


@graph_pass(exactness="rounding", stage="fuse", training=False)
def part_products(graph_module: fx.GraphModule) -> int:
    """Replace products whose columns are split, and written into a cache, by one `graphopt.parallel_linear` each."""
    splits: dict[fx.Node, None] = {}
    for write in [node for node in graph_module.graph.nodes if node.target in ops.WRITES]:
        piece = base_of(write.args[1])
        split = piece.args[0] if piece.target is operator.getitem else None
        if isinstance(split, fx.Node) and split.target in _SPLITS:
            splits[split] = None
    return sum(map(_part, itertools.repeat(graph_module), splits))


def _part(graph_module: fx.GraphModule, split: fx.Node) -> int:
    pieces: dict[Any, fx.Node] = {user.args[1]: user for user in split.users}
    product: Any = split.args[0]
    while isinstance(product, fx.Node) and product.target in RESHAPES and len(product.users) == 1:
        product = product.args[0]
    found = _operands(product)
    if found is None:
        return 0
    x, weight, bias, by_rows = found
    reason = _why_not(split, product, bias)
    if reason:
        edit.refuse(split, reason)
        return 0
    sizes = [value.shape[-1] for value in split.meta["val"]]
    ends = list(itertools.accumulate(sizes))
    with edit.rewriting(graph_module, split) as rewrite:
        rows = weight if by_rows else rewrite.call(aten.permute.default, weight, [1, 0])
        bounds = [(end - size, end) for size, end in zip(sizes, ends, strict=True)]
        weights = [rewrite.call(aten.slice.Tensor, rows, 0, *bound) for bound in bounds]
        biases = [None if bias is None else rewrite.call(aten.slice.Tensor, bias, 0, *bound) for bound in bounds]
        made = rewrite.call(ops.parallel_linear, x, weights, biases)
        changed: dict[fx.Node, Any] = {}
        parts: list[tuple[fx.Node, fx.Node]] = []
        for place, piece in pieces.items():
            part = rewrite.call(operator.getitem, made, place)
            parts.append((piece, rewrite.call(aten.view.default, part, list(piece.meta["val"].shape))))
            later = views.consequences(graph_module, piece, parts[-1][1].meta["val"])
            if isinstance(later, str) or any(user.op == "output" for node in (piece, *later) for user in node.users):
                edit.refuse(split, "the caller, or a view, sees the strides of a part")
                changed, parts = {}, []
                break
            changed |= later
        for piece, shown in parts:
            rewrite.replace(piece, shown, same_layout=False)
        if rewrite.permitted:
            for node, value in changed.items():
                node.meta["val"] = value
    return rewrite.applied


def _operands(product: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node | None, bool] | None:
    """Rows, weight and bias of a product, and whether the weight's rows are its columns."""
    args: Any = product.args
    if product.target is ops.linear:
        return args[0], args[1], args[2] if len(args) > 2 else None, True
    if product.target is aten.mm.default:
        return args[0], args[1], None, False
    if product.target is aten.addmm.default and not product.kwargs:
        return args[1], args[2], args[0], False
    return None


def _why_not(split: fx.Node, product: fx.Node, bias: fx.Node | None) -> str:
    value = product.meta["val"]
    whole: Any = split.args[0]
    dim = split.args[2] if len(split.args) > 2 else 0
    if dim not in (-1, whole.meta["val"].dim() - 1) or not shapes.same(whole.meta["val"].shape[-1], value.shape[-1]):
        return "it splits something else than the product's columns"
    if len(product.users) != 1 or len(whole.users) != 1:
        return "the whole product is read as well"
    if not all(isinstance(part.shape[-1], int) for part in split.meta["val"]):
        return "the number of columns is symbolic"
    if bias is not None and list(bias.meta["val"].shape) != [value.shape[-1]]:
        return "its bias is not one number for each column"
    return ""
