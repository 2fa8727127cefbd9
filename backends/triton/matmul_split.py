"""Matrix products of few tiles: the walks along k shared out among programs, and the kernel that merges them.

A product with few rows and columns has fewer tiles than a GPU has processors, and one with a few more tiles than
processors leaves most of them idle in its last wave. Then the steps of all tiles, one tile's after the other's, are
dealt out in equal runs to a fixed number of programs (stream-K, Osama et al., 2023; where that number is a multiple of
the tiles, it is split-K). A program leaves the sum of each tile that it worked on in scratch memory; a second kernel
adds up the sums of each tile, in the order of the programs, and runs the epilogue: bias, activation, gate, residual.

The sum of program p for tile t lies at slot p + t. No two share one: from one sum to the next, in the order of the
steps, either the program or the tile changes to the next.

How many programs. A tile is walked in steps of BLOCK_K. The time of a product is taken to be its roofline on the
device, where only the processors that are busy compute, and so many programs draw only so much of the bandwidth
(`cost.Device.drawn`); sharing out adds a launch, and the sums written and read.
Where this is less, tiles below the number of processors are cut so that there are two programs for each processor, of
`LEAST_STEPS` steps each at least; from there on there is one program for each processor. Where a norm is summed over
the rows first, every program would have to walk along all of k for it, and nothing is shared out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from graphopt import cost
from graphopt.backends.triton.matmul import MatmulSection
from graphopt.backends.triton.operands import Product
from graphopt.backends.triton.printer import text_of
from graphopt.backends.triton.region import Region
from graphopt.backends.triton.rows import Names, structures_before
from graphopt.backends.triton.source import Scratch

LEAST_STEPS = 4
"""Steps of a program at least: shorter walks do not fill the pipeline of loads."""
_SUMS = 1024
"""Sums that one program of the merging kernel handles."""


def split(region: Region, sections: Sequence[MatmulSection]) -> tuple[list[PartialSection], list[MergeSection]] | None:
    """The sections of the two kernels that a product is to be cut into, or None."""
    programs = _programs(region, sections)
    if programs is None or any(section.dtype == torch.float64 for section in sections):
        return None
    made = [(s.region, s.products, s.outputs, s.number, s.names, p) for s, p in zip(sections, programs, strict=True)]
    return [PartialSection(*each) for each in made], [MergeSection(*each) for each in made]


def _programs(region: Region, sections: Sequence[MatmulSection]) -> list[int] | None:
    """How many programs each section's steps are dealt out to; None where one program for each tile does as well."""
    tiles = [_tiles(region, section) for section in sections]
    bk = list(sections[0].blocks.values())[2]
    steps, device, whole = -(-region.example(sections[0].k.total) // bk), region.device, sum(tiles)
    if whole == 0 or steps < 2 * LEAST_STEPS or structures_before([s.products[0].left for s in sections]):
        return None
    alone = cost.region_cost(region.graph_module)
    moving = device.seconds(cost.Cost(region.example(alone.bytes)))
    computing = device.seconds(cost.Cost(flops=region.example(alone.flops)), sections[0].operands)
    if whole < device.processors:
        cuts = min(steps // LEAST_STEPS, math.ceil(2 * device.processors / whole))
        shares = [cuts * each for each in tiles]
    else:
        shares = [max(1, device.processors * each // whole) for each in tiles]
    blocks = (math.prod(list(section.blocks.values())[:2]) * len(section.sums) for section in sections)
    sums = sum(size * (share + each) for size, share, each in zip(blocks, shares, tiles, strict=True))
    extra = device.launch + 2 * 4 * sums / device.bandwidth
    now, then = (
        max(moving / device.drawn(running), computing / _busy(running, device.processors))
        for running in (whole, sum(shares))
    )
    return shares if then + extra < now else None


def _busy(programs: int, processors: int) -> float:
    """The share of processors that work, on average, while so many equal programs run."""
    return programs / (processors * math.ceil(programs / processors))


def _tiles(region: Region, section: MatmulSection) -> int:
    bm, bn, _ = section.blocks.values()
    rows, columns, batch = (region.example(a.total) for a in (section.m, section.n, section.batch))
    return -(-rows // bm) * -(-columns // bn) * batch


class DealtSection(MatmulSection):
    """What the two kernels have in common: how the steps are dealt out to `share` programs, and where sums lie.

    scratch: the sums of each product in each fold of its columns, [slots, rows of a tile, columns of a tile].
    """

    def __init__(
        self, region: Region, products: list[Product], outputs: list[int], number: int, names: Names, share: int
    ) -> None:
        super().__init__(region, products, outputs, number, names)
        self.constants = {**self.constants, f"PROGRAMS_{number}": share}
        self.tiles = super().programs
        bm, bn, _ = self.blocks
        elements = f"({self.tiles} + {share}) * {bm} * {bn}"
        self.scratch = [Scratch(f"parts{number}_{i}", torch.float32, elements) for i in range(len(self.sums))]

    def _dealing(self) -> list[str]:
        """How many steps there are of one tile, of all, and of one program."""
        number, bk = self.number, list(self.blocks)[2]
        tiles = self.tiles.replace("cdiv(", "tl.cdiv(")
        return [
            f"steps_{number} = tl.maximum(tl.cdiv({text_of(self.k.total)}, {bk}), 1)",
            f"all_{number} = {tiles} * steps_{number}",
            f"run_{number} = tl.cdiv(all_{number}, PROGRAMS_{number})",
        ]

    def _address(self, place: int, slot: str) -> str:
        """Where the sums of a product's tile lie, [rows, columns]; where there is one row, [columns, 1]."""
        bm, bn, _ = self.blocks
        name = self.scratch[place].name
        if self.one_row:
            return f"{name} + ({slot}).to(tl.int64) * {bn} + tl.arange(0, {bn})[:, None]"
        within = f"({self._rows()})[:, None] * {bn} + tl.arange(0, {bn})[None, :]"
        return f"{name} + ({slot}).to(tl.int64) * ({bm} * {bn}) + {within}"


class PartialSection(DealtSection):
    """The kernel that walks along k and leaves sums."""

    @property
    def programs(self) -> str:
        """How many programs the section needs."""
        return f"PROGRAMS_{self.number}"

    def lines(self, program: str) -> list[str]:
        """The section's lines; `program` is the number of the program within the section."""
        number, bk = self.number, list(self.blocks)[2]
        begin, end, tile = f"begin_{number}", f"end_{number}", f"which_{number}"
        head = [
            *self._dealing(),
            f"{begin} = {program} * run_{number}",
            f"{end} = tl.minimum({begin} + run_{number}, all_{number})",
            f"for turn_{number} in range({begin} // steps_{number}, tl.cdiv({end}, steps_{number})):",
        ]
        first, last = f"first_{number}", f"last_{number}"
        body = [
            f"{tile} = turn_{number} + 0 * {program}",
            *self._place(tile),
            f"{first} = tl.maximum({begin} - {tile} * steps_{number}, 0) * {bk}",
            f"{last} = tl.minimum({end} - {tile} * steps_{number}, steps_{number}) * {bk}",
        ]
        accumulators, walk = self._walk(first, last)
        body += walk
        for place, name in enumerate(accumulators):
            body.append(f"tl.store({self._address(place, f'{program} + {tile}')}, {self._total(name)})")
        return [*head, *(f"    {line}" for line in body)]


class MergeSection(DealtSection):
    """The kernel that adds the sums of each tile up and computes the outputs; several programs for a large tile."""

    def _configure(self) -> None:
        super()._configure()
        self.num_warps = 4
        bm, bn, _ = self.blocks.values()
        self.slices = 1 if self.one_row else max(1, bm * bn // _SUMS)
        self.height = bm // self.slices

    @property
    def programs(self) -> str:
        """How many programs the section needs."""
        return f"{self.slices} * {self.tiles}"

    def _rows(self) -> str:
        return f"slice_{self.number} * {self.height} + tl.arange(0, {self.height})"

    def _tile(self) -> tuple[str, str]:
        rows, columns = super()._tile()
        return (rows, columns) if self.one_row else (str(self.height), columns)

    def lines(self, program: str) -> list[str]:
        """The section's lines; `program` is the number of the program within the section."""
        number, tile = self.number, f"which_{self.number}"
        lines = [
            *self._dealing(),
            f"{tile} = {program} // {self.slices}",
            f"slice_{number} = {program} % {self.slices}",
            *self._place(tile),
            f"first_{number} = {tile} * steps_{number} // run_{number}",
            f"last_{number} = tl.cdiv(({tile} + 1) * steps_{number}, run_{number})",
        ]
        shape = f"[{', '.join(self._tile())}]"
        totals = [self.names.new("acc") for _ in self.sums]
        lines += [f"{name} = tl.full({shape}, 0, tl.float32)" for name in totals]
        lines.append(f"for turn_{number} in range(first_{number}, last_{number}):")
        for place, name in enumerate(totals):
            lines.append(f"    {name} += tl.load({self._address(place, f'turn_{number} + {tile}')})")
        return [*lines, *self._epilogue(totals)]
