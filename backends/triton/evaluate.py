"""The value of a node at an index, written as lines of Triton.

The evaluator walks from what a kernel stores back to what it loads. A view changes only the index; a pointwise
operator becomes one line; a placeholder becomes a load; a reduction is asked from the skeleton (`Skeleton.reduction`),
which alone knows how the kernel runs along its axes. The same node at the same index is computed once.

A tile has one or two axes. Every value records the axes it varies over (`uses`), which decides its mask and whether it
is computed inside of the loop over an axis or before it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import sympy
import torch
from torch.fx import Node

from graphopt.backends.triton import expressions
from graphopt.backends.triton.printer import text_of
from graphopt.backends.triton.region import Region, Unsupported
from graphopt.index_arithmetic import product
from graphopt.index_map import VIEWS, Index, broadcast_index, operand_index


@dataclasses.dataclass(frozen=True)
class Value:
    """A Triton variable or literal: its text, eager's dtype, and the axes it varies over."""

    text: str
    dtype: torch.dtype
    uses: frozenset[str] = frozenset()


@dataclasses.dataclass
class Axis:
    """One axis of the tile: the names of its position and mask variables, and the dimensions it runs over.

    symbols and sizes: one for each dimension larger than 1, outermost first; position counts them in row-major order.
    """

    name: str
    position: str
    mask: str | None
    symbols: tuple[sympy.Symbol, ...]
    sizes: Index

    @property
    def total(self) -> sympy.Expr:
        """The number of positions."""
        return product(self.sizes)


def axis(name: str, sizes: Sequence[sympy.Expr], position: str | None = None, mask: str | None = "") -> Axis:
    """An axis over the given dimensions; those of size 1 have no symbol."""
    real = tuple(s for s in sizes if s != 1)
    symbols = tuple(sympy.Symbol(f"{name}{i}", integer=True, nonnegative=True) for i in range(len(real)))
    return Axis(name, position or name, f"{name}_mask" if mask == "" else mask, symbols, real)


class Skeleton(Protocol):
    """What the evaluator asks of a kernel's skeleton."""

    def emit(self, text: str, uses: frozenset[str], hint: str = "v") -> str:
        """Assign the expression to a new variable in the scope of the axes it uses; returns the variable."""

    def remembered(self, key: Any) -> Value | None:
        """A value computed before that is still in scope."""

    def remember(self, key: Any, value: Value) -> None:
        """Keep a value for as long as its variable is in scope."""

    def reduction(self, node: Node, index: Index) -> Value:
        """The value of a reduction or scan at an index; raises Unsupported when the kernel cannot know it."""


Guard = tuple[str, frozenset[str]]
"""A condition under which a load may happen: the name of a Boolean variable and the axes it uses."""


