"""What a row kernel accumulates for each reduction of ATen, and how the results are made of it.

A reduction has one or two *parts*, each a sum, product or extreme over the row; a second-stage part reads the result of
the first (the variance needs the mean, argmax needs the maximum). Accumulators are float32 for the 16-bit floats, as in
eager; integers and Booleans sum in int64. The variance is the mean of squared differences from the mean, two passes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import sympy
import torch
from torch.fx import Node

from graphopt import row_ops
from graphopt.backends.triton import expressions
from graphopt.backends.triton.evaluate import Axis, Evaluator, Value
from graphopt.backends.triton.printer import text_of
from graphopt.backends.triton.region import Region, Unsupported
from graphopt.index_map import Index

if TYPE_CHECKING:
    from graphopt.backends.triton.rows import RowSection

aten = torch.ops.aten


@dataclasses.dataclass
class Reduction:
    """One reduction or scan node: what it reads, along which dimensions, and how many reductions stand before it."""

    node: Node
    operand: Node
    sizes: Index
    dims: tuple[int, ...]
    keepdim: bool
    level: int

    @property
    def kept(self) -> tuple[int, ...]:
        """The dimensions that stay."""
        return tuple(d for d in range(len(self.sizes)) if d not in self.dims)

    @property
    def kept_sizes(self) -> Index:
        """Their sizes."""
        return tuple(self.sizes[d] for d in self.kept)

    @property
    def reduced_sizes(self) -> Index:
        """The sizes of the dimensions that are reduced."""
        return tuple(self.sizes[d] for d in self.dims)

    @property
    def trailing(self) -> bool:
        """Are the reduced dimensions the last ones?"""
        real = [d for d in range(len(self.sizes)) if self.sizes[d] != 1]
        flags = [d in self.dims for d in real]
        return flags == sorted(flags)

    def _spread(self, current: Axis, sizes: Index, evaluator: Evaluator) -> Index:
        from graphopt.backends.triton.rows import spread

        return spread(current, sizes, evaluator)

    def kept_index(self, x: Axis, evaluator: Evaluator) -> Index:
        """The index, in the kept dimensions, of this program's rows."""
        return self._spread(x, self.kept_sizes, evaluator)

    def element_index(self, x: Axis, r: Axis, evaluator: Evaluator) -> Index:
        """The index in the operand of the tile's elements."""
        kept = iter(self.kept_index(x, evaluator))
        reduced = iter(self._spread(r, self.reduced_sizes, evaluator))
        return tuple(next(reduced) if d in self.dims else next(kept) for d in range(len(self.sizes)))

    def asked(self, index: Index) -> Index:
        """The kept part of an index into the reduction's result."""
        if not self.keepdim:
            return index
        return tuple(i for d, i in enumerate(index) if d not in self.dims)

    def place(self, x: Axis, r: Axis, sizes: Index) -> Index | None:
        """The tile's index in a tensor of the operand's shape (up to dimensions of 1); None for another shape."""
        real = [d for d in range(len(self.sizes)) if self.sizes[d] != 1]
        if tuple(s for s in sizes if s != 1) != tuple(self.sizes[d] for d in real):
            return None
        rows, columns = iter(x.symbols), iter(r.symbols)
        symbols = iter([next(columns) if d in self.dims else next(rows) for d in real])
        return tuple(sympy.Integer(0) if s == 1 else next(symbols) for s in sizes)

    def scan(self, section: RowSection) -> Value:
        """cumsum or cumprod along the row; in a loop, continued by a carry."""
        dtype = self.node.meta["val"].dtype
        carrier = expressions.CARRIERS[dtype]
        adds = self.node.target is aten.cumsum.default
        identity = "0" if adds else "1"
        assert section.r is not None
        value = section.evaluator.value(self.operand, self.element_index(section.x, section.r, section.evaluator))
        tile = section.masked(_converted(value, dtype), carrier, identity)
        both = frozenset({"x", "r"})
        name = section.emit(f"tl.{'cumsum' if adds else 'cumprod'}({tile}, 1)", both, "scan")
        if section.looped:
            carry = section.names.new("carry")
            section.scopes[0].lines.append(f"{carry} = tl.full([{section.xblock}, 1], {identity}, {carrier})")
            symbol = "+" if adds else "*"
            name = section.emit(f"{name} {symbol} {carry}", both, "scan")
            total = f"tl.sum({tile}, 1, keep_dims=True)"
            if not adds:
                section.evaluator.helpers.add("multiply")
                total = f"tl.reduce({tile}, 1, multiply, keep_dims=True)"
            section.scopes[-1].lines.append(f"{carry} = {carry} {symbol} {total}")
        text = expressions.rounded(name, dtype)
        return Value(name if text == name else section.emit(text, both), dtype, both)


