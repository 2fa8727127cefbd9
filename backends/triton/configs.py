"""Which configurations of a kernel `mode="max-autotune"` tries; without it, the default of its section is taken.

A configuration changes the sizes of blocks, warps and stages, and nothing of the kernel's text. So a block may only be
of a size whose end the text masks, or that divides the axis; and where the text or scratch memory was laid out for a
block (several kernels for one region, several sections in one launch), only warps and stages differ.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from graphopt.backends.triton.attention import AttentionSection
from graphopt.backends.triton.evaluate import Axis
from graphopt.backends.triton.matmul import MatmulSection
from graphopt.backends.triton.rows import RowSection
from graphopt.backends.triton.source import power_of_two
from graphopt.runtime.autotune import Config

MOST_ELEMENTS = 16_384
"""Of a tile of a row kernel: larger ones spill."""

_PRODUCTS: tuple[tuple[int, int, int, int, int], ...] = (
    (16, 32, 128, 4, 3), (16, 64, 128, 4, 4), (16, 128, 64, 4, 4), (32, 64, 64, 4, 3), (64, 32, 64, 4, 3),
    (64, 64, 32, 4, 3), (64, 64, 64, 4, 3), (64, 128, 32, 4, 4), (64, 128, 64, 4, 3), (128, 64, 64, 4, 3),
    (128, 64, 64, 8, 3), (128, 128, 32, 4, 4), (128, 128, 32, 8, 3), (128, 128, 64, 8, 3), (128, 128, 64, 8, 4),
    (128, 256, 64, 8, 3), (256, 128, 64, 8, 3),
)  # fmt: skip


def configs(sections: Sequence[Any], whole: bool) -> tuple[Config, ...]:
    """The configurations of a kernel, its default first. whole: it is all that its region launches."""
    constants = {k: v for section in sections for k, v in section.constants.items()}
    warps, stages = max(s.num_warps for s in sections), max(s.num_stages for s in sections)
    found = {Config(tuple(constants.items()), warps, stages): None}
    made: Iterable[tuple[dict[str, int], int, int]] = [({}, w, stages) for w in _around(warps)]
    if whole and len(sections) == 1:
        (section,) = sections
        if type(section) is RowSection:
            made = _rows(section)
        elif type(section) is MatmulSection:
            made = _product(section)
        elif type(section) is AttentionSection:
            made = _attention(section)
    for changed, num_warps, num_stages in made:
        found[Config(tuple((constants | changed).items()), num_warps, num_stages)] = None
    return tuple(found)


def _around(warps: int) -> list[int]:
    return [w for w in (warps // 2, warps, warps * 2) if 1 <= w <= 16]


def _may_be(axis: Axis, block: int) -> bool:
    """May the blocks along an axis have this size?"""
    return axis.mask is not None or bool(axis.total.is_Integer and int(axis.total) % block == 0)


def _rows(section: RowSection) -> Iterable[tuple[dict[str, int], int, int]]:
    own, rows = section.constants[section.xblock], section.x.total
    most = power_of_two(int(rows)) if rows.is_Integer else MOST_ELEMENTS
    xblocks = [x for x in (own // 4, own // 2, own, own * 2, own * 4) if 1 <= x <= most and _may_be(section.x, x)]
    rblocks = [1]
    if section.r is not None:
        rblocks = [section.constants[section.rblock]]
        if section.looped:
            rblocks = [r for r in (rblocks[0] // 2, rblocks[0], rblocks[0] * 2) if _may_be(section.r, r)]
    for x in xblocks:
        for r in rblocks:
            changed = {section.xblock: x} | ({section.rblock: r} if section.r is not None else {})
            if 32 <= x * r <= MOST_ELEMENTS:
                for warps in _around(min(16, max(1, x * r // 256))):
                    yield changed, warps, section.num_stages


def _product(section: MatmulSection) -> Iterable[tuple[dict[str, int], int, int]]:
    names = list(section.blocks)
    listed = _PRODUCTS
    if section.one_row:
        listed = tuple((1, n, size // n, w, 2) for n in (2, 4, 8, 16) for size in (2048, 4096, 8192) for w in (2, 4, 8))
    for *blocks, warps, stages in listed:
        runs = blocks[2] % (section.cut.run if section.cut else 1) == 0 and blocks[1] % section.columns.held == 0
        if runs and all(_may_be(a, block) for a, block in zip((section.m, section.n, section.k), blocks, strict=True)):
            yield dict(zip(names, blocks, strict=True)), warps, stages


def _attention(section: AttentionSection) -> Iterable[tuple[dict[str, int], int, int]]:
    m, t, _, _ = section.blocks
    rows = section.blocks[m] if section.m.total.is_Integer and int(section.m.total) <= section.blocks[m] else 128
    for bm in (16, 32, 64, 128):
        for bt in (16, 32, 64, 128):
            if bm <= rows and _may_be(section.m, bm) and not (section.runs and bt > 64):
                for warps, stages in ((4, 2), (4, 3), (8, 2)):
                    yield {m: bm, t: bt}, warps, stages
