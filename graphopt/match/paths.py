"""What lies between two computations: the views, copies and casts that a value passes through.

Two spellings of one rearrangement (`reshape` or `view`, `x.float().transpose(...)` or the other way round, a copy or
none) have equal paths, so patterns need not be written once for each.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any, cast

import torch
from torch import fx

from graphopt import shapes, views

aten, prims = torch.ops.aten, torch.ops.prims

# One rearrangement: its kind and its arguments, sizes as sympy expressions.
Step = tuple[Any, ...]

_COPIES = (aten.clone.default, aten.alias.default, aten.detach.default)


@dataclasses.dataclass(frozen=True)
class Path:
    """How a value is seen: `base` computed it, `layout` rearranged it, `casts` changed its dtype.

    nodes: the nodes walked through, from the one asked about to the base, which is the last.
    """

    base: fx.Node
    layout: tuple[Step, ...]
    casts: tuple[torch.dtype, ...]
    nodes: tuple[fx.Node, ...]

    def describe(self) -> str:
        """For people: "cast to float32, permute (0, 2, 1)"."""
        parts = [f"cast to {str(dtype).removeprefix('torch.')}" for dtype in self.casts]
        parts += [f"{kind} {rest[0] if len(rest) == 1 else rest}" for kind, *rest in self.layout]
        return ", ".join(parts) or "nothing"


def walk(node: fx.Node, stop: Collection[fx.Node] = ()) -> Path:
    """The path to `node` from the nearest computation, input, or node of `stop`."""
    nodes = [node]
    while node not in stop and (kind(node) is not None):
        node = views.source(node)
        nodes.append(node)
    layout: list[Step] = []
    casts = []
    for seen in reversed(nodes[:-1]):
        if kind(seen) == "cast":
            casts.append(seen.meta["val"].dtype)
        elif kind(seen) != "copy" and not _is_whole(seen):
            _append(layout, _step(seen))
    if len(layout) == 1 and layout[0] == ("reshape", sizes(node)):
        layout = []
    return Path(node, tuple(layout), tuple(casts), tuple(nodes))


def kind(node: fx.Node) -> str | None:
    """What a node does to the value of its first argument: "reshape", "copy", "cast", ...; None if it computes."""
    target = node.target
    if target in _COPIES or _is_identity_product(node):
        return "copy"
    if target is prims.convert_element_type.default:
        return "copy" if node.meta["val"].dtype == views.source(node).meta["val"].dtype else "cast"
    if target in views.RESHAPES:
        return "reshape"
    return _KINDS.get(target)


_KINDS: dict[object, str] = {
    aten.permute.default: "permute",
    aten.expand.default: "expand",
    aten.slice.Tensor: "slice",
    aten.select.int: "select",
}


def sizes(node: fx.Node) -> tuple[Any, ...]:
    """The shape of a node's value as sympy expressions."""
    return tuple(map(shapes.expression, node.meta["val"].shape))


def _is_identity_product(node: fx.Node) -> bool:
    if node.target not in (aten.mul.Tensor, aten.div.Tensor) or isinstance(node.args[1], (fx.Node, bool)):
        return False
    source: Any = node.args[0]
    return bool(node.args[1] == 1) and node.meta["val"].dtype == source.meta["val"].dtype


def _is_whole(node: fx.Node) -> bool:
    """Whether an expand or a slice shows all of its input and no more."""
    return kind(node) in ("expand", "slice") and sizes(node) == sizes(views.source(node))


def _step(node: fx.Node) -> Step:
    rank = views.source(node).meta["val"].dim()
    name, arguments = kind(node), cast(tuple[Any, ...], node.args[1:])
    if name in ("reshape", "expand"):
        return name, sizes(node)
    if name == "permute":
        return name, tuple(dim % rank for dim in arguments[0])
    dim = arguments[0] % rank if arguments else 0
    if name == "select":
        return name, dim, _expression(arguments[1])
    return name, dim, *_bounds(node, sizes(views.source(node))[dim]), _expression((*arguments, 0, 0, 0, 1)[3])


def _bounds(node: fx.Node, size: Any) -> tuple[Any, Any]:
    """First and past-the-last row of a slice, as expressions."""
    _, _, start, end = (*node.args, 0, None, None)[:4] if len(node.args) < 4 else node.args[:4]
    low, high = _expression(start or 0), size if end is None else _expression(end)
    low = low + size if low.is_negative else low
    high = high + size if high.is_negative else high
    return low, size if (high - size).is_nonnegative or high == 2**63 - 1 else high


def _expression(argument: Any) -> Any:
    return shapes.expression(argument.meta["val"] if isinstance(argument, fx.Node) else argument)


def _append(layout: list[Step], step: Step) -> None:
    """Add a step; two reshapes in a row are the last one, two permutations are their product."""
    before = layout[-1] if layout else None
    if before is not None and step[0] == "reshape" == before[0]:
        layout[-1] = step
    elif before is not None and step[0] == "permute" == before[0]:
        composed = tuple(before[1][dim] for dim in step[1])
        layout[-1:] = [] if composed == tuple(range(len(composed))) else [("permute", composed)]
    else:
        layout.append(step)