@dataclasses.dataclass(frozen=True)
class Part:
    """A sum, product or extreme over the row.

    element: the variable of the masked tile; combine and reduce: texts that join two tiles and reduce one to a column.
    """

    node: Node
    name: str
    stage: int
    dtype: torch.dtype
    carrier: str
    identity: str
    hint: str
    element: Callable[[Evaluator, RowSection], str]
    combine: Callable[[str, str], str]
    reduce: Callable[[str], str]
    helpers: tuple[str, ...] = ()


def describe(region: Region, node: Node) -> Reduction:
    """Read a reduction's arguments. Raises Unsupported for dtypes without kernels."""
    from graphopt.backends.triton.rows import ancestors

    operand = node.args[0]
    assert isinstance(operand, Node)
    value = operand.meta["val"]
    if value.dtype not in expressions.CARRIERS:
        raise Unsupported(f"dtype {value.dtype}")
    level = sum(1 for n in ancestors(node) if n.target in row_ops.REDUCTIONS) - 1
    chain = _longest_chain(node)
    dims, keepdim = row_ops.reduced_dims(node), row_ops.keeps_dims(node)
    return Reduction(node, operand, region.sizes(operand), dims, keepdim, min(level, chain))


def _longest_chain(node: Node) -> int:
    """How many reductions stand before this one along one path."""
    depth: dict[Node, int] = {}
    for current in node.graph.nodes:
        before = max((depth[n] + (n.target in row_ops.REDUCTIONS) for n in current.all_input_nodes), default=0)
        depth[current] = before
        if current is node:
            break
    return depth[node]


def _converted(value: Value, dtype: torch.dtype) -> Value:
    return Value(expressions.convert(value.text, value.dtype, dtype), dtype, value.uses)


def _total_dtype(node: Node) -> torch.dtype:
    """The dtype a sum or product is accumulated in."""
    result: torch.dtype = picked_value(node).dtype
    return torch.float32 if result in expressions.ROUNDED else result


def picked_value(node: Node) -> Any:
    """The fake value of a reduction, the first one of several."""
    value = node.meta["val"]
    return value[0] if isinstance(value, (tuple, list)) else value


def parts_of(reduction: Reduction) -> list[Part]:
    """What must be accumulated for a reduction."""
    node, target = reduction.node, reduction.node.target
    if target in row_ops.SCANS:
        return []
    if target in row_ops.SUMS:
        return [_sum(reduction, "sum", 0, _total_dtype(node), lambda e, s, v: v)]
    if target in row_ops.PRODUCTS:
        dtype = _total_dtype(node)
        carrier = expressions.CARRIERS[dtype]
        return [Part(node, "product", 0, dtype, carrier, "1", "product",
                     lambda e, s: s.masked(_converted(_operand(e, s, reduction), dtype), carrier, "1"),
                     lambda a, b: f"{a} * {b}",
                     lambda t: f"tl.reduce({t}, 1, multiply, keep_dims=True)", ("multiply",))]
    if target in row_ops.VARIANCES:
        dtype = _total_dtype(node)
        return [
            _sum(reduction, "total", 0, dtype, lambda e, s, v: v),
            _sum(reduction, "squares", 1, dtype, lambda e, s, v: _squared_difference(reduction, e, s, v)),
        ]
    name = str(target)
    largest = any(word in name for word in ("max", "any"))
    best = _extreme(reduction, largest)
    if target in row_ops.POSITIONS | row_ops.PAIRS:
        return [best, _position(reduction)]
    return [best]


def _operand(e: Evaluator, s: RowSection, reduction: Reduction) -> Value:
    assert s.r is not None
    return e.value(reduction.operand, reduction.element_index(s.x, s.r, e))


def _sum(
    reduction: Reduction, name: str, stage: int, dtype: torch.dtype,
    term: Callable[[Evaluator, RowSection, Value], Value],
) -> Part:
    carrier = expressions.CARRIERS[dtype]

    def element(e: Evaluator, s: RowSection) -> str:
        return s.masked(term(e, s, _converted(_operand(e, s, reduction), dtype)), carrier, "0")

    return Part(reduction.node, name, stage, dtype, carrier, "0", name, element, lambda a, b: f"{a} + {b}",
                lambda t: f"tl.sum({t}, 1, keep_dims=True)")


def _count(reduction: Reduction) -> sympy.Expr:
    total: sympy.Expr = sympy.Integer(1)
    for size in reduction.reduced_sizes:
        total = total * size
    return total


def mean_of(reduction: Reduction, s: RowSection) -> Value:
    """The mean of the row, once its sum is known."""
    name = "sum" if reduction.node.target in row_ops.SUMS else "total"
    total = s.remembered((reduction.node, name))
    assert total is not None
    return s.evaluator.settle(_divided(total, text_of(_count(reduction), True)), total.dtype, total.uses)


def _divided(total: Value, count: str) -> str:
    if total.dtype == torch.float64:
        return f"{total.text} / {count}"
    return f"tl.div_rn({total.text}, tl.full([], {count}, tl.float32))" if count.isdigit() else (
        f"tl.div_rn({total.text}, ({count}).to(tl.float32))")


