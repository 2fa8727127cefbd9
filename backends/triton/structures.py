"""ATen operators that need more than a template: selections, joins, gathers, constants, casts with options.

Each function takes the evaluator, the node, the index wanted, and the guard, and answers the value. Reductions and
scans are only named here (`is_reduction`); `rows.py` computes them.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch.fx import Node

from graphopt.backends.triton import expressions, gathers, scatters
from graphopt.backends.triton.evaluate import Evaluator, Guard, Value
from graphopt.backends.triton.printer import text_of
from graphopt.backends.triton.region import Unsupported
from graphopt.index_arithmetic import lies_between
from graphopt.index_map import Index, unflatten
from graphopt.row_ops import REDUCTIONS, SPLITS, is_bitcast, may_restride

aten = torch.ops.aten
prims = torch.ops.prims

Structure = Callable[[Evaluator, Node, Index, Guard | None], Value]


def is_reduction(node: Node) -> bool:
    """Does the node's value depend on a whole row of its operand? A result picked of several counts as well."""
    return node.target in REDUCTIONS or (
        getattr(node.target, "__name__", "") == "getitem" and isinstance(node.args[0], Node)
        and node.args[0].target in REDUCTIONS
    )


def picked(node: Node) -> tuple[Node, int | None]:
    """The reduction behind a node, and which of its results the node is when there are several."""
    if node.target in REDUCTIONS:
        return node, None
    source, place = node.args
    assert isinstance(source, Node) and isinstance(place, int)
    return source, place


def _argument(node: Node, place: int, name: str, default: Any = None) -> Any:
    return node.args[place] if len(node.args) > place else node.kwargs.get(name, default)


def _convert(e: Evaluator, node: Node, index: Index, guard: Guard | None) -> Value:
    value = e.operand(node.args[0], index, guard)
    target = node.meta["val"].dtype
    if target not in expressions.CARRIERS or value.dtype not in expressions.CARRIERS:
        raise Unsupported(f"conversion of {value.dtype} to {target}")
    text = expressions.convert(value.text, value.dtype, target)
    if text == value.text:
        return Value(text, target, value.uses)
    return e.settle(text, target, value.uses)


def _scaled_sum(e: Evaluator, node: Node, index: Index, guard: Guard | None) -> Value:
    """add and sub with `alpha`."""
    alpha = node.kwargs.get("alpha", _argument(node, 2, "alpha", 1))
    rule = expressions.TABLE[aten.sub.Tensor if "sub" in str(node.target) else aten.add.Tensor]
    if alpha == 1 or isinstance(alpha, bool):
        return e.pointwise(rule, node, node.args[:2], index, guard)
    if not isinstance(alpha, (int, float)):
        raise Unsupported("a symbolic alpha")
    scaled = expressions.Rule(lambda o, d: rule.text([o[0], f"({o[1]} * {expressions.literal(alpha)})"], d))
    return e.pointwise(scaled, node, node.args[:2], index, guard)


def _divide(e: Evaluator, node: Node, index: Index, guard: Guard | None) -> Value:
    mode = node.kwargs.get("rounding_mode")
    rule = expressions.TABLE[aten.div.Tensor if mode is None else f"div_{mode}"]
    return e.pointwise(rule, node, node.args[:2], index, guard)


def _power(e: Evaluator, node: Node, index: Index, guard: Guard | None) -> Value:
    exponent = node.args[1]
    if isinstance(exponent, (int, float)):
        dtype = node.meta["val"].dtype
        special = expressions.power_of_constant("{0}", float(exponent), dtype)
        if special is not None:
            return e.pointwise(expressions.Rule(special), node, node.args[:1], index, guard)
        if dtype.is_floating_point:
            rule = expressions.Rule(f"libdevice.pow({{0}}, {expressions.literal(float(exponent))})")
            return e.pointwise(rule, node, node.args[:1], index, guard)
    return e.pointwise(expressions.TABLE[node.target], node, node.args[:2], index, guard)


