"""At which places of a mask the nodes that it is made of are read: of the batch, the head, the query, the key."""

from __future__ import annotations

import sympy
from torch.fx import Node

from graphopt.index_arithmetic import size_expression
from graphopt.index_map import VIEWS, Index, broadcast_index, operand_index
from graphopt.row_ops import ELEMENTWISE

PLACES = tuple(sympy.Symbol(name, integer=True, nonnegative=True) for name in ("batch", "head", "query", "key"))
QUERY, KEY = PLACES[2:]


def places(mask: Node) -> dict[Node, frozenset[sympy.Symbol]]:
    """For each node that a mask [.., S, T] is made of: on which of `PLACES` its elements depend where they are read."""
    found: dict[Node, frozenset[sympy.Symbol]] = {}
    names = PLACES[-len(_shape(mask)) or 4 :]
    index = tuple(n if s != 1 else sympy.Integer(0) for n, s in zip(names, _shape(mask), strict=True))
    ranges = dict(zip(names, _shape(mask), strict=True))
    stack: list[tuple[Node, Index | None, frozenset[sympy.Symbol]]] = [(mask, index, frozenset())]
    while stack:
        node, place, uses = stack.pop()
        if place is not None:
            uses = frozenset().union(*(i.free_symbols for i in place)) & set(names) if place else frozenset()
        known = found.get(node, frozenset())
        if node in found and uses <= known:
            continue
        found[node] = known | uses
        for source in node.all_input_nodes:
            inner: Index | None = None
            if place is not None and hasattr(source.meta.get("val"), "shape"):
                if node.target in VIEWS:
                    inner = operand_index(node, place, _shape(node), _shape(source), ranges)
                elif node.target in ELEMENTWISE:
                    inner = broadcast_index(place, _shape(source))
            stack.append((source, inner, uses))
    return found


def _shape(node: Node) -> Index:
    return tuple(size_expression(size) for size in node.meta["val"].shape)