def _squared_difference(reduction: Reduction, e: Evaluator, s: RowSection, value: Value) -> Value:
    mean = s.remembered((reduction.node, "mean")) or mean_of(reduction, s)
    s.remember((reduction.node, "mean"), mean)
    difference = e.settle(f"{value.text} - {mean.text}", value.dtype, value.uses | mean.uses)
    return e.settle(f"{difference.text} * {difference.text}", value.dtype, difference.uses)


def _limits(dtype: torch.dtype, largest: bool) -> str:
    if dtype.is_floating_point:
        return "float('-inf')" if largest else "float('inf')"
    info = torch.iinfo(dtype)
    return f"({info.min if largest else info.max})"


def _extreme(reduction: Reduction, largest: bool) -> Part:
    dtype = reduction.operand.meta["val"].dtype
    logical = dtype == torch.bool or picked_value(reduction.node).dtype == torch.bool
    kind = torch.int32 if logical else dtype
    carrier = expressions.CARRIERS[kind]
    identity = _limits(kind, largest)
    real = kind.is_floating_point
    word = "max" if largest else "min"

    def element(e: Evaluator, s: RowSection) -> str:
        value = _operand(e, s, reduction)
        if logical:
            value = Value(f"({value.text} != 0).to(tl.int32)", kind, value.uses)
        return s.masked(value, carrier, identity)

    nan = ", propagate_nan=tl.PropagateNan.ALL" if real else ""
    reduce = f"row_{word}({{}})" if real else f"tl.{word}({{}}, 1, keep_dims=True)"
    return Part(reduction.node, "best", 0, kind, carrier, identity, word, element,
                lambda a, b: f"tl.{word}imum({a}, {b}{nan})", reduce.format, (f"row_{word}",) if real else ())


def _position(reduction: Reduction) -> Part:
    """The first place of the extreme; a NaN counts as the extreme."""
    kind = torch.int64
    identity = str(torch.iinfo(torch.int64).max)

    def element(e: Evaluator, s: RowSection) -> str:
        assert s.r is not None
        value = _operand(e, s, reduction)
        best = s.remembered((reduction.node, "best"))
        assert best is not None
        logical = best.dtype == torch.int32 and value.dtype != best.dtype
        text = f"({value.text} != 0).to(tl.int32)" if logical else value.text
        hit = f"({text} == {best.text})"
        if best.dtype.is_floating_point:
            hit = f"({hit} | ({text} != {text}))"
        chosen = e.settle(f"tl.where({hit}, {s.r.position}.to(tl.int64), {identity})", kind,
                          value.uses | frozenset({"x", "r"}))
        return s.masked(chosen, "tl.int64", identity)

    return Part(reduction.node, "position", 1, kind, "tl.int64", identity, "position", element,
                lambda a, b: f"tl.minimum({a}, {b})", lambda t: f"tl.min({t}, 1, keep_dims=True)")


def finish(section: RowSection, reduction: Reduction, picked: int | None) -> Value:
    """The reduction's result (of several, the one picked), rounded to eager's dtype."""
    node, target = reduction.node, reduction.node.target
    key = (node, "result", picked)
    known = section.remembered(key)
    if known is None:
        known = _result(section, reduction, picked)
        result = node.meta["val"] if picked is None else node.meta["val"][picked]
        text = expressions.convert(known.text, known.dtype, result.dtype)
        if text != known.text:
            known = section.evaluator.settle(text, result.dtype, known.uses)
        known = Value(known.text, result.dtype, known.uses)
        section.remember(key, known)
    assert target is not None
    return known


def _result(section: RowSection, reduction: Reduction, picked: int | None) -> Value:
    node, target = reduction.node, reduction.node.target

    def part(name: str) -> Value:
        value = section.remembered((node, name))
        if value is None:
            raise Unsupported("a reduction is needed before it is known")
        return value

    if target in row_ops.SUMS:
        return mean_of(reduction, section) if "mean" in str(target) else part("sum")
    if target in row_ops.PRODUCTS:
        return part("product")
    if target in row_ops.VARIANCES:
        if picked == 1:
            return part("mean")
        correction = node.kwargs.get("correction")
        removed = 1 if correction is None else correction
        if not isinstance(removed, (int, float)):
            raise Unsupported("a symbolic correction")
        count = text_of(_count(reduction), True)
        squares = part("squares")
        carrier = expressions.CARRIERS[squares.dtype]
        left = f"tl.maximum({count} - {expressions.literal(removed)}, 0).to({carrier})"
        if count.isdigit():
            left = f"tl.full([], {max(int(count) - removed, 0)}, {carrier})"
        text = f"{squares.text} / {left}" if squares.dtype == torch.float64 else f"tl.div_rn({squares.text}, {left})"
        return section.evaluator.settle(text, squares.dtype, squares.uses)
    if target in row_ops.POSITIONS or picked == 1:
        return part("position")
    return part("best")

