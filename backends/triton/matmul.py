"""The matrix product skeleton: a contraction with a generated prologue on its operands and a generated epilogue.

Each program computes a tile of rows m and columns n, walking over k. Two forms:

* `tl.dot` tiles, programs in grouped order so that neighbours share operands in the cache;
* one row (decode): each program multiplies a band of the weight with the row and sums, reading the weight once at the
  speed of memory, with no padding to a tensor core's tile.

Operands are read through the evaluator, so a view, a cast or a norm before the product costs no pass of its own. A
norm's statistics are summed over the program's rows in a walk before the product. Several weights of one input (a
gate and its partner) accumulate side by side; weights whose results are independent are sections of one launch.
Products accumulate in float32, and bias is added before rounding, as cuBLAS and oneDNN do.
"""

from __future__ import annotations

import dataclasses
import operator
from typing import Any

import sympy
import torch
from torch.fx import Node

from graphopt.backends.triton import expressions
from graphopt.backends.triton.evaluate import Axis, Evaluator, Value, axis
from graphopt.backends.triton.printer import text_of
from graphopt.backends.triton.reductions import describe
from graphopt.backends.triton.region import Region, Unsupported
from graphopt.backends.triton.rows import Names, RowSection, Scope, ancestors, structures_before
from graphopt.backends.triton.source import power_of_two
from graphopt.index_inverse import base_of, shown_index
from graphopt.index_map import Index, flatten, product, unflatten

aten = torch.ops.aten

CONTRACTIONS = ("aten.mm.default", "aten.addmm.default", "aten.bmm.default", "graphopt.linear.default",
                "graphopt.parallel_linear.default")


LEAST_BAND = 4
"""Rows of a weight that one program takes at least for a matrix-vector product: it reads the vector for each band."""


@dataclasses.dataclass(frozen=True)
class Product:
    """One matrix product: its result node, its operands, and whether the weight is stored [N, K] rather than [K, N]."""

    result: Node
    left: Node
    right: Node
    bias: Node | None
    by_rows: bool
    batched: bool


def contraction_of(region: Region) -> Node | None:
    """The region's matrix product, if it has one."""
    return next((n for n in region.graph_module.graph.nodes if str(n.target) in CONTRACTIONS), None)


def products_of(node: Node) -> list[Product]:
    """The products of a contraction node; several for several weights. Raises Unsupported for other forms."""
    name, args = str(node.target), node.args
    if name == "aten.addmm.default":
        if any(node.kwargs.get(k, 1) != 1 for k in ("alpha", "beta")):
            raise Unsupported("addmm with alpha or beta")
        return [Product(node, args[1], args[2], args[0], False, False)]  # type: ignore[arg-type]
    if name in ("aten.mm.default", "aten.bmm.default"):
        return [Product(node, args[0], args[1], None, False, name == "aten.bmm.default")]  # type: ignore[arg-type]
    if name == "graphopt.linear.default":
        return [Product(node, args[0], args[1], args[2] if len(args) > 2 else None, True, False)]  # type: ignore[arg-type]
    picks = {u.args[1]: u for u in node.users if u.target is operator.getitem}
    return [Product(picks[i], args[0], w, args[2][i], True, False)  # type: ignore[index, arg-type]
            for i, w in enumerate(args[1]) if i in picks]  # type: ignore[arg-type]


class Frame:
    """A skeleton for the evaluator: lines inside of the walk over k for what uses it, before the walk for the rest."""

    def __init__(self, names: Names, before: list[str], inside: list[str], walked: str) -> None:
        self.names, self.before, self.inside, self.walked = names, before, inside, walked
        self.memory: dict[Any, Value] = {}

    def emit(self, text: str, uses: frozenset[str], hint: str = "v") -> str:
        """Assign to a new variable."""
        name = self.names.new(hint)
        (self.inside if self.walked in uses else self.before).append(f"{name} = {text}")
        return name

    def remembered(self, key: Any) -> Value | None:
        """A value computed before."""
        return self.memory.get(key)

    def remember(self, key: Any, value: Value) -> None:
        """Keep a value."""
        self.memory[key] = value

    def reduction(self, node: Node, index: Index) -> Value:
        """A reduction outside of the left operand's rows has no place here."""
        raise Unsupported("a reduction beside a matrix product")


class LeftRows(RowSection):
    """The left operand's rows: the reductions that its elements need, then its elements along the walk over k."""

    def __init__(self, region: Region, left: Node, names: Names, m: Axis, k: Axis, blocks: tuple[str, str]) -> None:
        self.region, self.names, self.outputs = region, names, []
        self.reductions = [describe(region, n) for n in structures_before([left])]
        for reduction in self.reductions:
            if product(reduction.kept_sizes) != m.total or product(reduction.reduced_sizes) != k.total:
                raise Unsupported("a reduction over other rows than the product's")
        self.x, self.r = dataclasses.replace(m, name="x"), dataclasses.replace(k, name="r")
        self.xblock, self.rblock = blocks
        self.looped = True
        self.evaluator = Evaluator(region, self, [self.x, self.r])
        self.scopes = [Scope()]

    def prepare(self) -> list[str]:
        """Lines that compute the reductions of the rows."""
        self._run()
        return self.scopes[0].lines


