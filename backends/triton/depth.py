"""How a product walks along k: the positions of both operands, and what they are read as.

Usually a step takes BLOCK_K positions in order. An operand made of packed numbers is cut as its bytes are:

* where a join along k puts pieces of one length in turns (the low and the high nibbles of sixteen bytes), a step walks
  over the positions within a piece and multiplies each piece on its own, so that a byte is loaded once for all numbers
  in it;
* positions are counted by runs and within a run, as dimensions of a tile of their own: what is the same for a whole
  run, a group's scale, is loaded once for the run and broadcast. For one row of x a run is what a thread loads of it at
  once, 16 bytes: then both operands lie in the threads alike, and nothing is exchanged between them.

Nothing of a scheme is known here: how the operand's views and joins take its index apart says where to cut.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import sympy
import torch
from torch.fx import Node

from graphopt.backends.triton.evaluate import Axis
from graphopt.backends.triton.printer import text_of
from graphopt.backends.triton.region import Region
from graphopt.backends.triton.rows import ancestors
from graphopt.index_arithmetic import FloorDivide, Ranges, product
from graphopt.index_map import VIEWS, Index, broadcast_index, operand_index

aten = torch.ops.aten

LOAD = 16
"""Bytes that a thread loads at once at most."""


@dataclasses.dataclass(frozen=True)
class Cut:
    """k as (group of pieces, piece, run within the piece, position within the run).

    run: the length of a run; pieces: how many take turns; within: how many runs are in a piece.
    """

    run: int
    pieces: int
    within: int

    def sizes(self, depth: int) -> Index:
        """The sizes of the walked dimensions for a k of this length: all but the piece."""
        turns = -(-depth // (self.run * self.pieces * self.within))
        return tuple(map(sympy.Integer, (turns, self.within, self.run) if self.within > 1 else (turns, self.run)))

    def index(self, walked: Index, piece: int) -> sympy.Expr:
        """The index along k of a walked position in a piece."""
        turn, *runs, position = walked
        run = runs[0] if runs else 0
        return sympy.expand(((turn * self.pieces + piece) * self.within + run) * self.run + position)


def cut_of(region: Region, left: Node, operands: Sequence[Node], depth: sympy.Expr, one_row: bool) -> Cut | None:
    """How all right operands [N, K] are cut along k; None if they are not, or not alike."""
    if not depth.is_Integer:
        return None
    wide = max(v.itemsize for v in _inputs(left))
    cuts = {_cut(region, operand, int(depth), wide if one_row else 0) for operand in operands}
    return cuts.pop() if len(cuts) == 1 else None


def _inputs(node: Node) -> list[Any]:
    """The dtypes of what a node is computed from."""
    inputs = (n for n in ancestors(node) if n.op == "placeholder" and isinstance(n.meta["val"], torch.Tensor))
    return [n.meta["val"].dtype for n in inputs]


def _cut(region: Region, operand: Node, depth: int, wide: int) -> Cut | None:
    """wide: bytes of an element of x where there is one row of it, else 0."""
    k, n = (sympy.Symbol(name, integer=True, nonnegative=True) for name in ("k", "n"))
    sizes: Ranges = {n: region.sizes(operand)[0], k: sympy.Integer(depth)}
    whole = _Places(region, sizes)
    whole.visit(operand, (n, k))
    lengths = {int(size) for size in whole.pieces}
    divisions = (d for read in whole.read for d in read.atoms(FloorDivide) if d.args[0] == k)
    groups = [int(d.args[1]) for d in divisions if d.args[1].is_Integer]
    narrower = any(dtype.itemsize < wide for dtype in _inputs(operand))
    if len(lengths) > 1 or not (lengths or groups or narrower):
        return None
    length = lengths.pop() if lengths else 0
    run = LOAD // wide if wide else length or min(LOAD, *groups)
    cut = Cut(run, whole.turns if length else 1, max(1, length // run))
    if run & (run - 1) or length % run or any(group % (run if not length else length * cut.pieces) for group in groups):
        return None
    walked = sympy.symbols("o r i" if cut.within > 1 else "o i", integer=True, nonnegative=True)
    known: Ranges = {n: sizes[n], **dict(zip(walked, cut.sizes(depth), strict=True))}
    for piece in range(cut.pieces):
        told = _Places(region, known)
        told.visit(operand, (n, cut.index(walked, piece)))
        place = Cut(run, 1, cut.within).index((sympy.Integer(piece), *walked[1:]), 0)
        if any(sympy.expand(joined - place) != 0 for joined in told.joined):
            return None
    return cut


class _Places:
    """Where an operand reads: indices of inputs, places within joins, and the lengths of the joins' pieces."""

    def __init__(self, region: Region, ranges: Ranges) -> None:
        self.region, self.ranges = region, ranges
        self.read: list[sympy.Expr] = []
        self.joined: list[sympy.Expr] = []
        self.pieces: list[sympy.Expr] = []
        self.turns = 0
        self._seen: set[tuple[Node, Index]] = set()

    def visit(self, node: Node, index: Index) -> None:
        """Follow an element of a node to what it is made of."""
        if (node, index) in self._seen:
            return
        self._seen.add((node, index))
        if node.op != "call_function":
            self.read += index
        elif node.target in VIEWS:
            (source,) = node.all_input_nodes[:1]
            inner = operand_index(node, index, self.region.sizes(node), self.region.sizes(source), self.ranges)
            self.visit(source, inner)
        elif node.target == aten.cat.default:
            self._join(node, index)
        else:
            for source in node.all_input_nodes:
                if isinstance(source.meta["val"], torch.Tensor):
                    self.visit(source, broadcast_index(index, self.region.sizes(source)))

    def _join(self, node: Node, index: Index) -> None:
        given: Any = node.args[1] if len(node.args) > 1 else 0
        dim = given % len(index)
        parts = node.all_input_nodes
        self.joined.append(index[dim])
        self.pieces += [self.region.sizes(part)[dim] for part in parts]
        self.turns = len(parts)
        for part in parts:
            self.visit(part, (*index[:dim], sympy.Integer(0), *index[dim + 1 :]))


