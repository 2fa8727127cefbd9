"""The matrix product skeleton: a contraction with a generated prologue on its operands and a generated epilogue.

Each program computes a tile of rows m and columns n, walking over k. Two forms:

* `tl.dot` tiles, programs in grouped order so that neighbours share operands in the cache;
* one row (decode): each program multiplies a band of the weight with the row and sums, reading the weight once at the
  speed of memory, with no padding to a tensor core's tile.

Operands are read through the evaluator, so a view, a cast or a norm before the product costs no pass of its own. A
norm's statistics are summed over the program's rows in a walk before the product. Several weights of one input (a
gate and its partner) accumulate side by side, and so do columns of one weight that an element of the epilogue reads
together, a rotary embedding's (`columns.py`), where it reduces groups of columns each program computes whole groups
(`grouped_columns.py`); weights whose results are independent are sections of one launch.
Products accumulate in float32, and bias is added before rounding, as cuBLAS and oneDNN do.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import sympy
import torch
from torch.fx import Node

from graphopt.backends.triton import expressions
from graphopt.backends.triton.depth import LOAD, Depth, cut_of
from graphopt.backends.triton.evaluate import Axis, Evaluator, Guard, Value, axis
from graphopt.backends.triton.grouped_columns import GroupedColumns
from graphopt.backends.triton.operands import Frame, LeftRows, Product, contraction_of, dot_operand, products_of
from graphopt.backends.triton.printer import text_of
from graphopt.backends.triton.region import Region, Unsupported
from graphopt.backends.triton.rows import Names, ancestors
from graphopt.backends.triton.source import power_of_two
from graphopt.columns import MOST_FOLDS, Columns, columns_of, places
from graphopt.index_inverse import base_of
from graphopt.index_map import Index

aten = torch.ops.aten

LEAST_BAND = 4
"""Rows of a weight that one program takes at least for a matrix-vector product: it reads the vector for each band."""


class MatmulSection:
    """The part of a kernel that computes the outputs of one product, or of several that an epilogue joins."""

    def __init__(self, region: Region, products: list[Product], outputs: list[int], number: int, names: Names) -> None:
        self.region, self.products, self.outputs, self.names = region, products, outputs, names
        self.results, self.nodes = [p.result for p in products], dict.fromkeys(region.graph_module.graph.nodes)
        first = products[0]
        sizes = region.sizes(first.result)
        left = region.sizes(first.left)
        lead = sizes[:-1] if not first.batched else sizes[1:-1]
        self.batch = axis("b", sizes[:1] if first.batched else (), f"b_{number}", None)
        self.m = axis("m", lead, f"m_{number}", f"m_mask_{number}")
        self.columns = self._columns()
        self.sums = list(itertools.product(products, range(self.columns.folds)))
        self.n = axis("n", self.columns.sizes(sizes[-1]), f"n_{number}", f"n_mask_{number}")
        self.k = axis("k", left[-1:], f"k_{number}", f"k_mask_{number}")
        self.one_row = self.m.total == 1
        rights = [p.right for p in products]
        self.cut = cut_of(region, first.left, rights, left[-1], self.one_row) if first.by_rows else None
        if self.cut is not None:
            walked = self.cut.sizes(int(left[-1]))
            self.k = dataclasses.replace(self.k, symbols=sympy.symbols(f"k:{len(walked)}"), sizes=walked)
        for each in (self.batch, self.m, self.n, self.k):
            each.symbols = tuple(sympy.Symbol(f"{s.name}_{number}", integer=True, nonnegative=True)
                                 for s in each.symbols)
        self.number = number
        self.helpers: set[str] = set()
        self.left: LeftRows | None = None
        self.dtype, self.operands = first.result.meta["val"].dtype, first.left.meta["val"].dtype
        self._configure()

    def _columns(self) -> Columns:
        """How columns are counted, so that one program computes all that an element of an output is made of."""
        if len({self.region.sizes(result) for result in self.results}) > 1:
            raise Unsupported("joined products of different sizes")
        outputs = [self.region.outputs[output] for output in self.outputs]
        found = columns_of(outputs, self.results, self.nodes, self.region.sizes)
        if isinstance(found, str):
            raise Unsupported(found)
        return found

    def _configure(self) -> None:
        """Tile sizes by the number of rows, of accumulators, and the operands' width."""
        rows = int(self.m.total) if self.m.total.is_Integer else 64
        wide = self.operands == torch.float32
        columns = int(self.n.total) if self.n.total.is_Integer else 128
        depth = int(self.k.total) if self.k.total.is_Integer else 128
        sums = min(power_of_two(len(self.sums)), MOST_FOLDS)
        if self.one_row:
            bm, bn, bk, self.num_warps, self.num_stages = 1, 16, 256, 4, 2
            while bn > LEAST_BAND and columns < bn * 2 * self.region.device.processors:
                bn, bk = bn // 2, bk * 2
        elif rows <= 16:
            bm, bn, bk, self.num_warps, self.num_stages = 16, min(32, 64 // sums), 128 if not wide else 64, 4, 3
        elif rows <= 64 or wide:
            bm, bn, bk, self.num_warps, self.num_stages = 64, 64 // sums, 64 if not wide else 32, 4, 3
        else:
            bm, bn, bk, self.num_warps, self.num_stages = 128, 128 // sums, 64, 8, 3
            if self.columns.folds > 1 and self.columns.within * self.dtype.itemsize < LOAD:
                bm, bn = bm // 2, bn // 2  # neighbours are read and stored one by one, with an address for each
        if wide and not self.one_row and any(p.right.op == "call_function" for p in self.products):
            bn, bk = 32, 32 if rows <= 16 else 16  # what is computed for a tile of float32 takes registers
        elif self.cut is not None and self.cut.pieces > 1 and bm > 16:
            bk //= 2  # a step multiplies as many positions of each piece
        least = 1 if self.one_row else 16
        bn, bk = (min(b, max(least, power_of_two(s))) for b, s in ((bn, columns), (bk, depth)))
        room = (bm + len(self.sums) * bn) * bk
        while bn < self.columns.held:
            bn, bm = bn * 2, bm // 2 if bm > 16 else bm
        while bk > 16 and (bm + len(self.sums) * bn) * bk > room:
            bk //= 2
        self.blocks = {f"BLOCK_M_{self.number}": bm, f"BLOCK_N_{self.number}": bn, f"BLOCK_K_{self.number}": bk}
        for each, block in ((self.m, bm), (self.n, bn), (self.k, bk)):
            if each.total.is_Integer and int(each.total) % block == 0 and each.total != 0:
                each.mask = None
        self.constants = {k: v for k, v in self.blocks.items()}
        self.depth = Depth(self.k, self.region.sizes(self.products[0].left)[-1], self.cut, list(self.blocks)[2],
                           not self.one_row)

    @property
    def programs(self) -> str:
        """How many programs the section needs."""
        bm, bn, _ = self.blocks
        tiles = f"cdiv({text_of(self.m.total)}, {bm}) * cdiv({text_of(self.n.total)}, {bn})"
        return tiles if self.batch.total == 1 else f"{text_of(self.batch.total, True)} * {tiles}"

    # -- text --------------------------------------------------------------------------------------------------

    def lines(self, program: str) -> list[str]:
        """The section's lines; `program` is the number of the program within the section."""
        accumulators, walk = self._walk("0", text_of(self.k.total))
        return [*self._place(program), *walk, *self._epilogue([self._total(name) for name in accumulators])]

    def _walk(self, first: str, last: str) -> tuple[list[str], list[str]]:
        """The accumulators of the sums, and the lines that fill them from k = first to last."""
        bm, _, bk = self.blocks
        self.left = left = LeftRows(self.region, self.products[0].left, self.names, self.m, self.depth, (bm, bk))
        if self.batch.symbols:
            left.evaluator.axes.append(self.batch)
        before = left.prepare()
        if self.batch.symbols:
            left.evaluator.axes.append(self.batch)
        if self.cut is not None and self.one_row:
            before.append(f"{self.n.position}_wide = {self.n.position}[:, :, None]")
            before += [f"{self.n.mask}_wide = {self.n.mask}[:, :, None]"] if self.n.mask else []
        inside = left.scopes[-1].lines
        operands = [self._left_operand(left.evaluator, piece) for piece in self.depth.pieces]
        accumulators = [self._accumulate(*each, operands, before, inside) for each in self.sums]
        self.helpers |= left.evaluator.helpers
        start = self.names.new("start")
        walk = [f"for {start} in range({first}, {last}, {bk}):"]
        walk += [f"    {line}" for line in (*left.steps(start), *inside)]
        return accumulators, [*before, *walk]

    def _total(self, accumulator: str) -> str:
        """A tile of sums."""
        if self.one_row:
            rows = f"tl.sum({accumulator}, 2)" if self.cut is not None else accumulator
            accumulator = f"tl.sum({rows}, 1, keep_dims=True)"
        return f"{accumulator}.to(tl.float32)" if self.operands == torch.int8 else accumulator

    def _place(self, program: str) -> list[str]:
        """Which tile a program computes: eight rows of tiles at a time, column by column."""
        bm, bn, _ = self.blocks
        m, n, number = self.m, self.n, self.number
        rows = self._rows()
        lines: list[str] = []
        if self.one_row:
            if self.batch.symbols:
                bands = f"bands_{number}"
                lines += [f"{bands} = tl.cdiv({text_of(n.total)}, {bn})",
                          f"{self.batch.position} = ({program} // {bands}).to(INDEX)"]
                program = f"({program} % {bands})"
            lines.append(f"{m.position} = tl.zeros([1, 1], INDEX)")
            lines.append(f"{n.position} = ({program}.to(INDEX) * {bn} + tl.arange(0, {bn}))[:, None]")
        else:
            tiles = f"tiles_{number}"
            lines += [f"rows_{number} = tl.cdiv({text_of(m.total)}, {bm})",
                      f"columns_{number} = tl.cdiv({text_of(n.total)}, {bn})"]
            if self.batch.symbols:
                lines += [f"{tiles} = rows_{number} * columns_{number}",
                          f"{self.batch.position} = ({program} // {tiles}).to(INDEX)",
                          f"tile_{number} = {program} % {tiles}"]
            else:
                lines.append(f"tile_{number} = {program}")
            lines += [f"band_{number} = tile_{number} // (8 * columns_{number})",
                      f"high_{number} = tl.minimum(rows_{number} - 8 * band_{number}, 8)",
                      f"row_{number} = 8 * band_{number} + tile_{number} % (8 * columns_{number}) % high_{number}",
                      f"column_{number} = tile_{number} % (8 * columns_{number}) // high_{number}",
                      f"{m.position} = (row_{number}.to(INDEX) * {bm} + {rows})[:, None]",
                      f"{n.position} = (column_{number}.to(INDEX) * {bn} + tl.arange(0, {bn}))[None, :]"]
        return lines + [f"{a.mask} = {a.position} < {text_of(a.total, True)}" for a in (m, n) if a.mask]

    def _rows(self) -> str:
        """The rows of a tile that a program computes."""
        return f"tl.arange(0, {list(self.blocks)[0]})"

    def _tile(self) -> tuple[str, str]:
        """The sizes of a tile in the epilogue."""
        bm, bn, _ = self.blocks
        return (bn, "1") if self.one_row else (bm, bn)

    def _left_operand(self, evaluator: Evaluator, piece: int) -> str:
        """A piece of the left operand, 0 behind the end of k."""
        left, depth = self.products[0].left, self.depth
        index = (*self._result_index()[:-1], depth.index(piece))
        guard = self._inside(evaluator, piece)
        value = evaluator.value(left, index, guard)
        masks = " & ".join(m for m in (*(a.mask for a in depth.left()), guard and guard[0]) if m)
        if self.one_row:
            text = f"tl.where({masks}, {value.text}, 0)" if masks else value.text
            return f"{text}.to(tl.int32)" if self.operands == torch.int8 else text
        bm, _, bk = self.blocks
        return dot_operand(evaluator, value, {"x", "r"}, masks, f"[{bm}, {bk}]")

    def _inside(self, evaluator: Evaluator, piece: int) -> Guard | None:
        """Where a walked position lies within k, if the masks of the axes do not tell."""
        if not self.depth.is_ragged:
            return None
        place, uses = evaluator.index_text(self.depth.index(piece))
        return evaluator.also(f"{place} < {text_of(self.depth.size)}", uses, None)

    def _accumulate(self, each: Product, fold: int, left: list[str], before: list[str], inside: list[str]) -> str:
        """The accumulator of a product in a fold of its columns, and lines that add a step to it."""
        bm, bn, bk = self.blocks
        n, down = self.n, self.depth.right()
        if self.cut is not None and self.one_row:
            n = dataclasses.replace(n, position=f"{n.position}_wide", mask=f"{n.mask}_wide" if n.mask else None)
        evaluator = Evaluator(self.region, Frame(self.names, before, inside, "k"), [*down, n, self.batch])
        values = [evaluator.value(each.right, self._right_index(each, fold, piece), self._inside(evaluator, piece))
                  for piece in self.depth.pieces]
        name, cut = self.names.new("acc"), self.cut
        tile = f"[{bn}, {bk}]" if cut is None else f"[{bn}, {bk} // {cut.run}, {cut.run}]"
        kind = {torch.float64: "tl.float64", torch.int8: "tl.int32"}.get(self.operands, "tl.float32")
        before.append(f"{name} = tl.full({tile if self.one_row else f'[{bm}, {bn}]'}, 0, {kind})")
        exact = "" if self.operands == torch.int8 else ", input_precision='ieee'"
        for a, b in zip(left, values, strict=True):
            if self.one_row:
                inside.append(f"{name} += {a} * {b.text}")
                continue
            if cut is None:
                right = dot_operand(evaluator, b, {"k", "n"}, down[0].mask, f"[{bk}, {bn}]")
            else:
                whole = f"[{bk} // {cut.run}, {cut.run}, {bn}]"
                right = f"tl.reshape(tl.broadcast_to({evaluator.narrow(b)}, {whole}), [{bk}, {bn}])"
            inside.append(f"{name} = tl.dot({a}, {right}, {name}{exact})")
        self.helpers |= evaluator.helpers
        return name

    def _epilogue(self, totals: list[str]) -> list[str]:
        """Lines that compute and store the outputs from the products' sums."""
        lines: list[str] = []
        frame = Frame(self.names, lines, lines, "", self.left)
        evaluator = Evaluator(self.region, frame, [self.m, self.n, self.batch])
        folds = self.columns.folds
        for place, each in enumerate(self.products):
            evaluator.bound[each.result] = self._bind(each, totals[place * folds : (place + 1) * folds], evaluator)
        shown = [self._shown(fold, evaluator) for fold in range(folds)]
        if self.columns.together:
            frame.columns = GroupedColumns(evaluator, self.m, self.n, shown, self._tile(), self.columns.held)
        for output, fold in itertools.product(self.outputs, range(folds)):
            self._store(output, fold, shown[fold], evaluator, lines)
        self.helpers |= evaluator.helpers
        return lines

    def _bind(self, each: Product, totals: list[str], evaluator: Evaluator) -> Any:
        """The product's rounded values at the indices of its folds; asked at another place there is no kernel."""
        own = [self._result_index(fold) for fold in range(len(totals))]
        uses = frozenset({"m", "n"})
        known: dict[int, Value] = {}

        def value(index: Index) -> Value:
            asked = tuple(map(sympy.expand, index))
            if asked not in own:
                raise Unsupported("a product is read at another place than its tile")
            fold = own.index(asked)
            if fold not in known:
                text = totals[fold]
                if each.bias is not None:
                    bias = evaluator.operand(each.bias, own[fold])
                    text = f"{text} + {bias.text}"
                known[fold] = evaluator.settle(expressions.rounded(text, self.dtype), self.dtype, uses)
            return known[fold]

        return value

    def _shown(self, fold: int, evaluator: Evaluator) -> dict[Node, Index]:
        """Where nodes show the element that a place of the tile stands for."""
        within = self._counted()[1:]
        return places(self.results, self._result_index(fold), self.nodes, self.region.sizes, evaluator.ranges, within)

    def _store(
        self, output: int, fold: int, shown: dict[Node, Index], evaluator: Evaluator, lines: list[str]
    ) -> None:
        node = self.region.outputs[output]
        if node not in shown:
            raise Unsupported("an epilogue of another size than its product")
        once = self.region.numel(node) != self.region.numel(self.results[0])
        if once and fold > 0:
            return  # of a group there is one number, which all folds know
        base = base_of(node)
        value = evaluator.value(base, shown[base])
        address, mask, uses = evaluator.stored(output, shown[node])
        for missing in [a for a in (self.m, self.n) if a.name not in uses]:
            address += f" + 0 * {missing.position}"
            mask = " & ".join(x for x in (mask, missing.mask) if x)
        if once:
            mask = " & ".join(x for x in (mask, f"({self.n.position} % {self.columns.held} == 0)") if x)
        dtype = node.meta["val"].dtype
        text = f"{value.text}.to({expressions.STORED[dtype]})" if dtype in expressions.ROUNDED else value.text
        lines.append(f"tl.store(out{output} + {address}, {text}{f', mask={mask}' if mask else ''})")

    # -- indices -----------------------------------------------------------------------------------------------

    def _along(self, current: Axis, sizes: Index) -> Index:
        symbols = iter(current.symbols)
        return tuple(sympy.Integer(0) if s == 1 else next(symbols) for s in sizes)

    def _result_index(self, fold: int = 0) -> Index:
        sizes = self.region.sizes(self.products[0].result)
        if self.products[0].batched:
            parts = (self.batch, sizes[:1]), (self.m, sizes[1:2])
        else:
            parts = (self.batch, ()), (self.m, sizes[:-1])
        return *(i for current, own in parts for i in self._along(current, own)), self._column(fold)

    def _counted(self) -> Index:
        """How a place along n is counted (`columns.py`)."""
        return self._along(self.n, self.columns.sizes(self.region.sizes(self.products[0].result)[-1]))

    def _column(self, fold: int) -> sympy.Expr:
        """The column in a fold, of all products."""
        return self.columns.index(self._counted(), fold)

    def _right_index(self, each: Product, fold: int, piece: int) -> Index:
        along_k = self.depth.index(piece)
        if each.by_rows:
            return self._column(fold), along_k
        own = along_k, self._column(fold)
        return (*self._result_index()[:1], *own) if each.batched else own


def matmul_sections(region: Region, names: Names) -> list[MatmulSection]:
    """One section for every set of products that an output joins."""
    contraction = contraction_of(region)
    assert contraction is not None
    products = products_of(contraction)
    sections: list[tuple[list[Product], list[int]]] = []
    for output, node in enumerate(region.outputs):
        before = ancestors(node)
        mine = [p for p in products if p.result in before]
        if not mine:
            raise Unsupported("an output that does not need the product")
        shared = [s for s in sections if any(p in s[0] for p in mine)]
        joined = [p for p in products if p in mine or any(p in s[0] for s in shared)]
        outputs = [o for s in shared for o in s[1]] + [output]
        sections = [s for s in sections if s not in shared] + [(joined, outputs)]
    return [MatmulSection(region, p, o, i, names) for i, (p, o) in enumerate(sections)]