class Evaluator:
    """Writes values into a skeleton.

    pointers: the kernel's parameter for each placeholder; bound: values known beforehand, such as the accumulator of a
    matrix product in its epilogue; raw: for a carrier that is a widened load, the variable before it was widened.
    """

    def __init__(self, region: Region, skeleton: Skeleton, axes: Sequence[Axis]) -> None:
        self.region = region
        self.skeleton = skeleton
        self.axes = list(axes)
        self.helpers: set[str] = set()
        self.pointers = {node: f"in{i}" for i, node in enumerate(region.inputs)}
        self.raw: dict[str, str] = {}
        self.bound: dict[Node, Callable[[Index], Value]] = {}
        self._value_uses: dict[sympy.Symbol, frozenset[str]] = {}
        self._widest: dict[sympy.Symbol, sympy.Expr] = {}

    @property
    def ranges(self) -> dict[sympy.Symbol, sympy.Expr]:
        """The size of every index symbol in use."""
        known = {s: n for a in self.axes for s, n in zip(a.symbols, a.sizes, strict=True)}
        return {**known, **self._widest}

    # -- values ------------------------------------------------------------------------------------------------

    def value(self, node: Node, index: Index, guard: Guard | None = None) -> Value:
        """The value of `node` at `index`; loads happen only where the guard holds."""
        key = (node, index, guard)
        known = self.skeleton.remembered(key)
        if known is None:
            known = self._compute(node, index, guard)
            self.skeleton.remember(key, known)
        return known

    def _compute(self, node: Node, index: Index, guard: Guard | None) -> Value:
        from graphopt.backends.triton import structures

        if node in self.bound:
            return self.bound[node](index)
        if node.op == "placeholder":
            return self.load(node, index, guard)
        if node.op != "call_function":
            raise Unsupported(f"a {node.op} node inside of a region")
        if node.target in VIEWS:
            operand = node.args[0]
            assert isinstance(operand, Node)
            sizes = self.region.sizes(operand)
            inner = operand_index(node, index, self.region.sizes(node), sizes, self.ranges)
            return self.value(operand, inner, guard)
        if node.target in structures.STRUCTURES:
            return structures.STRUCTURES[node.target](self, node, index, guard)
        if structures.is_reduction(node):
            return self.skeleton.reduction(node, index)
        if node.target in expressions.TABLE:
            return self.pointwise(expressions.TABLE[node.target], node, node.args, index, guard)
        raise Unsupported(f"no kernel rule for {node.target}")

    def load(self, node: Node, index: Index, guard: Guard | None = None) -> Value:
        """An element of an input."""
        value = node.meta["val"]
        if not isinstance(value, torch.Tensor):
            size = self.region.size(value)
            return Value(f"({text_of(size)})", torch.int64)
        strides = self.region.strides(node)
        return self.load_at(node, sum((i * s for i, s in zip(index, strides, strict=True)), sympy.Integer(0)), guard)

    def load_at(self, node: Node, offset: sympy.Expr, guard: Guard | None = None) -> Value:
        """What lies so many elements behind the first of an input."""
        value = node.meta["val"]
        if value.dtype not in expressions.CARRIERS:
            raise Unsupported(f"dtype {value.dtype}")
        address, mask, uses = self.address(offset, guard)
        pointer = f"{self.pointers[node]} + {address}" if address != "0" else self.pointers[node]
        text = f"tl.load({pointer}{f', mask={mask}, other=0' if mask else ''})"
        name = self.skeleton.emit(text, uses, "load")
        if value.dtype in expressions.ROUNDED:
            raw = name
            name = self.skeleton.emit(f"{raw}.to(tl.float32)", uses, "wide")
            self.raw[name] = raw
        return Value(name, value.dtype, uses)

    def address(self, offset: sympy.Expr, guard: Guard | None = None) -> tuple[str, str, frozenset[str]]:
        """Text of an element offset, the mask of the axes it uses and of the guard, and those axes."""
        address, uses = self.index_text(sympy.expand(offset))
        masks = [a.mask for a in self.axes if a.name in uses and a.mask]
        if guard is not None:
            masks.append(guard[0])
            for missing in [a for a in self.axes if a.name in guard[1] - uses]:
                address = f"{address} + 0 * {missing.position}"
                if missing.mask:
                    masks.append(missing.mask)
            uses |= guard[1]
        return address, " & ".join(masks), uses

    def stored(self, output: int, index: Index) -> tuple[str, str, frozenset[str]]:
        """Where an element of an output goes, as `address` tells it; for a place that there is not, nowhere."""
        place = self.region.places[output]
        if place.places is None:
            return self.address(self.region.address(output, index))
        assert place.room is not None
        size = self.region.sizes(place.room)[place.dim]
        row = self.operand(place.places, index[place.dim : place.dim + 1])
        inside = self.also(f"({row.text} >= 0) & ({row.text} < {text_of(size, True)})", row.uses, None)
        moved = (*index[: place.dim], self.as_symbol(row, size), *index[place.dim + 1 :])
        return self.address(self.region.address(output, moved), inside)

    # -- pointwise ---------------------------------------------------------------------------------------------

    def pointwise(
        self, rule: expressions.Rule, node: Node, operands: Sequence[Any], index: Index, guard: Guard | None
    ) -> Value:
        """Apply a rule of the table to operands broadcast to the node's shape."""
        result = node.meta["val"].dtype
        if result not in expressions.CARRIERS:
            raise Unsupported(f"dtype {result}")
        compute = self._compute_dtype(rule, result, operands)
        values = [self.operand(operand, index, guard) for operand in operands]
        uses = frozenset().union(*(v.uses for v in values))
        texts = [
            expressions.convert(v.text, v.dtype, compute) if isinstance(o, Node) else self._constant(v, compute)
            for v, o in zip(values, operands, strict=True)
        ]
        self.helpers.update(rule.helpers)
        text = rule.text(texts, compute)
        if rule.computes in ("result", "float") and not rule.exact:
            text = expressions.rounded(text, result)
        return Value(self.skeleton.emit(text, uses), result, uses)

    def _constant(self, value: Value, compute: torch.dtype) -> str:
        """A Python number beside a tensor: eager converts it to the dtype it computes in."""
        if compute in (torch.float32, torch.float64, *expressions.ROUNDED) and value.dtype != torch.float64:
            return f"float({value.text})" if value.text in ("True", "False") else value.text
        if compute == torch.uint8 and value.text.startswith("(-"):
            return str(int(value.text.strip("()")) % 256)
        return value.text

    def _compute_dtype(self, rule: expressions.Rule, result: torch.dtype, operands: Sequence[Any]) -> torch.dtype:
        if rule.computes == "result":
            return result
        given = [o.meta["val"] if isinstance(o, Node) else o for o in operands]
        tensors = [g for g in given if isinstance(g, torch.Tensor)]
        if rule.computes == "operand" and len(tensors) == 1:
            return tensors[0].dtype
        common = tensors[0].dtype if len(given) == 1 else torch.result_type(given[0], given[1])
        if rule.computes == "float" and not common.is_floating_point:
            return torch.float32
        return common

    def operand(self, operand: Any, index: Index, guard: Guard | None = None) -> Value:
        """An operand, broadcast: a node's value at the index, or a number."""
        if isinstance(operand, Node):
            value = operand.meta["val"]
            if isinstance(value, torch.Tensor):
                return self.value(operand, broadcast_index(index, self.region.sizes(operand)), guard)
            operand = value
        if isinstance(operand, torch.SymInt):
            return Value(f"({text_of(self.region.size(operand))})", torch.int64)
        if isinstance(operand, bool):
            return Value(expressions.literal(operand), torch.bool)
        if isinstance(operand, int):
            return Value(expressions.literal(operand), torch.int64)
        if isinstance(operand, float):
            return Value(expressions.literal(operand), torch.float64)
        raise Unsupported(f"an operand of type {type(operand).__name__}")

    def narrow(self, value: Value) -> str:
        """A carrier in the type that its dtype has in memory, as the operand of `tl.dot`."""
        if value.dtype not in expressions.ROUNDED:
            return value.text
        return self.raw.get(value.text) or f"{value.text}.to({expressions.STORED[value.dtype]})"

    def settle(self, text: str, dtype: torch.dtype, uses: frozenset[str]) -> Value:
        """A new variable of the given dtype."""
        return Value(self.skeleton.emit(text, uses), dtype, uses)

    # -- indices -----------------------------------------------------------------------------------------------

    def also(self, text: str, uses: frozenset[str], guard: Guard | None) -> Guard:
        """A guard that holds where a condition and another guard do."""
        both = f"({text}) & {guard[0]}" if guard else text
        used = uses | (guard[1] if guard else frozenset())
        return self.skeleton.emit(both, used, "inside"), used

    def as_symbol(self, value: Value, size: sympy.Expr) -> sympy.Symbol:
        """A loaded integer as an index symbol that runs below `size`."""
        symbol = sympy.Symbol(value.text, integer=True, nonnegative=True)
        self._value_uses[symbol] = value.uses
        self._widest[symbol] = size
        return symbol

    def index_text(self, expression: sympy.Expr) -> tuple[str, frozenset[str]]:
        """An index expression as Triton text, with the axes it uses.

        Neighbouring dimensions whose coefficients continue each other become one variable: a contiguous row-major
        tensor is addressed by the axis position itself, without any division.
        """
        parts: list[str] = []
        uses: set[str] = set()
        linear: dict[sympy.Symbol, sympy.Expr] = {}
        rest: list[sympy.Expr] = []
        for term in sympy.Add.make_args(expression):
            symbols = [s for s in term.free_symbols if self._axis_of(s) is not None]
            coefficient = term / symbols[0] if len(symbols) == 1 else None
            if coefficient is not None and symbols[0] not in coefficient.free_symbols and self._is_size(coefficient):
                linear[symbols[0]] = linear.get(symbols[0], sympy.Integer(0)) + coefficient
            else:
                rest.append(term)
        for current in self.axes:
            for first, last, coefficient in _runs(current, linear):
                uses.add(current.name)
                variable = self._run_variable(current, first, last)
                parts.append(variable if coefficient == 1 else f"{text_of(coefficient, True)} * {variable}")
        for term in rest:
            replaced = {}
            for symbol in term.free_symbols:
                owner = self._axis_of(symbol)
                if owner is not None:
                    uses.add(owner.name)
                    place = owner.symbols.index(symbol)
                    replaced[symbol] = sympy.Symbol(self._run_variable(owner, place, place))
                uses |= self._value_uses.get(symbol, frozenset())
            parts.append(text_of(term.xreplace(replaced)))
        return (" + ".join(parts) or "0"), frozenset(uses)

    def _is_size(self, expression: sympy.Expr) -> bool:
        return all(s not in self._value_uses for s in expression.free_symbols)

    def _axis_of(self, symbol: sympy.Symbol) -> Axis | None:
        return next((a for a in self.axes if symbol in a.symbols), None)

    def _run_variable(self, current: Axis, first: int, last: int) -> str:
        """The row-major position within dimensions first .. last of an axis."""
        if first == 0 and last == len(current.sizes) - 1:
            return current.position
        key = ("run", current.position, first, last)
        known = self.skeleton.remembered(key)
        if known is None:
            inner, own = product(current.sizes[last + 1 :]), product(current.sizes[first : last + 1])
            text = current.position if inner == 1 else f"{current.position} // {text_of(inner, True)}"
            if first > 0:
                text = f"({text}) % {text_of(own, True)}" if inner != 1 else f"{text} % {text_of(own, True)}"
            uses = frozenset({current.name})
            hint = f"{current.name}{first}" if first == last else f"{current.name}{first}{last}"
            known = Value(self.skeleton.emit(text, uses, hint), torch.int64, uses)
            self.skeleton.remember(key, known)
        return known.text


def _runs(current: Axis, linear: dict[sympy.Symbol, sympy.Expr]) -> list[tuple[int, int, sympy.Expr]]:
    """The maximal runs of an axis' dimensions that one coefficient addresses: (first, last, coefficient of last)."""
    runs: list[tuple[int, int, sympy.Expr]] = []
    place = 0
    while place < len(current.symbols):
        coefficient = linear.get(current.symbols[place])
        if coefficient is None or coefficient == 0:
            place += 1
            continue
        last = place
        while last + 1 < len(current.symbols):
            following = linear.get(current.symbols[last + 1])
            if following is None or sympy.expand(following * current.sizes[last + 1] - coefficient) != 0:
                break
            last, coefficient = last + 1, following
        runs.append((place, last, coefficient))
        place = last + 1
    return runs
