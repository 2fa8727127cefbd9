"""One fused region as its generator sees it: inputs, outputs, sizes, strides, and a key that equal regions share.

Symbolic sizes get kernel parameters of their own, `n0`, `n1` ... in the order they are met, so that two layers that
differ only in the names of their symbols give the same source and share one kernel. A size that is no product of
symbols (`s0 + 1`) is a parameter too: index arithmetic then only ever sees products of positive integers.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import sympy
import torch
from torch.fx import GraphModule, Node

from graphopt import cost, estimate
from graphopt.index_arithmetic import product, size_expression
from graphopt.index_inverse import rejoin
from graphopt.index_map import Index
from graphopt.ops import WRITES, kv_write_at


class Unsupported(Exception):
    """The region has no kernel; the message says why, for the report."""


def is_product(expression: sympy.Expr) -> bool:
    """Is it a product of symbols and an integer?"""
    return all(
        f.is_Integer or f.is_Symbol or (f.is_Pow and f.base.is_Symbol and f.exp.is_Integer and f.exp > 0)
        for f in sympy.Mul.make_args(expression)
    )


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a kernel stores an output: element i of it lies `offset` + i . strides elements behind the first of some
    memory.

    room: the placeholder that this memory is of; None where it is allocated for the output. Where along `dim` a row
    goes, `places` says, a tensor; None: to the place that its index is.
    """

    strides: Index
    offset: sympy.Expr = sympy.Integer(0)
    room: Node | None = None
    dim: int = 0
    places: Node | None = None


class Region:
    """A region's graph with sizes in kernel parameters.

    inputs: the tensor placeholders that it reads, in order; outputs: the nodes that it stores, for writes the new
    rows; places: where each of them goes; parameters: for every kernel parameter (`n0` ...) the expression, in the
    symbols of the whole graph, that the caller passes.
    """

    def __init__(self, graph_module: GraphModule) -> None:
        self.graph_module = graph_module
        self.parameters: dict[sympy.Symbol, sympy.Expr] = {}
        self._atoms: dict[sympy.Expr, sympy.Symbol] = {}
        placeholders = [n for n in graph_module.graph.nodes if n.op == "placeholder"]
        self.placeholders: list[Node] = placeholders
        self.inputs: list[Node] = [n for n in placeholders if isinstance(n.meta["val"], torch.Tensor) and _is_read(n)]
        returned = graph_module.graph.output_node().args[0]
        listed = returned if isinstance(returned, (tuple, list)) else (returned,)
        results = [n for n in listed if isinstance(n, Node)]
        if len(results) != len(listed):
            raise Unsupported("an output is not a node")
        self.outputs: list[Node] = [_stored(n) for n in results]
        for node in (*self.inputs, *self.outputs):
            self.sizes(node)
            self.strides(node)
        self.places: list[Place] = [self._place(n) for n in results]

    def size(self, value: Any) -> sympy.Expr:
        """An int, SymInt or size node as an expression of kernel parameters."""
        if isinstance(value, Node):
            value = value.meta["val"]
        expression = size_expression(value)
        if expression.is_Integer:
            return expression
        if is_product(expression):
            return expression.xreplace({s: self._atom(s) for s in expression.free_symbols})
        return self._atom(expression)

    def _atom(self, expression: sympy.Expr) -> sympy.Symbol:
        if expression not in self._atoms:
            symbol = sympy.Symbol(f"n{len(self._atoms)}", integer=True, positive=True)
            self._atoms[expression] = symbol
            self.parameters[symbol] = expression
        return self._atoms[expression]

    def sizes(self, node: Node) -> Index:
        """The shape of a node's value."""
        return tuple(self.size(s) for s in node.meta["val"].shape)

    def strides(self, node: Node) -> Index:
        """The strides of a node's value."""
        return tuple(self.size(s) for s in node.meta["val"].stride())

    def _place(self, result: Node) -> Place:
        if result.target not in WRITES:
            return Place(self.strides(result))
        room, _, dim, start, *_ = result.args
        assert isinstance(room, Node) and isinstance(dim, int)
        strides = self.strides(room)
        if result.target is kv_write_at:
            assert isinstance(start, Node)
            self.sizes(room)
            return Place(strides, room=room, dim=dim % len(strides), places=start)
        return Place(strides, self.size(start) * strides[dim], room)

    def address(self, output: int, index: Index) -> sympy.Expr:
        """How many elements behind the first of its memory the element of an output at an index is stored."""
        place = self.places[output]
        return rejoin(sum((i * s for i, s in zip(index, place.strides, strict=True)), place.offset))

    def numel(self, node: Node) -> sympy.Expr:
        """The number of elements of a node's value."""
        return product(self.sizes(node))

    def example(self, expression: sympy.Expr) -> int:
        """The value of a size in the traced call; of one that nothing is known of, its least."""
        sizes = estimate.example_sizes(self.graph_module)
        given = sympy.sympify(expression).xreplace(self.parameters)
        return int(given.xreplace({s: sympy.Integer(sizes.get(s.name, 1)) for s in given.free_symbols}))

    @property
    def device(self) -> cost.Device:
        """The device that the tensors are on; for those on the CPU, where nothing is timed, an H100."""
        return estimate.gpu_of(self.graph_module)

    def extent(self, node: Node) -> sympy.Expr:
        """One more than the largest element offset of a node's value, in the symbols of the whole graph."""
        value = node.meta["val"]
        total: sympy.Expr = sympy.Integer(1)
        for size, stride in zip(value.shape, value.stride(), strict=True):
            total += (size_expression(size) - 1) * size_expression(stride)
        return total


def _stored(result: Node) -> Node:
    """What a kernel computes for a result: of a write into a cache, the new rows."""
    stored = result.args[1] if result.target in WRITES else result
    assert isinstance(stored, Node)
    return stored


def _is_read(placeholder: Node) -> bool:
    """Is it more than room that is written into?"""
    return any(user.target not in WRITES or placeholder in user.args[1:] for user in placeholder.users)


def key(graph_module: GraphModule) -> tuple[str, list[sympy.Symbol]]:
    """A text that two regions share only if one kernel serves both: structure, shapes, strides and dtypes.

    Symbols are numbered in the order they are met; the list gives the graph's own symbols in that order.
    """
    names: dict[Any, str] = {}
    symbols: dict[sympy.Symbol, str] = {}

    def plain(value: Any) -> str:
        if isinstance(value, Node):
            return names[value]
        if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            expression = value.node.expr
            for symbol in sorted(expression.free_symbols, key=str):
                symbols.setdefault(symbol, f"n{len(symbols)}")
            return str(expression.xreplace({s: sympy.Symbol(symbols[s]) for s in expression.free_symbols}))
        if isinstance(value, torch.Tensor):
            fields = [plain(value.shape), plain(value.stride()), str(value.dtype), str(value.device)]
            return f"tensor({', '.join(fields)})"
        if isinstance(value, (tuple, list)):
            return f"[{', '.join(plain(v) for v in value)}]"
        if isinstance(value, dict):
            return f"{{{', '.join(f'{k}: {plain(v)}' for k, v in sorted(value.items()))}}}"
        return repr(value)

    lines = []
    for node in graph_module.graph.nodes:
        names[node] = f"v{len(names)}"
        target = "" if node.op in ("placeholder", "output") else str(node.target)
        call = f"{node.op} {target} {plain(node.args) if node.op != 'placeholder' else ''} {plain(node.kwargs)}"
        lines.append(f"{names[node]} = {call}: {plain(node.meta.get('val'))}")
    return "\n".join(lines), list(symbols)
