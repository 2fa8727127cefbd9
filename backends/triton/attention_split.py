"""Few queries against many keys: the keys of one head shared out among programs, whose sums the last one merges.

With few queries there are fewer heads than a GPU has processors, so each program takes a run of keys and leaves what it
summed, unnormalised, in scratch memory (flash-decoding, Dao et al. 2023). Then it counts itself as arrived; the program
that finds all others there adds the runs of the head up, in their order, so that the result does not depend on which
came last, and sets the count back to 0. One launch does both.

That the last program sees what the others wrote: a barrier puts the stores of all of a program's threads before its
count, which releases them to the device and acquires those of the programs counted before.

`parts` is float32 [batch * heads * queries, runs, width + 2]: the weighted sum of the values, the largest score, and
the sum of the weights under it. `arrived` is int32, one for each tile of rows; it is 0 before and after each launch.
"""

from __future__ import annotations

import dataclasses

import sympy
import torch

from graphopt.backends.triton.evaluate import Axis
from graphopt.backends.triton.printer import text_of
from graphopt.backends.triton.rows import Names
from graphopt.backends.triton.source import Scratch, power_of_two

SPLIT_KEYS = 256
"""Keys of a run: their bytes are fifty times those of the sums that a run leaves for one row."""
_MERGED_AT_ONCE = 4096
"""Sums that the merging program holds in registers: rows times columns times runs."""


@dataclasses.dataclass(frozen=True)
class Runs:
    """The runs of the keys of one attention.

    number: of its section. keys: how many there are. rows: of the output, B * H * S. tiles: of rows that a program
    owns. m, columns: the axes of those rows and of the values' columns.
    """

    number: int
    keys: sympy.Expr
    rows: sympy.Expr
    tiles: sympy.Expr
    m: Axis
    columns: Axis

    @property
    def count(self) -> str:
        """How many runs there are, as text: one for no keys, so that there is a program to say so."""
        return f"max(cdiv({text_of(self.keys)}, {SPLIT_KEYS}), 1)"

    @property
    def scratch(self) -> tuple[Scratch, Scratch]:
        """`parts` and `arrived`."""
        elements = f"{text_of(self.rows, True)} * {self.count} * {self._length}"
        arrived = Scratch("arrived", torch.int32, text_of(self.tiles), zeroed=True)
        return Scratch("parts", torch.float32, elements), arrived

    @property
    def _length(self) -> int:
        return int(self.columns.total) + 2

    def begin(self, program: str) -> list[str]:
        """Which run of which tile a program walks."""
        runs, run = f"runs_{self.number}", f"run_{self.number}"
        count = self.count.replace("max(cdiv(", "tl.maximum(tl.cdiv(")
        return [f"{runs} = {count}", f"{run} = {program} % {runs}", f"tile_{self.number} = {program} // {runs}"]

    def limits(self) -> tuple[str, str]:
        """The first key of the run, and the one behind its last."""
        first = f"run_{self.number} * {SPLIT_KEYS}"
        return first, f"tl.minimum({first} + {SPLIT_KEYS}, {text_of(self.keys)})"

    def leave(self, row: str, top: str, total: str, acc: str) -> list[str]:
        """Store what the run's keys gave for the rows [M, 1]."""
        m, columns, place = self.m, self.columns, f"place_{self.number}"
        inside = " & ".join(mask for mask in (m.mask, columns.mask) if mask)
        only, rows = (f", mask={mask}" if mask else "" for mask in (inside, m.mask))
        width = self._length - 2
        return [
            f"{place} = parts + (({row} + 0 * {m.position}) * runs_{self.number} + run_{self.number}) * {width + 2}",
            f"tl.store({place} + {columns.position}, {acc}{only})",
            f"tl.store({place} + {width}, {top}{rows})",
            f"tl.store({place} + {width + 1}, {total}{rows})",
        ]

    def arrive(self) -> tuple[list[str], str]:
        """Count the program as arrived; the condition that it is the last."""
        before = f"before_{self.number}"
        counted = f'tl.atomic_add(arrived + tile_{self.number}, 1, sem="acq_rel", scope="gpu")'
        return ["tl.debug_barrier()", f"{before} = {counted}"], f"{before} == runs_{self.number} - 1"

    def own(self) -> Axis:
        """The rows of a tile as a merge has them: no more than there are, where that is known."""
        return dataclasses.replace(self.m, position=f"own_{self.number}", mask=f"own_mask_{self.number}")

    def merge(self, names: Names, row: str, places: list[str]) -> tuple[list[str], str, str]:
        """Lines that add the runs up, and the names of the weights' sums and of the values'.

        row: of the output, [rows, 1], for the rows of `own`; places: the lines that `row` needs.
        """
        own, number, width = self.own(), self.number, self._length - 2
        rows, columns = power_of_two(int(self.m.total)), max(16, power_of_two(width))
        runs = max(1, _MERGED_AT_ONCE // (rows * columns))
        top, total, acc, each, there, place = map(names.new, ("top", "total", "acc", "each", "there", "part"))
        sums, tops, totals = map(names.new, ("sums", "tops", "totals"))
        new, safe, fade, weights = map(names.new, ("new", "safe", "fade", "weights"))
        kept = f"{there} & ({self.columns.position} < {width})[None, :, :]"
        walk = [
            f"{each} = turn_{number} + tl.arange(0, {runs})[:, None, None]",
            f"{there} = ({each} < runs_{number}) & {own.mask}[None, :, :]",
            f"{place} = parts + ((({row} + 0 * {own.position}) * runs_{number})[None, :, :] + {each}) * {width + 2}",
            f"{sums} = tl.load({place} + {self.columns.position}[None, :, :], mask={kept}, other=0.0)",
            f"{tops} = tl.load({place} + {width}, mask={there}, other=float('-inf'))",
            f"{totals} = tl.load({place} + {width + 1}, mask={there}, other=0.0)",
            f"{new} = tl.maximum({top}, tl.max({tops}, 0))",
            f"{safe} = tl.where({new} == float('-inf'), 0.0, {new})",
            f"{fade} = tl.exp({top} - {safe})",
            f"{weights} = tl.exp({tops} - {safe}[None, :, :])",
            f"{total} = {total} * {fade} + tl.sum({totals} * {weights}, 0)",
            f"{acc} = {acc} * {fade} + tl.sum({sums} * {weights}, 0)",
            f"{top} = {new}",
        ]
        lines = [
            f"tl.store(arrived + tile_{number}, 0)",
            f"{own.position} = tl.arange(0, {rows})[:, None].to(INDEX)",
            f"{own.mask} = {own.position} < {text_of(self.m.total)}",
            *places,
            f"{top} = tl.full([{rows}, 1], float('-inf'), tl.float32)",
            f"{total} = tl.full([{rows}, 1], 0, tl.float32)",
            f"{acc} = tl.full([{rows}, {columns}], 0, tl.float32)",
            f"for turn_{number} in range(0, runs_{number}, {runs}):",
            *(f"    {line}" for line in walk),
        ]
        return lines, total, acc
