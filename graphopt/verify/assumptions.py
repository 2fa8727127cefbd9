"""Inputs under which a rewrite claims to hold: a removal holds for weights that are zero, or minus infinity, there."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from graphopt.pruning import lines, operations

# Attention multiplies an error in the scores by their size: with larger values every order of a sum looks wrong.
_LARGEST = 8.0
_VALUES = {"zero": 0.0, "minus_inf": -math.inf}


def stated(after: fx.GraphModule) -> list[tuple[fx.Node, int, list[int], float]]:
    """What the new nodes rest on: (placeholder, dim, indices, value) of elements that must have that value."""
    found = []
    for node in after.graph.nodes:
        if node.target is operations.prune_weight:
            for weight, spelled in zip(*node.args[4:6], strict=True):
                kind, *rest = spelled.split(" ")
                if kind in _VALUES:
                    found.append((weight, int(rest[0]), lines.numbers(rest[1]), _VALUES[kind]))
    return found


def satisfied(after: fx.GraphModule, values: list[Any]) -> list[Any] | None:
    """The values with what the new nodes rest on; None if some are not finite or large."""
    needed = stated(after)
    if not needed:
        return values
    floats = [value for value in values if isinstance(value, torch.Tensor) and value.is_floating_point()]
    if not all(bool((value.abs() <= _LARGEST).all()) for value in floats):
        return None
    placeholders = [node for node in after.graph.nodes if node.op == "placeholder"]
    changed = list(values)
    for weight, dim, which, value in needed:
        if weight in placeholders:
            position = placeholders.index(weight)
            changed[position] = changed[position].clone().index_fill_(dim, torch.tensor(which), value)
    return changed


def hold(after: fx.GraphModule, values: list[Any]) -> bool:
    """Whether the values have already what the new nodes rest on."""
    needed = satisfied(after, values)
    return needed is not None and all(a is b or torch.equal(a, b) for a, b in zip(needed, values, strict=True))
