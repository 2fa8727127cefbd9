"""Few and very long rows: each row shared out among programs, in one kernel for each level of reductions.

One program for each row would leave a GPU idle. So a row is cut into parts. A kernel for each level of reductions
leaves what each part comes to in scratch memory; the next kernel begins by merging those of its rows, a few hundred
numbers from the cache, and the last writes what depends on them: a softmax over one row of a million takes three
launches, a sum, a mean, an argmax or a variance two. Parts are merged in one order, whatever order they ran in.

A part finds the place of its own extreme and the squares about its own mean, so that these cost no kernel more: of
the parts that hold the extreme the first place counts, and squares are moved to the common mean (Chan, Golub and
LeVeque, 1979).

Scratch memory is [rows, parts], in the type that a reduction accumulates in. Sizes may be symbolic: the number of parts
is fixed, their length is reckoned in the kernel.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from graphopt import cost, row_ops
from graphopt.backends.triton import expressions
from graphopt.backends.triton.printer import text_of
from graphopt.backends.triton.reductions import Part, Reduction, mean_of, parts_of
from graphopt.backends.triton.region import Region
from graphopt.backends.triton.rows import Names, RowSection
from graphopt.backends.triton.source import Scratch, power_of_two

MOST_PROGRAMS = 1024
"""Enough to keep every multiprocessor of the largest GPU busy."""
STEP = 1024
"""Columns at a time: parts are multiples of it, so it is shorter than in a kernel that walks a whole row."""
_MOST_PARTS = 4096
"""Numbers of a merge that a program holds in registers: parts of one row times rows."""
_TYPES = {carrier: dtype for dtype, carrier in expressions.CARRIERS.items() if dtype not in expressions.ROUNDED}


def split(region: Region, groups: Sequence[Sequence[int]]) -> list[SplitRows]:
    """The kernels of a region, in order, if its rows are to be cut into parts; else none."""
    if len(groups) != 1:
        return []
    whole = RowSection(region, groups[0], 0, Names())
    if not whole.looped or any(r.node.target in row_ops.SCANS for r in whole.reductions):
        return []
    parts = _parts(region, whole)
    if parts == 1:
        return []
    levels = 1 + max(r.level for r in whole.reductions)
    return [SplitRows(region, groups[0], parts, phase) for phase in range(levels + 1)]


def _parts(region: Region, whole: RowSection) -> int:
    """Into how many parts a row is cut: 1 where the cost model does not expect it to pay."""
    assert whole.r is not None
    rows, columns = region.example(whole.x.total), region.example(whole.r.total)
    xblock, rblock = whole.constants[whole.xblock], min(STEP, whole.constants[whole.rblock])
    programs = max(1, -(-rows // xblock))
    parts = min(MOST_PROGRAMS // programs, _MOST_PARTS // xblock, power_of_two(-(-columns // rblock)))
    if parts < 2:
        return 1
    parts = power_of_two(parts + 1) // 2
    device = region.device
    moved = region.example(cost.region_cost(region.graph_module).bytes)
    levels = 1 + max(r.level for r in whole.reductions)
    together = [device.drawn(running) for running in (programs, programs * parts)]
    walks = levels * moved / device.bandwidth
    return parts if walks / together[1] + levels * device.launch < walks / together[0] else 1


class SplitRows(RowSection):
    """One of the kernels: that of a level of reductions, or the last, which writes what depends on them.

    leaves: the scratch memory that it fills.
    """

    def __init__(self, region: Region, outputs: Sequence[int], parts: int, phase: int) -> None:
        super().__init__(region, outputs, 0, Names())
        self.phase, self.parts = phase, parts
        self.levels = 1 + max(r.level for r in self.reductions)
        self._sums = {
            (p.node, p.name): (f"parts{number}", p)
            for number, p in enumerate(p for r in sorted(self.reductions, key=lambda r: r.level) for p in parts_of(r))
        }
        self.current = [r for r in self.reductions if r.level == phase]
        own = [self._sums[p.node, p.name] for r in self.current for p in parts_of(r)]
        elements = f"{text_of(self.x.total, True)} * {parts}"
        self.leaves = [Scratch(name, _TYPES[part.carrier], elements) for name, part in own]
        self._full = [o for o in self.outputs if self._is_full(o) and self._depth(region.outputs[o]) == phase]
        step = min(STEP, self.constants[self.rblock])
        self.constants |= {self.rblock: step, "PARTS": parts}
        self.num_warps = max(1, self.constants[self.xblock] * step // 256)

    @property
    def _walks(self) -> bool:
        """Does it walk along the rows, or only merge?"""
        return bool(self.current or self._full)

    @property
    def programs(self) -> str:
        """How many programs it needs."""
        return f"{super().programs} * PARTS" if self._walks else super().programs

    def _bounds(self) -> tuple[str, str]:
        return "first", "last"

    def lines(self, program: str) -> list[str]:
        """The lines of the kernel."""
        assert self.r is not None
        row = f"{program} // PARTS" if self._walks else program
        head = [f"{self.x.position} = (({row}).to(INDEX) * {self.xblock} + tl.arange(0, {self.xblock}))[:, None]"]
        if self.x.mask:
            head.append(f"{self.x.mask} = {self.x.position} < {text_of(self.x.total, True)}")
        head += [f"at = {self.x.position} * PARTS", "part = tl.arange(0, PARTS)[None, :]", *self._sizes()]
        if self._walks:
            own = f"{program} % PARTS"
            head += [
                f"own = ({own}).to(tl.int64)",
                "first = own * length",
                f"last = tl.minimum(first + length, {text_of(self.r.total, True)})",
            ]
        for reduction in self.reductions:
            if reduction.level < self.phase:
                self._merge(reduction)
        stages = [[p for r in self.current for p in parts_of(r) if p.stage == stage] for stage in (0, 1)]
        with self._walk(bool(stages[0] or self._full)):
            self._reduce(stages[0])
            for output in self._full:
                self._store(output)
        for reduction in self.current:
            if reduction.node.target in row_ops.VARIANCES:
                self._own_mean(reduction)
        with self._walk(bool(stages[1])):
            self._reduce(stages[1])
        for reduction in self.current:
            self._leave(reduction)
        if self.phase == self.levels:
            self._write_rows()
        return head + self.scopes[0].lines

    def _sizes(self) -> list[str]:
        """The length of a part, and how many columns each part has: the last ones may have less, or none."""
        assert self.r is not None
        columns = text_of(self.r.total, True)
        return [
            f"length = tl.cdiv(tl.cdiv({columns}, PARTS), {self.rblock}) * {self.rblock}",
            f"counts = tl.minimum(tl.maximum({columns} - part.to(tl.int64) * length, 0), length)",
        ]

    def _own_mean(self, reduction: Reduction) -> None:
        """Let the squares be taken about the mean of the part."""
        total = self.remembered((reduction.node, "total"))
        assert total is not None
        carrier = expressions.CARRIERS[total.dtype]
        mean = f"{total.text} / tl.maximum(last - first, 1).to({carrier})"
        self.remember((reduction.node, "mean"), self.evaluator.settle(mean, total.dtype, total.uses))

    def _leave(self, reduction: Reduction) -> None:
        """Write what the part comes to."""
        for part in parts_of(reduction):
            value = self.remembered((part.node, part.name))
            assert value is not None
            mask = f", mask={self.x.mask}" if self.x.mask else ""
            name, _ = self._sums[part.node, part.name]
            self.scopes[0].lines.append(f"tl.store({name} + at + own, {value.text}{mask})")

    def _merge(self, reduction: Reduction) -> None:
        """Read what the parts came to, and make the result of it."""
        parts = parts_of(reduction)
        tiles = {part.name: self._read(part) for part in parts}
        for part in parts:
            text = tiles[part.name]
            if part.name == "position":
                text = self._places(reduction, tiles)
            elif part.name == "squares":
                text = self._about_common_mean(reduction, part, tiles)
            self._finish(part, text, self.scopes[0].lines)

    def _read(self, part: Part) -> str:
        name, _ = self._sums[part.node, part.name]
        mask = f", mask={self.x.mask}, other={part.identity}" if self.x.mask else ""
        return self.emit(f"tl.load({name} + at + part{mask})", frozenset({"x"}), "tile")

    def _places(self, reduction: Reduction, tiles: dict[str, str]) -> str:
        """The places of those parts that hold the extreme; a NaN counts as it."""
        best = self.remembered((reduction.node, "best"))
        assert best is not None
        hit = f"({tiles['best']} == {best.text})"
        if best.dtype.is_floating_point:
            hit = f"({hit} | ({tiles['best']} != {tiles['best']}))"
        none = torch.iinfo(torch.int64).max
        return self.emit(f"tl.where({hit}, {tiles['position']}, {none})", frozenset({"x"}), "places")

    def _about_common_mean(self, reduction: Reduction, squares: Part, tiles: dict[str, str]) -> str:
        """The squares of each part, moved from its own mean to that of the row."""
        total = self.remembered((reduction.node, "total"))
        assert total is not None
        carrier = expressions.CARRIERS[total.dtype]
        mean = mean_of(reduction, self)
        self.remember((reduction.node, "mean"), mean)
        here = frozenset({"x"})
        counts = self.emit(f"counts.to({carrier})", here, "counts")
        own = self.evaluator.settle(f"{tiles['total']} / tl.maximum({counts}, 1)", squares.dtype, here)
        away = self.emit(f"tl.where({counts} > 0, {own.text} - {mean.text}, 0)", here, "away")
        return self.emit(f"{tiles['squares']} + {counts} * {away} * {away}", here, "squares")

    def _write_rows(self) -> None:
        """Store what there is one of for each row; of the programs of a row the first does it."""
        rows = [o for o in self.outputs if not self._is_full(o)]
        whole, self.scopes[0].lines = self.scopes[0].lines, []
        for output in rows:
            self._store(output)
        mine, self.scopes[0].lines = self.scopes[0].lines, whole
        if mine and self._walks:
            mine = ["if own == 0:", *(f"    {line}" for line in mine)]
        self.scopes[0].lines += mine