def _where(e: Evaluator, node: Node, index: Index, guard: Guard | None) -> Value:
    condition, *branches = (e.operand(a, index, guard) for a in node.args[:3])
    return _select(e, node.meta["val"].dtype, condition, *branches)


def _select(e: Evaluator, dtype: torch.dtype, condition: Value, yes: Value, no: Value) -> Value:
    test = condition.text if condition.dtype == torch.bool else f"({condition.text} != 0)"
    texts = [_as(value, dtype) for value in (yes, no)]
    return e.settle(f"tl.where({test}, {texts[0]}, {texts[1]})", dtype, condition.uses | yes.uses | no.uses)


def _as(value: Value, dtype: torch.dtype) -> str:
    """The value's text in the carrier of `dtype`; a number is written out in it."""
    if dtype not in expressions.CARRIERS:
        raise Unsupported(f"dtype {dtype}")
    if value.uses or not _is_number(value.text):
        return expressions.convert(value.text, value.dtype, dtype)
    full = f"tl.full([], {value.text}, {expressions.CARRIERS[dtype]})"
    return expressions.convert(full, torch.float32, dtype) if dtype in expressions.ROUNDED else full


def _is_number(text: str) -> bool:
    stripped = text.strip("(-)")
    return stripped[:1].isdigit() or stripped in ("True", "False") or stripped.startswith("float(")


def _masked_fill(e: Evaluator, node: Node, index: Index, guard: Guard | None) -> Value:
    value, condition, fill = (e.operand(a, index, guard) for a in node.args[:3])
    return _select(e, node.meta["val"].dtype, condition, fill, value)


def _clamp(e: Evaluator, node: Node, index: Index, guard: Guard | None) -> Value:
    low, high = _argument(node, 1, "min"), _argument(node, 2, "max")
    operands = [node.args[0], *(bound for bound in (low, high) if bound is not None)]
    first = expressions.TABLE[aten.maximum.default if low is not None else aten.minimum.default]
    if low is None or high is None:
        return e.pointwise(first, node, operands, index, guard)
    second = expressions.TABLE[aten.minimum.default]
    both = expressions.Rule(lambda o, d: second.text([first.text(o[:2], d), o[2]], d), exact=True)
    return e.pointwise(both, node, operands, index, guard)


def _scaled_product(e: Evaluator, node: Node, index: Index, guard: Guard | None) -> Value:
    """addcmul and addcdiv: a + value * (b times or over c)."""
    factor = node.kwargs.get("value", 1)
    if not isinstance(factor, (int, float)):
        raise Unsupported("a symbolic value")
    join = expressions.TABLE[aten.div.Tensor if "addcdiv" in str(node.target) else aten.mul.Tensor]

    def text(operands: Sequence[str], dtype: torch.dtype) -> str:
        scaled = operands[1] if factor == 1 else f"({expressions.literal(factor)} * {operands[1]})"
        return f"({operands[0]} + {join.text([scaled, operands[2]], dtype)})"

    return e.pointwise(expressions.Rule(text), node, node.args[:3], index, guard)


def _gelu(e: Evaluator, node: Node, index: Index, guard: Guard | None) -> Value:
    if node.kwargs.get("approximate", "none") == "tanh":
        text = ("0.5 * {0} * (1.0 + libdevice.tanh(0.7978845608028654 * ({0} + 0.044715 * {0} * {0} * {0})))")
    else:
        text = "{0} * 0.5 * (1.0 + tl.erf({0} * 0.7071067811865476))"
    return e.pointwise(expressions.Rule(text), node, node.args[:1], index, guard)


def _full(e: Evaluator, node: Node, index: Index, guard: Guard | None) -> Value:
    number = 0 if len(node.args) < 2 and node.target is not aten.scalar_tensor.default else node.args[
        0 if node.target is aten.scalar_tensor.default else 1]
    return Value(_as(e.operand(number, ()), node.meta["val"].dtype), node.meta["val"].dtype)


