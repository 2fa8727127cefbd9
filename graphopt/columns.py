"""How the columns of a product are counted where its readers need more than one of them for each of their elements.

A rotary embedding reads a product at column j and at the column that j is paired with. Then the columns are counted as

    column = ((head * turns + turn) * folds + fold) * within + position

and whoever computes a position of a turn computes all folds of it, so that every column is computed once: halves of a
head (j, j + D / 2) are one turn of two folds with D / 2 positions within, neighbours (2j, 2j + 1) D / 2 turns of one.
How a join along the columns is made of its parts says where to fold, and the index maps of all readers prove it.

A reduction over neighbouring columns (the norm of a head, the scale that a group of codes shares) reads all columns of
a head, so that one program must compute them together: all turns and positions within, in each fold.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Collection, Iterable, Sequence

import sympy
import torch
from torch.fx import Node

from graphopt.index_arithmetic import Ranges, lies_between, product, size_expression
from graphopt.index_inverse import ONE_TO_ONE, shown_by
from graphopt.index_map import VIEWS, Index, broadcast_index, operand_index, reshape_index
from graphopt.row_ops import ELEMENTWISE, REDUCTIONS, SPLITS, is_pick, keeps_dims, reduced_dims

aten = torch.ops.aten

MOST_FOLDS = 4
"""Folds at most: each takes an accumulator of its own."""

MOST_TOGETHER = 128
"""Columns that are computed together at most: no tile has more."""

Sizes = Callable[[Node], Index]


@dataclasses.dataclass(frozen=True)
class Columns:
    """A count of columns. together: does one program compute all of a head? If not, and with one fold, they are counted
    as they come."""

    folds: int = 1
    within: int = 1
    turns: int = 1
    together: bool = False

    @property
    def head(self) -> int:
        """How many columns are counted before they are counted alike again."""
        return self.turns * self.folds * self.within

    @property
    def held(self) -> int:
        """How many columns of a fold a program computes at least, of which it computes a multiple."""
        return self.turns * self.within if self.together else 1

    def sizes(self, columns: sympy.Expr) -> Index:
        """The sizes of the dimensions that are counted over, the folds left out, for so many columns."""
        if self.folds == 1 and not self.together:
            return (columns,)
        return columns / self.head, sympy.Integer(self.turns), sympy.Integer(self.within)

    def index(self, counted: Index, fold: int) -> sympy.Expr:
        """The column of a counted place in a fold."""
        if len(counted) == 1:
            return counted[0]
        head, turn, position = counted
        return sympy.expand(((head * self.turns + turn) * self.folds + fold) * self.within + position)


def sizes_of(node: Node) -> Index:
    """The shape of a node's value, in the symbols of its graph."""
    return tuple(size_expression(size) for size in node.meta["val"].shape)