def narrow_operands(left: Node, right: Node) -> tuple[Node, Node]:
    """What to multiply for two operands: where both were widened from one type whose products the wide sums hold, that.

    Products of two bfloat16 or float16 numbers are exact in float32, and those of int8 are summed in int32.
    """
    sources = []
    for node in (left, right):
        source = node.args[0] if str(node.target) == "prims.convert_element_type.default" else None
        if not isinstance(source, Node) or node.meta["val"].dtype != torch.float32:
            return left, right
        sources.append(source)
    dtypes = {source.meta["val"].dtype for source in sources}
    if len(dtypes) == 1 and dtypes <= {torch.bfloat16, torch.float16, torch.int8}:
        return sources[0], sources[1]
    return left, right


@dataclasses.dataclass
class Depth:
    """The walk along k of one section.

    axis: all walked positions; size: the length of k; cut: how it is cut, if it is. block: the constant that is the
    number of positions in a step. flat: the operands' tiles are [m, k] and [k, n]; else there is one row of x, and the
    right operand's tile is [n, k], or, of a k that is cut, [n, runs, positions in a run].
    """

    axis: Axis
    size: sympy.Expr
    cut: Cut | None
    block: str
    flat: bool

    @property
    def pieces(self) -> range:
        """The pieces that a step multiplies one after the other."""
        return range(self.cut.pieces if self.cut else 1)

    def index(self, piece: int) -> sympy.Expr:
        """The index along k of the walked positions."""
        if self.cut is None:
            return self.axis.symbols[0] if self.axis.symbols else sympy.Integer(0)
        return self.cut.index(self.axis.symbols, piece)

    @property
    def is_ragged(self) -> bool:
        """Do walked positions lie behind the end of k although no block does?"""
        return self.cut is not None and self.size != self.cut.pieces * self.axis.total

    def left(self) -> list[Axis]:
        """The axes that the left operand is read along."""
        if self.cut is None or self.flat:
            return [dataclasses.replace(self.axis, name="r")]
        return [dataclasses.replace(axis, name="r") for axis in self._apart()]

    def right(self) -> list[Axis]:
        """The axes that the right operand is read along."""
        if self.cut is not None:
            return self._apart()
        if not self.flat:
            return [self.axis]
        mask = f"{self.axis.mask}_down" if self.axis.mask else None
        return [dataclasses.replace(self.axis, position=f"{self.axis.position}_down", mask=mask)]

    def _apart(self) -> list[Axis]:
        """Runs and positions in a run as axes of their own."""
        symbols, sizes, position, mask = self.axis.symbols, self.axis.sizes, self.axis.position, self.axis.mask
        return [Axis("k", f"{position}_run", f"{mask}_run" if mask else None, symbols[:-1], sizes[:-1]),
                Axis("k", f"{position}_within", None, symbols[-1:], sizes[-1:])]

    def lines(self, start: str) -> list[str]:
        """The positions and masks of a step that begins at `start`, beyond those of the left operand's own."""
        position, mask = self.axis.position, self.axis.mask
        if self.cut is None:
            if not self.flat:
                return []
            lines = [f"{position}_down = ({start} + tl.arange(0, {self.block})[:, None]).to(INDEX)"]
            return lines + ([f"{mask}_down = {position}_down < {text_of(self.axis.total, True)}"] if mask else [])
        run, place = self.cut.run, ("[:, None, None]", "[None, :, None]") if self.flat else (
            "[None, :, None]", "[None, None, :]")
        lines = [f"{position}_run = ({start} // {run} + tl.arange(0, {self.block} // {run}){place[0]}).to(INDEX)",
                 f"{position}_within = tl.arange(0, {run}){place[1]}.to(INDEX)"]
        return lines + ([f"{mask}_run = {position}_run < {product(self.axis.sizes[:-1])}"] if mask else [])