def _constant_of(number: int) -> Structure:
    def constant(e: Evaluator, node: Node, index: Index, guard: Guard | None) -> Value:
        dtype = node.meta["val"].dtype
        return Value(_as(Value(str(number), torch.int64), dtype), dtype)

    return constant


def _iota(e: Evaluator, node: Node, index: Index, guard: Guard | None) -> Value:
    dtype = node.meta["val"].dtype
    start, step = (e.region.size(node.kwargs[k]) for k in ("start", "step"))
    return _index_value(e, index[0] * step + start, dtype)


def _arange(e: Evaluator, node: Node, index: Index, guard: Guard | None) -> Value:
    numbers = [a for a in node.args if not isinstance(a, torch.dtype)]
    if any(isinstance(n, float) for n in numbers):
        raise Unsupported("arange of floating point numbers")
    start = e.region.size(numbers[0]) if len(numbers) > 1 else sympy.Integer(0)
    step = e.region.size(numbers[2]) if len(numbers) > 2 else sympy.Integer(1)
    return _index_value(e, index[0] * step + start, node.meta["val"].dtype)


def _index_value(e: Evaluator, position: sympy.Expr, dtype: torch.dtype) -> Value:
    text, uses = e.index_text(sympy.expand(position))
    if not uses:
        return Value(_as(Value(f"({text})", torch.int64), dtype), dtype)
    kind = expressions.CARRIERS.get(dtype)
    if kind is None:
        raise Unsupported(f"dtype {dtype}")
    wide = f"({text}).to({kind})"
    return e.settle(wide if dtype not in expressions.ROUNDED else expressions.rounded(wide, dtype), dtype, uses)


def _cat(e: Evaluator, node: Node, index: Index, guard: Guard | None) -> Value:
    dtype = node.meta["val"].dtype
    listed = [p for p in node.all_input_nodes if isinstance(p.meta["val"], torch.Tensor)]
    given: Any = node.args[0]
    parts = [p for p in given if p in listed and (p.meta["val"].dim() == len(index) or p.meta["val"].numel() != 0)]
    dim = int(_argument(node, 1, "dim", 0)) % len(index)
    ends = list(itertools.accumulate((e.region.sizes(part)[dim] for part in parts), initial=sympy.Integer(0)))
    bounds = [(part, *span, (*index[:dim], sympy.expand(index[dim] - span[0]), *index[dim + 1 :]))
              for part, span in zip(parts, itertools.pairwise(ends), strict=True)]
    for part, begin, end, inner in bounds:
        if lies_between(index[dim], begin, end, e.ranges):
            value = e.value(part, inner, guard)
            return Value(_as(value, dtype), dtype, value.uses)
    place, uses = e.index_text(sympy.expand(index[dim]))
    chosen: Value | None = None
    pieces: list[tuple[str, Value]] = []
    for part, begin, end, inner in bounds:
        if begin != end:
            tests = [f"({place} >= {text_of(begin, True)})"] * (begin != 0) + [f"({place} < {text_of(end, True)})"]
            test = e.also(" & ".join(tests), uses, guard)
            pieces.append((test[0], e.value(part, inner, test)))
    for condition, value in reversed(pieces):
        text = _as(value, dtype)
        chosen = Value(text, dtype, value.uses) if chosen is None else e.settle(
            f"tl.where({condition}, {text}, {chosen.text})", dtype, chosen.uses | value.uses | uses)
    return chosen or Value(_as(Value("0", torch.int64), dtype), dtype)