class MatmulSection:
    """The part of a kernel that computes the outputs of one product, or of several that an epilogue joins."""

    def __init__(self, region: Region, products: list[Product], outputs: list[int], number: int, names: Names) -> None:
        self.region, self.products, self.outputs, self.names = region, products, outputs, names
        first = products[0]
        sizes = region.sizes(first.result)
        left = region.sizes(first.left)
        lead = sizes[:-1] if not first.batched else sizes[1:-1]
        self.batch = axis("b", sizes[:1] if first.batched else (), f"b_{number}", None)
        self.m = axis("m", lead, f"m_{number}", f"m_mask_{number}")
        self.n = axis("n", sizes[-1:], f"n_{number}", f"n_mask_{number}")
        self.k = axis("k", left[-1:], f"k_{number}", f"k_mask_{number}")
        for each in (self.batch, self.m, self.n, self.k):
            each.symbols = tuple(sympy.Symbol(f"{s.name}_{number}", integer=True, nonnegative=True)
                                 for s in each.symbols)
        if any(region.sizes(p.result) != sizes for p in products):
            raise Unsupported("joined products of different sizes")
        self.number = number
        self.helpers: set[str] = set()
        self.one_row = self.m.total == 1
        self.dtype = first.result.meta["val"].dtype
        self._configure()

    def _configure(self) -> None:
        """Tile sizes by the number of rows, of accumulators, and the operands' width."""
        rows = int(self.m.total) if self.m.total.is_Integer else 64
        wide = self.dtype == torch.float32
        columns = int(self.n.total) if self.n.total.is_Integer else 128
        depth = int(self.k.total) if self.k.total.is_Integer else 128
        many = len(self.products) > 1
        if self.one_row:
            bm, bn, bk, self.num_warps, self.num_stages = 1, 16, 256, 4, 2
            while bn > LEAST_BAND and columns < bn * 2 * self.region.device.processors:
                bn, bk = bn // 2, bk * 2
        elif rows <= 16:
            bm, bn, bk, self.num_warps, self.num_stages = 16, 32, 128 if not wide else 64, 4, 3
        elif rows <= 64 or wide:
            bm, bn, bk, self.num_warps, self.num_stages = 64, 64 if not many else 32, 64 if not wide else 32, 4, 3
        else:
            bm, bn, bk, self.num_warps, self.num_stages = 128, 128 if not many else 64, 64, 8, 3
        least = 1 if self.one_row else 16
        bn, bk = (min(b, max(least, power_of_two(s))) for b, s in ((bn, columns), (bk, depth)))
        self.blocks = {f"BLOCK_M_{self.number}": bm, f"BLOCK_N_{self.number}": bn, f"BLOCK_K_{self.number}": bk}
        for each, block in ((self.m, bm), (self.n, bn), (self.k, bk)):
            if each.total.is_Integer and int(each.total) % block == 0 and each.total != 0:
                each.mask = None
        self.constants = {k: v for k, v in self.blocks.items()}

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
        """The accumulators of the products, and the lines that fill them from k = first to last."""
        bm, _, bk = self.blocks
        left = LeftRows(self.region, self.products[0].left, self.names, self.m, self.k, (bm, bk))
        if self.batch.symbols:
            left.evaluator.axes.append(self.batch)
        before = left.prepare()
        left.scopes.append(Scope())
        inside = left.scopes[-1].lines
        a = left.evaluator.value(self.products[0].left, self._left_index())
        accumulators = []
        for each in self.products:
            accumulators.append(self._accumulate(each, a, left.evaluator, before, inside))
        self.helpers |= left.evaluator.helpers
        start = self.names.new("start")
        walk = [f"for {start} in range({first}, {last}, {bk}):"]
        walk += [f"    {line}" for line in (*left._columns(start), *self._down(start), *inside)]
        return accumulators, [*before, *walk]

    def _total(self, accumulator: str) -> str:
        """A tile of sums."""
        return f"tl.sum({accumulator}, 1, keep_dims=True)" if self.one_row else accumulator

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

    def _down(self, start: str) -> list[str]:
        """The positions along k as a column, for the right operand of a dot."""
        if self.one_row:
            return []
        k = self.k
        lines = [f"{k.position}_down = ({start} + tl.arange(0, {list(self.blocks)[2]})[:, None]).to(INDEX)"]
        return lines + ([f"{k.mask}_down = {k.position}_down < {text_of(k.total, True)}"] if k.mask else [])

    def _accumulate(
        self, each: Product, a: Value, left_evaluator: Evaluator, before: list[str], inside: list[str]
    ) -> str:
        bm, bn, bk = self.blocks
        down = self.k if self.one_row else dataclasses.replace(
            self.k, position=f"{self.k.position}_down", mask=f"{self.k.mask}_down" if self.k.mask else None)
        frame = Frame(self.names, before, inside, "k")
        evaluator = Evaluator(self.region, frame, [down, self.n, self.batch])
        b = evaluator.value(each.right, self._right_index(each))
        self.helpers |= evaluator.helpers
        name = self.names.new("acc")
        wide = "tl.float64" if self.dtype == torch.float64 else "tl.float32"
        shape = f"[{bn}, {bk}]" if self.one_row else f"[{bm}, {bn}]"
        before.append(f"{name} = tl.full({shape}, 0, {wide})")
        if self.one_row:
            outside = f"tl.where({self.k.mask}, {a.text}, 0)" if self.k.mask else a.text
            inside.append(f"{name} += {outside} * {b.text}")
            return name
        left = _operand(left_evaluator, a, {"x", "r"}, self.k.mask, f"[{bm}, {bk}]")
        right = _operand(evaluator, b, {"k", "n"}, down.mask, f"[{bk}, {bn}]")
        operands = left, right
        inside.append(f"{name} = tl.dot({operands[0]}, {operands[1]}, {name}, input_precision='ieee')")
        return name

    def _epilogue(self, totals: list[str]) -> list[str]:
        """Lines that compute and store the outputs from the products' sums."""
        lines: list[str] = []
        frame = Frame(self.names, lines, lines, "")
        evaluator = Evaluator(self.region, frame, [self.m, self.n, self.batch])
        for each, total in zip(self.products, totals, strict=True):
            evaluator.bound[each.result] = self._bind(each, total, evaluator)
        for output in self.outputs:
            self._store(output, evaluator, lines)
        self.helpers |= evaluator.helpers
        return lines

    def _bind(self, each: Product, total: str, evaluator: Evaluator) -> Any:
        """The product's rounded value at its own index; asked at another place there is no kernel."""
        own = self._result_index()
        uses = frozenset({"m", "n"})
        known: list[Value] = []

        def value(index: Index) -> Value:
            if any(sympy.expand(a - b) != 0 for a, b in zip(own, index, strict=True)):
                raise Unsupported("a product is read at another place than its tile")
            if not known:
                text = total
                if each.bias is not None:
                    bias = evaluator.operand(each.bias, own)
                    text = f"{total} + {bias.text}"
                known.append(evaluator.settle(expressions.rounded(text, self.dtype), self.dtype, uses))
            return known[0]

        return value

    def _store(self, output: int, evaluator: Evaluator, lines: list[str]) -> None:
        node = self.region.outputs[output]
        base, own = base_of(node), self._result_index()
        sizes = self.region.sizes(base)
        result_sizes = self.region.sizes(self.products[0].result)
        if product(sizes) != product(result_sizes):
            raise Unsupported("an epilogue of another size than its product")
        at = own if sizes == result_sizes else unflatten(flatten(own, result_sizes), sizes, evaluator.ranges)
        value = evaluator.value(base, at)
        index = shown_index(node, at, self.region.sizes, evaluator.ranges)
        address, mask, uses = evaluator.stored(output, index)
        for missing in [a for a in (self.m, self.n) if a.name not in uses]:
            address += f" + 0 * {missing.position}"
            mask = " & ".join(x for x in (mask, missing.mask) if x)
        dtype = node.meta["val"].dtype
        text = f"{value.text}.to({expressions.STORED[dtype]})" if dtype in expressions.ROUNDED else value.text
        lines.append(f"tl.store(out{output} + {address}, {text}{f', mask={mask}' if mask else ''})")

    # -- indices -----------------------------------------------------------------------------------------------

    def _along(self, current: Axis, sizes: Index) -> Index:
        symbols = iter(current.symbols)
        return tuple(sympy.Integer(0) if s == 1 else next(symbols) for s in sizes)

    def _result_index(self) -> Index:
        sizes = self.region.sizes(self.products[0].result)
        if self.products[0].batched:
            parts = (self.batch, sizes[:1]), (self.m, sizes[1:2]), (self.n, sizes[2:])
        else:
            parts = (self.batch, ()), (self.m, sizes[:-1]), (self.n, sizes[-1:])
        return tuple(i for current, own in parts for i in self._along(current, own))

    def _left_index(self) -> Index:
        sizes = self.region.sizes(self.products[0].left)
        return (*self._result_index()[:-1], *self._along(self.k, sizes[-1:]))

    def _right_index(self, each: Product) -> Index:
        sizes = self.region.sizes(each.right)
        if each.by_rows:
            return (*self._along(self.n, sizes[:1]), *self._along(self.k, sizes[1:]))
        own = (*self._along(self.k, sizes[-2:-1]), *self._along(self.n, sizes[-1:]))
        return (*self._result_index()[:1], *own) if each.batched else own


def _operand(evaluator: Evaluator, value: Value, axes: set[str], mask: str | None, shape: str) -> str:
    """A value as an operand of `tl.dot`: a whole tile in its memory type, 0 beyond the end of k."""
    text = evaluator.narrow(value)
    loaded = value.text in evaluator.raw or value.text.startswith("load")
    if mask and not (loaded and axes <= value.uses):
        text = f"tl.where({mask}, {text}, 0)"
    return text if axes <= value.uses else f"tl.broadcast_to({text}, {shape})"


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
