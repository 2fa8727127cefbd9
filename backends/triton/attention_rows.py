"""Keys and values as an attention kernel reads them: a tensor, blocks found by a table, or codes, each with its tail.

A row of a cache in parts is loaded from where it lies: which of the two places that is, the key's number says. The
layouts are those of `runtime/kv_paged.py` and `quantization/cache_operations.py`.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import Any

import sympy
import torch
from torch.fx import Node

from graphopt.backends.triton import expressions
from graphopt.backends.triton.evaluate import Evaluator, Guard, Value
from graphopt.backends.triton.region import Region
from graphopt.index_arithmetic import floor_divide, remainder
from graphopt.index_map import Index, broadcast_index
from graphopt.lowering import arguments
from graphopt.quantization import cache_operations as quantized
from graphopt.runtime.kv_blocks import BLOCK

_MOST_BLOCKS = sympy.Integer(2**40)  # of a pool: where indices are simplified, no bound at all


@dataclasses.dataclass(frozen=True)
class Rows(abc.ABC):
    """Rows [B, H, T, D] of keys or values. tensor: the tensor that holds them, or the newest of them."""

    tensor: Node

    @property
    def dtype(self) -> torch.dtype:
        """What they count as."""
        dtype: torch.dtype = self.tensor.meta["val"].dtype
        return dtype

    @abc.abstractmethod
    def sizes(self, region: Region) -> Index:
        """B, H, T and D."""

    @abc.abstractmethod
    def value(self, e: Evaluator, index: Index) -> Value:
        """The element at an index."""


class PlainRows(Rows):
    """A tensor, or a view of one."""

    def sizes(self, region: Region) -> Index:
        return region.sizes(self.tensor)

    def value(self, e: Evaluator, index: Index) -> Value:
        return e.value(self.tensor, broadcast_index(index, e.region.sizes(self.tensor)))


@dataclasses.dataclass(frozen=True)
class Tailed(Rows):
    """Rows of which the first `stored` lie elsewhere and the others at the end of `tensor`, the tail."""

    length: Any

    def sizes(self, region: Region) -> Index:
        batch, heads, _, size = region.sizes(self.tensor)
        return (batch, heads, region.size(self.length), size)

    @abc.abstractmethod
    def stored(self, region: Region) -> sympy.Expr:
        """How many rows are not in the tail."""

    @abc.abstractmethod
    def stored_value(self, e: Evaluator, index: Index, inside: Guard) -> Value:
        """The element of a row that is not in the tail."""

    def value(self, e: Evaluator, index: Index) -> Value:
        batch, head, key, column = index
        stored, (_, _, rows, _) = self.stored(e.region), e.region.sizes(self.tensor)
        place, uses = e.index_text(key)
        limit, _ = e.index_text(stored)
        inside = e.also(f"{place} + 0 < {limit}", uses, None)
        outside = e.also(f"{place} + 0 >= {limit}", uses, None)
        one = self.stored_value(e, index, inside)
        # The last rows of the tail are those that count.
        other = e.value(self.tensor, (batch, head, key + rows - e.region.size(self.length), column), outside)
        text = f"tl.where({inside[0]}, {one.text}, {other.text})"
        return e.settle(text, self.dtype, one.uses | other.uses | uses)


@dataclasses.dataclass(frozen=True)
class PagedRows(Tailed):
    """Rows in blocks [heads, BLOCK, size] that lie behind the first one, found by a table [batch, blocks]."""

    first: Node
    table: Node

    def stored(self, region: Region) -> sympy.Expr:
        return region.sizes(self.table)[1] * BLOCK

    def stored_value(self, e: Evaluator, index: Index, inside: Guard) -> Value:
        batch, head, key, column = index
        block = sympy.Integer(BLOCK)
        which = e.value(self.table, (batch, floor_divide(key, block, e.ranges)), inside)
        number = e.as_symbol(which, _MOST_BLOCKS)
        within = (head, remainder(key, block, e.ranges), column)
        strides = e.region.strides(self.first)
        offset = number * e.region.numel(self.first) + sum(i * s for i, s in zip(within, strides, strict=True))
        return e.load_at(self.first, offset, inside)


@dataclasses.dataclass(frozen=True)
class QuantizedRows(Tailed):
    """Rows as codes [B, H, P, C] and params; `keys` have those for each channel of a group, values one for each row."""

    codes: Node
    params: Node
    kind: str
    keys: bool

    def stored(self, region: Region) -> sympy.Expr:
        return region.sizes(self.codes)[2]

    def stored_value(self, e: Evaluator, index: Index, inside: Guard) -> Value:
        batch, head, key, column = index
        size = e.region.sizes(self.tensor)[3]
        code = self._code(e, (batch, head, key), column, size, inside)
        row = floor_divide(key, sympy.Integer(quantized.GROUP), e.ranges) if self.keys else key
        first, numbers = (column, size) if self.keys else (sympy.Integer(0), sympy.Integer(1))
        scale = e.value(self.params, (batch, head, row, first), inside)
        text, uses = f"{code.text} * {scale.text}", code.uses | scale.uses
        if self.kind == "int4":
            offset = e.value(self.params, (batch, head, row, first + numbers), inside)
            text, uses = f"{text} + {offset.text}", uses | offset.uses
        return e.settle(expressions.rounded(f"({text})", self.dtype), self.dtype, uses)

    def _code(self, e: Evaluator, row: Index, column: sympy.Expr, size: sympy.Expr, inside: Guard) -> Value:
        """A code as a float32 number."""
        if self.kind == "int4":
            half = size // 2
            byte = e.value(self.codes, (*row, remainder(column, half, e.ranges)), inside)
            nibble, uses = e.index_text(floor_divide(column, half, e.ranges))
            text = f"(({byte.text}.to(tl.int32) >> (4 * ({nibble}))) & 15).to(tl.float32)"
            return e.settle(text, torch.float32, byte.uses | uses)
        byte = e.value(self.codes, (*row, column), inside)
        signed = f"{byte.text}.to(tl.int8, bitcast=True).to(tl.int32)"
        if self.kind == "int8":
            return e.settle(f"{signed}.to(tl.float32)", torch.float32, byte.uses)
        # e4m3: exponent and mantissa go to their places; the product mends the bias and makes small numbers normal. The
        # code of NaN comes out as 480: it occurs only under a scale that is not finite, which makes NaN of it.
        bits = f"(({signed} << 20) & {0x87F00000 - 2**32}).to(tl.float32, bitcast=True)"
        return e.settle(f"{bits} * {expressions.literal(2.0**120)}", torch.float32, byte.uses)


def rows_of(node: Node) -> tuple[Rows, Rows]:
    """The keys and values of an attention node of the dialect."""
    given = arguments(node)
    length = given.get("length")
    if "k_table" in given:
        made = [PagedRows(given[f"{s}_tail"], length, given[f"{s}_first"], given[f"{s}_table"]) for s in "kv"]
        return made[0], made[1]
    if "k_codes" in given:
        parts = [(given[f"{side}_tail"], length, given[f"{side}_codes"], given[f"{side}_params"]) for side in "kv"]
        return QuantizedRows(*parts[0], given["kind"], True), QuantizedRows(*parts[1], given["kind"], False)
    return PlainRows(given["k"]), PlainRows(given["v"])
