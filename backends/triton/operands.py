"""The operands of a product: which there are, the rows on the left, and what is read from a tile of either."""

from __future__ import annotations

import dataclasses
import operator
from typing import Any

from torch.fx import Node

from graphopt.backends.triton.depth import Depth, narrow_operands
from graphopt.backends.triton.evaluate import Axis, Evaluator, Value, axis
from graphopt.backends.triton.reductions import describe
from graphopt.backends.triton.region import Region, Unsupported
from graphopt.backends.triton.rows import Names, RowSection, Scope, structures_before
from graphopt.index_arithmetic import product
from graphopt.index_map import Index

CONTRACTIONS = ("aten.mm.default", "aten.addmm.default", "aten.bmm.default", "graphopt.linear.default",
                "graphopt.parallel_linear.default")


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
        operands = narrow_operands(args[0], args[1])  # type: ignore[arg-type]
        return [Product(node, *operands, args[2] if len(args) > 2 else None, True, False)]  # type: ignore[arg-type]
    picks = {u.args[1]: u for u in node.users if u.target is operator.getitem}
    weights: Any = args[1]
    biases: Any = args[2]
    narrow = [narrow_operands(args[0], weight) for weight in weights]  # type: ignore[arg-type]
    if len({left for left, _ in narrow}) > 1:
        narrow = [(args[0], weight) for weight in weights]  # type: ignore[misc]
    return [Product(picks[i], *narrow[i], biases[i], True, False) for i in range(len(weights)) if i in picks]


class Frame:
    """A skeleton for the evaluator: lines inside of the walk over k for what uses it, before the walk for the rest.

    rows: what knows the reductions of the left operand's rows, behind the walk; columns: those of groups of the
    product's columns.
    """

    def __init__(
        self, names: Names, before: list[str], inside: list[str], walked: str, rows: LeftRows | None = None
    ) -> None:
        self.names, self.before, self.inside, self.walked, self.rows = names, before, inside, walked, rows
        self.memory: dict[Any, Value] = {}
        self.columns: RowSection | None = None

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
        """A reduction of the left operand's rows, or of groups of the product's columns; others have no place here."""
        if self.rows is not None and any(node in (r.node, *r.node.users) for r in self.rows.reductions):
            return dataclasses.replace(self.rows.reduction(node, index), uses=frozenset({"m"}))
        if self.columns is None:
            raise Unsupported("a reduction beside a matrix product")
        return self.columns.reduction(node, index)


class LeftRows(RowSection):
    """The left operand's rows: the reductions that its elements need, then its elements along the walk over k."""

    def __init__(
        self, region: Region, left: Node, names: Names, m: Axis, depth: Depth, blocks: tuple[str, str]
    ) -> None:
        self.region, self.names, self.outputs = region, names, []
        self.reductions = [describe(region, n) for n in structures_before([left])]
        for reduction in self.reductions:
            if product(reduction.kept_sizes) != m.total or product(reduction.reduced_sizes) != depth.size:
                raise Unsupported("a reduction over other rows than the product's")
        self.x, self.r, self.depth = dataclasses.replace(m, name="x"), dataclasses.replace(depth.axis, name="r"), depth
        if depth.cut is not None:
            self.r = axis("r", (depth.size,), f"r_{depth.axis.position}", f"r_{depth.axis.position}_mask")
        self.xblock, self.rblock = blocks
        self.looped = True
        self.evaluator = Evaluator(region, self, [self.x, self.r])
        self.scopes = [Scope()]

    def prepare(self) -> list[str]:
        """Lines that compute the reductions of the rows; from then on elements are read along the walk."""
        self._run()
        helpers = self.evaluator.helpers
        self.evaluator = Evaluator(self.region, self, [self.x, *self.depth.left()])
        self.evaluator.helpers = helpers
        self.scopes.append(Scope())
        return self.scopes[0].lines

    def steps(self, start: str) -> list[str]:
        """The positions of a step of the walk."""
        self.r = dataclasses.replace(self.depth.axis, name="r")
        flat = self._columns(start) if self.depth.flat or self.depth.cut is None else []
        return [*flat, *self.depth.lines(start)]


def dot_operand(evaluator: Evaluator, value: Value, axes: set[str], mask: str | None, shape: str) -> str:
    """A value as an operand of `tl.dot`: a whole tile in its memory type, 0 beyond the end of k."""
    text = evaluator.narrow(value)
    loaded = value.text in evaluator.raw or value.text.startswith("load")
    if mask and not (loaded and axes <= value.uses):
        text = f"tl.where({mask}, {text}, 0)"
    return text if axes <= value.uses else f"tl.broadcast_to({text}, {shape})"
