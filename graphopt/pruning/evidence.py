"""What the elements of weights say about a value: lines that are zero, or minus infinity, now."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import fx

from graphopt import _compat, capture, views
from graphopt.pruning import channels, lines

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class Evidence:
    """The elements of a weight at `index` along `dim` are all `value`: see `lines.hold`."""

    weight: fx.Node
    dim: int
    index: int
    value: str = "zero"


Known = dict[int, tuple[Evidence, ...]]
"""For each channel of which something is known the elements it rests on."""


def of_lines(weight: fx.Node, dim: int, value: str = "zero") -> Known:
    """The lines of a weight along `dim` that hold the value now, if they can be read and the graph leaves them."""
    found = stored(weight)
    if found is None:
        return {}
    placeholder, transposed = found
    own = 1 - dim if transposed else dim
    tensor = capture.weight_tensor(placeholder)
    if not lines.can_be_read(tensor) or tensor is None or tensor.shape != placeholder.meta["val"].shape:
        return {}
    with _compat.without_modes(), torch.no_grad():
        known = lines.LINES[value](tensor, own)
    return {line: (Evidence(placeholder, own, line, value),) for line in known}


def carried(node: fx.Node, dim: int, edge: channels.Edge, known_of: Callable[[fx.Node, int], Known]) -> Known:
    """The channels of a node all of whose elements come from channels of the edge's source that are known."""
    known = known_of(edge.source, edge.dim)
    found: Known = {}
    for channel in range(channels.extent(node, dim) or 0) if known else ():
        needed = edge.needed([channel])
        if needed and all(part in known for part in needed):
            found[channel] = tuple(proof for part in needed for proof in known[part])
    return found


def stored(weight: fx.Node) -> tuple[fx.Node, bool] | None:
    """The parameter that a node is or is the transpose of, and which; None for other nodes and for written ones."""
    placeholder = views.root(weight)
    transposed = weight.target is aten.permute.default and weight.args == (placeholder, [1, 0])
    if placeholder.op != "placeholder" or not views.is_constant_input(weight):
        return None
    if (weight is not placeholder and not transposed) or any(map(views.may_write, placeholder.users)):
        return None
    return placeholder, transposed


def conditions(found: list[Evidence]) -> list[tuple[fx.Node, str]]:
    """Weights, and what must hold of each, as `prune_weight` wants it: one for each weight, dimension and value."""
    joined: dict[tuple[fx.Node, int, str], set[int]] = {}
    for proof in found:
        joined.setdefault((proof.weight, proof.dim, proof.value), set()).add(proof.index)
    return [(weight, f"{value} {dim} {lines.spell(sorted(known))}") for (weight, dim, value), known in joined.items()]