def columns_of(
    outputs: Sequence[Node], products: Sequence[Node], inside: Collection[Node], sizes: Sizes = sizes_of
) -> Columns | str:
    """How the columns of products of one size are counted for their readers `inside` to be computed, or why not.

    outputs: the readers that are stored, each of which shows every element of a product at a place of its own, or every
    head of it.
    """
    made = _depending(products, inside)
    joins = [node for node in made if node.target == aten.cat.default]
    reduced = {reduced_size(node, sizes) for node in made if node.target in REDUCTIONS}
    if not joins and not reduced:
        return Columns()
    whole = sizes(products[0])
    if reason := _why_none(whole[-1], reduced):
        return reason
    reason = "it joins more than columns of one row that are evenly spaced"
    if reduced:
        reason = "it reduces other than neighbouring columns of one row"
    shapes = [sizes(node) for node in made if node.target in VIEWS]
    heads = reduced or dict.fromkeys(shape[-1] for shape in (*shapes, whole) if shape)
    for columns, head in itertools.product(_candidates(joins, sizes) if joins else [Columns()], heads):
        if columns.folds > MOST_FOLDS:
            reason = f"it needs {columns.folds} columns of the product at a time, and {MOST_FOLDS} at most are held"
        elif head.is_Integer and int(head) % columns.head == 0 and int(whole[-1]) % int(head) == 0:
            found = dataclasses.replace(columns, turns=int(head) // columns.head, together=bool(reduced))
            if found.held & (found.held - 1):
                reason = f"a program computes a power of two of neighbouring columns, and not {found.held}"
            elif _Readers(found, products, inside, made, sizes).show(outputs):
                return found
    return reason


def reduced_size(node: Node, sizes: Sizes = sizes_of) -> sympy.Expr:
    """How many elements of its operand a reduction makes one of."""
    whole = sizes(node.all_input_nodes[0])
    return product([whole[dim] for dim in reduced_dims(node)])


def _why_none(columns: sympy.Expr, reduced: Collection[sympy.Expr]) -> str:
    if not columns.is_Integer:
        return "the number of columns is symbolic"
    if len(reduced) > 1:
        return "it reduces columns by groups of several sizes"
    for count in reduced:
        if not count.is_Integer or count > MOST_TOGETHER:
            return f"it reduces {count} columns, and {MOST_TOGETHER} at most are computed together"
    return ""


def _candidates(joins: Sequence[Node], sizes: Sizes) -> list[Columns]:
    """Counts of columns by the parts of each join, and of all joins together; few folds first."""
    found: dict[Columns, None] = {}
    lengths, totals = [], []
    for node in joins:
        dim = _joined(node)
        parts, within = [sizes(part)[dim] for part in _joined_parts(node)], product(sizes(node)[dim + 1 :])
        if not all(size.is_Integer for size in (*parts, within)) or any(size == 0 for size in parts):
            continue
        lengths.append(math.gcd(*map(int, parts)) * int(within))
        totals.append(int(sum(parts) * within))
        found[Columns(totals[-1] // lengths[-1], lengths[-1])] = None
    if lengths:
        length = math.gcd(*lengths)
        found[Columns(math.lcm(*totals) // length, length)] = None
    return sorted(found, key=lambda columns: columns.folds)


class _Readers:
    """Whether the readers of products can be computed from elements that are held at a time."""

    def __init__(
        self, columns: Columns, products: Sequence[Node], inside: Collection[Node], made: Collection[Node], sizes: Sizes
    ) -> None:
        self.products, self.made, self.sizes = products, made, sizes
        whole = sizes(products[0])
        counted = (*whole[:-1], *columns.sizes(whole[-1]))
        symbols = sympy.symbols(f"i:{len(counted)}", integer=True, nonnegative=True)
        self.ranges: Ranges = {symbol: size for symbol, size in zip(symbols, counted, strict=True) if size != 1}
        index = tuple(symbol if symbol in self.ranges else sympy.Integer(0) for symbol in symbols)
        lead, rest = index[: len(whole) - 1], index[len(whole) - 1 :]
        self.held = [(*lead, columns.index(rest, fold)) for fold in range(columns.folds)]
        self.shown = [places(products, each, inside, sizes, self.ranges, rest[1:]) for each in self.held]

    def show(self, outputs: Sequence[Node]) -> bool:
        """Is every output computed, wherever it is stored, from elements of the products that are held at a time?"""
        for shown, output in itertools.product(self.shown, outputs):
            if output not in shown:
                return False
            read = self._reads(output, shown[output])
            if read is None or any(element not in self.held for element in read):
                return False
        return True

    def _reads(self, node: Node, index: Index) -> set[Index] | None:
        """The elements of the products that an element of a node is computed from; None if that is not known."""
        found: set[Index] = set()
        seen: set[tuple[Node, Index]] = set()
        waiting = [(node, index)]
        while waiting:
            current, at = waiting.pop()
            if (current, at) in seen:
                continue
            seen.add((current, at))
            if current in self.products:
                found.add(tuple(sympy.expand(place) for place in at))
            elif current in self.made:
                operands = self._operands(current, at)
                if operands is None:
                    return None
                waiting += operands
        return found

    def _operands(self, node: Node, index: Index) -> Iterable[tuple[Node, Index]] | None:
        """The elements of its operands that an element of a node is computed from; of a head those that are held."""
        sizes, ranges = self.sizes, self.ranges
        sources = [source for source in node.all_input_nodes if isinstance(source.meta["val"], torch.Tensor)]
        if node.target in VIEWS:
            return [(sources[0], operand_index(node, index, sizes(node), sizes(sources[0]), ranges))]
        if node.target in ELEMENTWISE:
            return [(source, broadcast_index(index, sizes(source))) for source in sources]
        if node.target == aten.cat.default:
            return _parts(node, index, sizes, ranges)
        if node.target in REDUCTIONS:
            own = all(node in shown and same_place(shown[node], index) for shown in self.shown)
            return [(sources[0], shown[sources[0]]) for shown in self.shown] if own else None
        split = node.all_input_nodes[0]
        if is_pick(node):
            return [(split, index)]
        if split.target in SPLITS and split.target != aten.unbind.int:
            dim, place = _split(split, len(index)), node.args[1]
            assert isinstance(place, int)
            begin = sum((size_expression(value.shape[dim]) for value in split.meta["val"][:place]), sympy.Integer(0))
            return [(split.all_input_nodes[0], (*index[:dim], sympy.expand(index[dim] + begin), *index[dim + 1 :]))]
        return None


def same_place(one: Index, other: Index) -> bool:
    """Are two indices the same?"""
    return len(one) == len(other) and all(sympy.expand(a - b) == 0 for a, b in zip(one, other, strict=True))


def places(
    products: Sequence[Node], index: Index, inside: Collection[Node], sizes: Sizes, ranges: Ranges,
    within: Sequence[sympy.Expr] = (),
) -> dict[Node, Index]:
    """Where nodes show the element of a product that has `index`: those `inside` that have a place for each.

    They do through one-to-one views and elementwise operators; and a join of parts of a node, in the node's own shape,
    takes its place. A reduction of what shows it, and what is computed from that alone, has a place for each head: one
    that does not tell where `within` its head the column is.
    """
    shown = {node: index for node in reversed(products)}
    whole = {node: node for node in shown}
    inner = frozenset(symbol for place in within for symbol in place.free_symbols)
    waiting = list(shown)
    while waiting:
        node = waiting.pop()
        for user in node.users:
            if user in shown or user not in inside:
                continue
            if node in shown and user.target in ONE_TO_ONE:
                shown[user] = shown_by(user, shown[node], sizes, ranges)
            elif node in shown and user.target in REDUCTIONS:
                head = _place_of_head(user, shown[node])
                if not inner & {symbol for place in head for symbol in place.free_symbols}:
                    shown[user] = head
            elif node in shown and is_pick(user):
                shown[user] = shown[node]
            elif node in shown and user.target in ELEMENTWISE and product(sizes(user)) == product(sizes(node)):
                shown[user] = reshape_index(shown[node], sizes(node), sizes(user), ranges)
            elif user.target == aten.cat.default and sizes(user) == sizes(whole[node]):
                shown[user] = shown[whole[node]]
            elif user in whole:
                continue
            whole[user] = user if user in shown else whole[node]
            waiting.append(user)
    return shown


def _place_of_head(reduction: Node, index: Index) -> Index:
    dims, kept = reduced_dims(reduction), keeps_dims(reduction)
    return tuple(
        sympy.Integer(0) if dim in dims else place for dim, place in enumerate(index) if kept or dim not in dims
    )


def _parts(node: Node, index: Index, sizes: Sizes, ranges: Ranges) -> list[tuple[Node, Index]]:
    """The parts of a join that may hold an element, with its place in each."""
    dim = _joined(node)
    begin: sympy.Expr = sympy.Integer(0)
    found = []
    for part in _joined_parts(node):
        end = begin + sizes(part)[dim]
        inner = (*index[:dim], sympy.expand(index[dim] - begin), *index[dim + 1 :])
        if lies_between(index[dim], begin, end, ranges):
            return [(part, inner)]
        found.append((part, inner))
        begin = end
    return found


def _joined_parts(node: Node) -> list[Node]:
    return [part for part in node.args[0] if isinstance(part, Node)]  # type: ignore[union-attr]


def _joined(node: Node) -> int:
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    assert isinstance(dim, int)
    return int(dim % node.meta["val"].dim())


def _split(node: Node, rank: int) -> int:
    dim = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)
    assert isinstance(dim, int)
    return dim % rank


def _depending(products: Sequence[Node], inside: Collection[Node]) -> dict[Node, None]:
    """The nodes `inside` whose values depend on a product."""
    found: dict[Node, None] = {}
    waiting = list(products)
    while waiting:
        for user in waiting.pop().users:
            if user in inside and user not in found:
                found[user] = None
                waiting.append(user)
    return found
