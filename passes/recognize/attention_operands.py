"""Where the operands of an attention come from: keys and values before repetition, masks before conversion."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from graphopt import shapes, views
from graphopt.match import paths

aten = torch.ops.aten


def ungrouped(k: fx.Node, v: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Keys and values [B, Hkv, T, D] before each head was repeated for a group of query heads, if both were."""
    k, v = laid_out_anyhow(k), laid_out_anyhow(v)
    fewer_k, fewer_v = _before_repetition(k), _before_repetition(v)
    if fewer_k is None or fewer_v is None:
        return k, v
    if not shapes.same(fewer_k.meta["val"].shape[1], fewer_v.meta["val"].shape[1]):
        return k, v
    return laid_out_anyhow(fewer_k), laid_out_anyhow(fewer_v)


def laid_out_anyhow(node: fx.Node) -> fx.Node:
    """The same values without the copies that only bring them into order: attention takes any strides."""
    node = views.original(node)
    while node.target is aten.clone.default:
        node = views.original(views.source(node))
    return node


def _before_repetition(node: fx.Node) -> fx.Node | None:
    """x [B, Hkv, T, D] of x[:, :, None].expand(B, Hkv, G, T, D).reshape(B, Hkv * G, T, D)."""
    nodes = [seen for seen in paths.walk(node).nodes if paths.kind(seen) != "copy"]
    if len(nodes) < 4 or [paths.kind(seen) for seen in nodes[:3]] != ["reshape", "expand", "reshape"]:
        return None
    flat, repeated, single, x = nodes[0], nodes[1], nodes[2], views.source(nodes[2])
    sizes = paths.sizes(x)
    if len(sizes) != 4 or paths.sizes(single) != (*sizes[:2], 1, *sizes[2:]):
        return None
    groups = paths.sizes(repeated)[2]
    if paths.sizes(repeated) != (*sizes[:2], groups, *sizes[2:]):
        return None
    return x if paths.sizes(flat) == (sizes[0], sizes[1] * groups, *sizes[2:]) else None


def simplest_mask(mask: fx.Node | None) -> fx.Node | None:
    """The boolean mask that an additive one of 0 and -inf was made from, if it broadcasts alike."""
    if mask is None:
        return None
    path = paths.walk(mask)
    if path.casts or any(kind != "expand" for kind, *_ in path.layout):
        return mask
    base = path.base
    if base.target is not aten.where.self or (_constant(base.args[1]), _constant(base.args[2])) != (0.0, -math.inf):
        return mask
    condition: Any = base.args[0]
    same = shapes.same_shape(condition.meta["val"], base.meta["val"])
    return condition if same and condition.meta["val"].dim() == mask.meta["val"].dim() else mask


def _constant(value: Any) -> float | None:
    """The number that fills a tensor, if the graph says so."""
    if not isinstance(value, fx.Node):
        return float(value) if isinstance(value, (int, float)) else None
    base = paths.walk(value).base
    if base.target is aten.full.default and isinstance(base.args[1], (int, float)):
        return float(base.args[1])
    if base.target is aten.scalar_tensor.default and isinstance(base.args[0], (int, float)):
        return float(base.args[0])
    return None