def _pad(e: Evaluator, node: Node, index: Index, guard: Guard | None) -> Value:
    operand, pads = node.args[0], node.args[1]
    assert isinstance(operand, Node) and isinstance(pads, (list, tuple))
    sizes = e.region.sizes(operand)
    moved, tests, uses = list(index), [], frozenset[str]()
    for k in range(len(pads) // 2):
        dim = len(sizes) - 1 - k
        before = e.region.size(pads[2 * k])
        moved[dim] = sympy.expand(index[dim] - before)
        place, used = e.index_text(moved[dim])
        tests.append(f"({place} >= 0) & ({place} < {text_of(sizes[dim], True)})")
        uses |= used
    if not tests:
        return e.value(operand, index, guard)
    test = e.also(" & ".join(tests), uses, guard)
    inner = e.value(operand, tuple(moved), test)
    fill = e.operand(_argument(node, 2, "value", 0), ())
    return _select(e, node.meta["val"].dtype, Value(test[0], torch.bool, test[1]), inner, fill)


def _slice_scatter(e: Evaluator, node: Node, index: Index, guard: Guard | None) -> Value:
    base, source = node.args[:2]
    assert isinstance(base, Node) and isinstance(source, Node)
    axis = int(_argument(node, 2, "dim", 0)) % len(index)
    start, step = _argument(node, 3, "start"), _argument(node, 5, "step", 1)
    size = e.region.sizes(base)[axis]
    begin = e.region.size(0 if start is None else start)
    if step != 1 or (begin.is_Integer and begin < 0 and not size.is_Integer):
        raise Unsupported("slice_scatter with a step or a negative symbolic start")
    begin = begin + size if begin.is_Integer and begin < 0 else begin
    place, uses = e.index_text(sympy.expand(index[axis] - begin))
    test = e.also(f"({place} >= 0) & ({place} < {text_of(e.region.sizes(source)[axis], True)})", uses, guard)
    new = e.value(source, (*index[:axis], sympy.expand(index[axis] - begin), *index[axis + 1 :]), test)
    return _select(e, node.meta["val"].dtype, Value(test[0], torch.bool, test[1]), new, e.value(base, index, guard))


def _select_scatter(e: Evaluator, node: Node, index: Index, guard: Guard | None) -> Value:
    base, source, dim, at = node.args[:4]
    assert isinstance(base, Node) and isinstance(source, Node) and isinstance(dim, int)
    axis = dim % len(index)
    where = e.region.size(at)
    where = where + e.region.sizes(base)[axis] if where.is_Integer and where < 0 else where
    place, uses = e.index_text(sympy.expand(index[axis]))
    test = e.also(f"{place} == {text_of(where, True)}", uses, guard)
    new = e.value(source, (*index[:axis], *index[axis + 1 :]), test)
    return _select(e, node.meta["val"].dtype, Value(test[0], torch.bool, test[1]), new, e.value(base, index, guard))


def _pick(e: Evaluator, node: Node, index: Index, guard: Guard | None) -> Value:
    """One piece of a split, or one result of a reduction."""
    source, place = node.args
    assert isinstance(source, Node) and isinstance(place, int)
    if source.target not in SPLITS:
        if is_reduction(node):
            return e.skeleton.reduction(node, index)
        raise Unsupported(f"no kernel rule for {source.target}")
    operand = source.args[0]
    assert isinstance(operand, Node)
    if source.target == aten.unbind.int:
        axis = int(_argument(source, 1, "dim", 0)) % (len(index) + 1)
        return e.value(operand, (*index[:axis], sympy.Integer(place), *index[axis:]), guard)
    axis = int(_argument(source, 2, "dim", 0)) % len(index)
    begin = sum((e.region.size(v.shape[axis]) for v in source.meta["val"][:place]), sympy.Integer(0))
    return e.value(operand, (*index[:axis], sympy.expand(index[axis] + begin), *index[axis + 1 :]), guard)


def _as_strided(e: Evaluator, node: Node, index: Index, guard: Guard | None) -> Value:
    """Another naming of the places of a value that is laid out row by row."""
    operand = node.args[0]
    assert isinstance(operand, Node)
    if not may_restride(node):
        raise Unsupported("as_strided of memory that is not laid out row by row, or is an input's")
    start = _argument(node, 3, "storage_offset") or 0
    place = sum((i * s for i, s in zip(index, e.region.strides(node), strict=True)), sympy.Integer(start))
    return e.value(operand, unflatten(sympy.expand(place), e.region.sizes(operand), e.ranges), guard)


def _bits(e: Evaluator, node: Node, index: Index, guard: Guard | None) -> Value:
    """view(dtype): the bits of an element as another number."""
    if not is_bitcast(node):
        raise Unsupported("a view of another dtype that is narrower than a register")
    dtype, value = node.meta["val"].dtype, e.operand(node.args[0], index, guard)
    return e.settle(f"{value.text}.to({expressions.CARRIERS[dtype]}, bitcast=True)", dtype, value.uses)


def _shift(e: Evaluator, node: Node, index: Index, guard: Guard | None) -> Value:
    """A shift by a known count, which the type's bits must hold."""
    count, dtype = node.args[1], node.meta["val"].dtype
    if not isinstance(count, int) or not 0 <= count < 8 * dtype.itemsize:
        raise Unsupported("a shift by more than the type's bits")
    sign = "<<" if node.target == aten.__lshift__.Scalar else ">>"
    return e.pointwise(expressions.Rule(f"({{0}} {sign} {count})"), node, node.args[:1], index, guard)


def _copy(e: Evaluator, node: Node, index: Index, guard: Guard | None) -> Value:
    """copy(destination, source): the source, converted."""
    value = e.operand(node.args[1], index, guard)
    return Value(_as(value, node.meta["val"].dtype), node.meta["val"].dtype, value.uses)


STRUCTURES: dict[Any, Structure] = {
    prims.convert_element_type.default: _convert,
    aten._to_copy.default: _convert,
    aten.add.Tensor: _scaled_sum,
    aten.sub.Tensor: _scaled_sum,
    aten.add.Scalar: _scaled_sum,
    aten.sub.Scalar: _scaled_sum,
    aten.div.Tensor_mode: _divide,
    aten.div.Scalar_mode: _divide,
    aten.pow.Tensor_Scalar: _power,
    aten.where.self: _where,
    aten.masked_fill.Scalar: _masked_fill,
    aten.masked_fill.Tensor: _masked_fill,
    aten.clamp.default: _clamp,
    aten.clamp.Tensor: _clamp,
    aten.gelu.default: _gelu,
    aten.addcmul.default: _scaled_product,
    aten.addcdiv.default: _scaled_product,
    operator.getitem: _pick,
    aten._unsafe_index.Tensor: gathers.advanced_index,
    aten.empty.memory_format: _constant_of(0),
    aten.full.default: _full,
    aten.full_like.default: _full,
    aten.scalar_tensor.default: _full,
    aten.zeros.default: _constant_of(0),
    aten.ones.default: _constant_of(1),
    aten.zeros_like.default: _constant_of(0),
    aten.ones_like.default: _constant_of(1),
    prims.iota.default: _iota,
    aten.arange.default: _arange,
    aten.arange.start: _arange,
    aten.arange.start_step: _arange,
    aten.cat.default: _cat,
    aten.constant_pad_nd.default: _pad,
    aten.embedding.default: gathers.embedding,
    aten.index_select.default: gathers.index_select,
    aten.gather.default: gathers.gather,
    aten.index.Tensor: gathers.advanced_index,
    aten.slice_scatter.default: _slice_scatter,
    aten.select_scatter.default: _select_scatter,
    aten.copy.default: _copy,
    aten.view.dtype: _bits,
    aten.__lshift__.Scalar: _shift,
    aten.__rshift__.Scalar: _shift,
    aten.as_strided.default: _as_strided,
    aten.index_put.default: scatters.index_put,
    aten._unsafe_index_put.default: scatters.index_put,
    aten.index_copy.default: scatters.index_along,
    aten.index_add.default: scatters.index_along,
    aten.index_fill.int_Scalar: scatters.index_along,
    aten.index_fill.int_Tensor: scatters.index_along,
    aten.scatter.src: scatters.scatter,
    aten.scatter.value: scatters.scatter,
    aten.scatter_add.default: scatters.scatter,
}
