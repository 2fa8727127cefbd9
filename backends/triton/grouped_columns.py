"""Reductions over groups of a product's columns, in its epilogue: the norm of a head, the scale of a group of codes.

A program computes all columns of a group (`graphopt.columns`), in a tile [rows, columns] for each fold. The tile is
taken for one with a row for each group, which is reduced as a row kernel reduces its rows, and what is found is spread
over the group's columns: whatever is computed from it is a tile like those of the product.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

from torch.fx import Node

from graphopt.backends.triton import structures
from graphopt.backends.triton.evaluate import Axis, Evaluator, Value
from graphopt.backends.triton.reductions import Part, Reduction, describe, finish, parts_of
from graphopt.backends.triton.region import Unsupported
from graphopt.backends.triton.rows import RowSection
from graphopt.columns import same_place
from graphopt.index_map import Index
from graphopt.row_ops import TOTALS


@dataclasses.dataclass
class _OfGroup(Reduction):
    """A reduction whose operand's elements are those of a tile. at: where the operand shows them."""

    at: Index = ()

    def element_index(self, x: Axis, r: Axis, evaluator: Evaluator) -> Index:
        """The index in the operand of the tile's elements."""
        return self.at


class GroupedColumns(RowSection):
    """What an epilogue asks for reductions of its product's columns.

    shown: where nodes show the element of the product that a place of the tile stands for, in each fold; tile: the
    sizes of a tile, as text; group: how many columns of a group are in one.
    """

    def __init__(
        self, evaluator: Evaluator, rows: Axis, columns: Axis, shown: Sequence[Mapping[Node, Index]],
        tile: tuple[str, str], group: int,
    ) -> None:
        self.region, self.evaluator, self.x, self.r = evaluator.region, evaluator, rows, columns
        self.shown = shown
        self.whole = f"[{', '.join(tile)}]"
        self.apart = f"[{' * '.join(size for size in tile if size != '1')} // {group}, {group}]"
        self._done: dict[Node, Reduction] = {}

    def reduction(self, node: Node, index: Index) -> Value:
        """A value of the program's groups, spread over their columns."""
        base, part = structures.picked(node)
        if base not in self._done:
            if base.target not in TOTALS or not all(base in shown for shown in self.shown):
                raise Unsupported("a reduction of a product over more than groups of its columns")
            self._done[base] = self._compute(base)
        if not all(same_place(shown[base], index) for shown in self.shown):
            raise Unsupported("a reduction over columns is read at another group than the program's")
        return finish(self, self._done[base], part)

    def _compute(self, node: Node) -> Reduction:
        found = describe(self.region, node)
        known = {field.name: getattr(found, field.name) for field in dataclasses.fields(found)}
        folds = [parts_of(_OfGroup(**known, at=shown[found.operand])) for shown in self.shown]
        for parts in sorted(zip(*folds, strict=True), key=lambda parts: parts[0].stage):
            self._reduce(list(parts))
        return found

    def _reduce(self, parts: list[Part]) -> None:
        """Reduce the tiles of all folds."""
        first, both = parts[0], frozenset({"m", "n"})
        tile = functools.reduce(first.combine, [part.element(self.evaluator, self) for part in parts])
        self.evaluator.helpers.update(first.helpers)
        rows = self.emit(f"tl.reshape({tile}, {self.apart})", both, "groups")
        made = self.emit(first.reduce(rows), both, first.hint)
        spread = self.emit(f"tl.reshape(tl.broadcast_to({made}, {self.apart}), {self.whole})", both, first.hint)
        self.remember((first.node, first.name), Value(spread, first.dtype, both))

    def masked(self, value: Value, carrier: str, identity: str) -> str:
        """A value as a whole tile; of a group all columns are there, so that none must be left out."""
        text = value.text if value.uses else f"tl.full([], {value.text}, {carrier})"
        return text if {"m", "n"} <= value.uses else f"tl.broadcast_to({text}, {self.whole})"

    def emit(self, text: str, uses: frozenset[str], hint: str = "v") -> str:
        """Assign to a new variable of the epilogue."""
        return self.evaluator.skeleton.emit(text, uses, hint)

    def remembered(self, key: Any) -> Value | None:
        """A value that the epilogue has computed before."""
        return self.evaluator.skeleton.remembered(key)

    def remember(self, key: Any, value: Value) -> None:
        """Keep a value."""
        self.evaluator.skeleton.remember(key, value)
