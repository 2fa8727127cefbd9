"""The row skeleton: elementwise operators and reductions along rows, with any number of outputs, in one kernel.

A kernel's tile has rows (axis x) and, if anything is reduced, columns (axis r). A row that fits is held in registers
(*persistent*); a longer one is walked in blocks, once for each level of reductions (*looped*): a softmax takes the
maximum in the first walk, the sum in the second and stores in the third, and its input is read from the cache again.

Several independent groups of outputs (`RowSection`) may share one launch: the program number selects the section.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import sympy
import torch
from torch.fx import Node

from graphopt import row_ops
from graphopt.backends.triton import expressions, structures
from graphopt.backends.triton.evaluate import Axis, Evaluator, Value, axis
from graphopt.backends.triton.printer import text_of
from graphopt.backends.triton.reductions import Part, Reduction, describe, finish, parts_of
from graphopt.backends.triton.region import Region, Unsupported
from graphopt.backends.triton.source import power_of_two
from graphopt.index_arithmetic import product
from graphopt.index_map import Index, flatten, unflatten

PERSISTENT_LIMIT = 8192
"""The longest row held in registers: 16384 columns spill on every GPU measured."""

TILE = 1024
"""How many elements a program of a short-row or elementwise kernel handles."""

ACROSS = 32
"""How many rows a program takes where neighbours in memory are of different rows."""

_WITH_TABLES = (torch.ops.aten.sin.default, torch.ops.aten.cos.default, torch.ops.aten.tan.default)


@dataclasses.dataclass
class Scope:
    """Lines of one nesting level and the values whose variables live there."""

    lines: list[str] = dataclasses.field(default_factory=list)
    memory: dict[Any, Value] = dataclasses.field(default_factory=dict)


class Names:
    """Fresh variable names, shared by the sections of a kernel."""

    def __init__(self) -> None:
        self._next = 0

    def new(self, hint: str) -> str:
        """A name not given out before."""
        name = f"{hint}_{self._next}"
        self._next += 1
        return name


class RowSection:
    """The part of a kernel that computes outputs which share rows.

    Raises Unsupported when the outputs do not share rows, or a reduction is asked for another row than the program's.
    """

    def __init__(self, region: Region, outputs: Sequence[int], number: int, names: Names) -> None:
        self.region = region
        self.names = names
        self.outputs = list(outputs)
        nodes = [region.outputs[o] for o in outputs]
        self.reductions = [describe(region, node) for node in structures_before(nodes)]
        suffix = str(number)
        x_sizes, r_sizes = _domain(region, nodes, self.reductions)
        self.x = axis("x", x_sizes, f"x_{suffix}", f"x_mask_{suffix}")
        self.r = axis("r", r_sizes, f"r_{suffix}", f"r_mask_{suffix}") if self.reductions else None
        for each in (self.x, self.r):
            if each is not None:
                each.symbols = tuple(sympy.Symbol(f"{s.name}_{suffix}", integer=True, nonnegative=True)
                                     for s in each.symbols)
        self.xblock, self.rblock = f"XBLOCK_{suffix}", f"RBLOCK_{suffix}"
        self._configure()
        axes = [self.x] if self.r is None else [self.x, self.r]
        self.evaluator = Evaluator(region, self, axes)
        self.scopes = [Scope()]

    def _needs_many_registers(self) -> bool:
        """Whether it calls a function whose argument is reduced with tables: a thread can hold two of them, no more."""
        return any(node.target in _WITH_TABLES for node in self.region.graph_module.graph.nodes)

    def _configure(self) -> None:
        """Block sizes: `constants`, `looped`, `num_warps`, and which masks are not needed."""
        rows = int(self.x.total) if self.x.total.is_Integer else None
        self.looped = False
        if self.r is None:
            most = TILE if not self._needs_many_registers() else TILE // 4
            block = most if rows is None else min(most, max(32, power_of_two(rows)))
            self.constants = {self.xblock: block}
            self.num_warps = 4 if block * 2 >= most else 1
            if rows and rows % block == 0:
                self.x.mask = None
            return
        columns = int(self.r.total) if self.r.total.is_Integer else None
        across = not self.reductions[0].trailing and (rows is None or rows >= ACROSS)
        longest = TILE // ACROSS if across else PERSISTENT_LIMIT
        self.looped = columns is None or columns > longest
        rblock = longest if across else 2048
        if columns is not None and not self.looped:
            rblock = max(1, power_of_two(columns))
        xblock = max(1, TILE // rblock) if across or not self.looped else 1
        if rows is not None:
            xblock = min(xblock, power_of_two(rows))
        self.constants = {self.xblock: xblock, self.rblock: rblock}
        self.num_warps = min(16, max(1, xblock * rblock // 256))
        if columns and columns % rblock == 0:
            self.r.mask = None
        if rows and rows % xblock == 0:
            self.x.mask = None

    # -- text --------------------------------------------------------------------------------------------------

    num_stages = 2

    @property
    def helpers(self) -> set[str]:
        """The device functions that the lines call."""
        return self.evaluator.helpers

    @property
    def programs(self) -> str:
        """How many programs the section needs."""
        return f"cdiv({text_of(self.x.total)}, {self.xblock})"

    def lines(self, program: str) -> list[str]:
        """The section's lines; `program` is the number of the program within the section."""
        start = f"{program}.to(INDEX) * {self.xblock} + tl.arange(0, {self.xblock})"
        head = [f"{self.x.position} = {start}" if self.r is None else f"{self.x.position} = ({start})[:, None]"]
        if self.x.mask:
            head.append(f"{self.x.mask} = {self.x.position} < {text_of(self.x.total, True)}")
        if self.r is not None and not self.looped:
            head += self._columns("0")
        self._run()
        return head + self.scopes[0].lines

    def _columns(self, start: str) -> list[str]:
        assert self.r is not None
        offsets = f"tl.arange(0, {self.rblock})[None, :]"
        first = f"{self.r.position} = {offsets if start == '0' else f'({start} + {offsets}).to(INDEX)'}"
        mask = [f"{self.r.mask} = {self.r.position} < {text_of(self.r.total, True)}"] if self.r.mask else []
        return [first, *mask]

    def _run(self) -> None:
        """Walk the rows once for each level of reductions, storing each output as soon as it is known."""
        waiting = list(self.outputs)
        depths = {o: self._depth(self.region.outputs[o]) for o in self.outputs}
        level = 0
        while waiting or any(r.level >= level for r in self.reductions):
            current = [r for r in self.reductions if r.level == level]
            stages = [[p for r in current for p in parts_of(r) if p.stage == s] for s in (0, 1)]
            ready = [o for o in waiting if depths[o] <= level and self._is_full(o)]
            with self._walk(bool(stages[0] or ready)):
                self._reduce(stages[0])
                for output in ready:
                    self._store(output)
            with self._walk(bool(stages[1])):
                self._reduce(stages[1])
            for reduction in current:
                self.scopes[0].memory[("done", reduction.node)] = Value("", torch.bool)
            waiting = [o for o in waiting if o not in ready]
            for o in [o for o in waiting if depths[o] <= level + 1 and not self._is_full(o)]:
                if all(("done", r.node) in self.scopes[0].memory for r in self.reductions if r.level < depths[o]):
                    self._store(o)
                    waiting.remove(o)
            level += 1

    @contextlib.contextmanager
    def _walk(self, needed: bool) -> Iterator[None]:
        """A loop over the blocks of a row, when the kernel needs one."""
        if not (needed and self.looped):
            yield
            return
        assert self.r is not None
        self.scopes.append(Scope())
        self._after: list[str] = []
        yield
        scope = self.scopes.pop()
        start = self.names.new("start")
        first, last = self._bounds()
        self.scopes[0].lines.append(f"for {start} in range({first}, {last}, {self.rblock}):")
        self.scopes[0].lines += [f"    {line}" for line in (*self._columns(start), *scope.lines)]
        self.scopes[0].lines += self._after

    def _bounds(self) -> tuple[str, str]:
        """Where a walk along the row begins and ends."""
        assert self.r is not None
        return "0", text_of(self.r.total)

    def _reduce(self, parts: list[Part]) -> None:
        """Accumulate the parts over the row."""
        for part in parts:
            element = part.element(self.evaluator, self)
            if self.looped:
                name = self.names.new("acc")
                shape = f"[{self.xblock}, {self.rblock}]"
                self.scopes[0].lines.append(f"{name} = tl.full({shape}, {part.identity}, {part.carrier})")
                self.scopes[-1].lines.append(f"{name} = {part.combine(name, element)}")
                self._finish(part, name, self._after)
            else:
                self._finish(part, element, self.scopes[0].lines)

    def _finish(self, part: Part, values: str, lines: list[str]) -> None:
        name = self.names.new(part.hint)
        self.evaluator.helpers.update(part.helpers)
        lines.append(f"{name} = {part.reduce(values)}")
        self.scopes[0].memory[(part.node, part.name)] = Value(name, part.dtype, frozenset({"x"}))

    def masked(self, value: Value, carrier: str, identity: str) -> str:
        """A value as a whole tile of `carrier`, the identity outside of the row."""
        assert self.r is not None
        text = value.text if value.uses else f"tl.full([], {value.text}, {carrier})"
        if self.r.mask:
            text = f"tl.where({self.r.mask}, {text}, {identity})"
        if not {"x", "r"} <= value.uses:
            text = f"tl.broadcast_to({text}, [{self.xblock}, {self.rblock}])"
        return self.emit(text, frozenset({"x", "r"}), "masked")

    def _store(self, output: int) -> None:
        node = self.region.outputs[output]
        index = self.output_index(node)
        value = self.evaluator.value(node, index)
        address, mask, uses = self.evaluator.stored(output, index)
        dtype = node.meta["val"].dtype
        text = value.text if value.uses else f"tl.full([], {value.text}, {expressions.CARRIERS[dtype]})"
        if dtype in expressions.ROUNDED:
            text = f"{text}.to({expressions.STORED[dtype]})"
        for missing in [a for a in self.evaluator.axes if a.name in value.uses - uses]:
            if missing.total != 1:
                raise Unsupported("an output that varies along an axis it is not stored along")
            address = f"{address} + 0 * {missing.position}" if address != "0" else f"0 * {missing.position}"
            mask = " & ".join(m for m in (mask, missing.mask) if m)
        pointer = f"out{output}" + (f" + {address}" if address != "0" else "")
        scope = self.scopes[-1] if "r" in uses or "r" in value.uses else self.scopes[0]
        scope.lines.append(f"tl.store({pointer}, {text}{f', mask={mask}' if mask else ''})")

    # -- where things are --------------------------------------------------------------------------------------

    def output_index(self, node: Node) -> Index:
        """The index in an output of the element that the tile's position (x, r) stands for."""
        sizes = self.region.sizes(node)
        r = self.r
        if r is not None:
            full = self.reductions[0].place(self.x, r, sizes)
            if full is not None:
                return full
            if product(sizes) == self.x.total:
                return spread(self.x, sizes, self.evaluator)
            if self.reductions[0].trailing and product(sizes) == self.x.total * r.total:
                position = flatten(self.x.symbols, self.x.sizes) * r.total + flatten(r.symbols, r.sizes)
                return unflatten(sympy.expand(position), sizes, self.evaluator.ranges)
        if product(sizes) != self.x.total:
            raise Unsupported("outputs of different numbers of rows")
        return spread(self.x, sizes, self.evaluator)

    def _is_full(self, output: int) -> bool:
        """Is the output stored along the row, rather than once for a row?"""
        return self.r is None or self.region.numel(self.region.outputs[output]) == self.x.total * self.r.total

    def _depth(self, node: Node) -> int:
        return max((r.level + 1 for r in self.reductions if r.node in ancestors(node)), default=0)

    def reduction(self, node: Node, index: Index) -> Value:
        """Answer the evaluator: a reduced value of this program's rows, or an element of a scan."""
        base, part = structures.picked(node)
        reduction = next((r for r in self.reductions if r.node is base), None)
        if reduction is None or self.r is None:
            raise Unsupported("a reduction outside of the rows")
        if base.target in row_ops.SCANS:
            return self._scan(reduction, index)
        kept = reduction.kept_index(self.x, self.evaluator)
        asked = reduction.asked(index)
        if len(kept) != len(asked) or any(sympy.expand(a - b) != 0 for a, b in zip(kept, asked, strict=True)):
            raise Unsupported("a reduction is read at another row than the program's")
        return finish(self, reduction, part)

    def _scan(self, reduction: Reduction, index: Index) -> Value:
        assert self.r is not None
        own = reduction.element_index(self.x, self.r, self.evaluator)
        if any(sympy.expand(a - b) != 0 for a, b in zip(own, index, strict=True)):
            raise Unsupported("a scan is read at another place than the program's")
        key = (reduction.node, "scan")
        known = self.remembered(key)
        if known is None:
            known = reduction.scan(self)
            self.remember(key, known)
        return known

    # -- what the evaluator asks of its skeleton -----------------------------------------------------------------

    def emit(self, text: str, uses: frozenset[str], hint: str = "v") -> str:
        """Assign to a new variable, outside of the loop if the value does not vary along the row."""
        name = self.names.new(hint)
        (self.scopes[-1] if "r" in uses else self.scopes[0]).lines.append(f"{name} = {text}")
        return name

    def remembered(self, key: Any) -> Value | None:
        """A value of this loop or from before it."""
        return next((s.memory[key] for s in reversed(self.scopes) if key in s.memory), None)

    def remember(self, key: Any, value: Value) -> None:
        """Keep a value while its variable is in scope."""
        (self.scopes[-1] if "r" in value.uses else self.scopes[0]).memory[key] = value


def ancestors(node: Node) -> dict[Node, None]:
    """The nodes a node depends on, itself included."""
    seen: dict[Node, None] = {}
    stack = [node]
    while stack:
        current = stack.pop()
        if current not in seen:
            seen[current] = None
            stack += current.all_input_nodes
    return seen


def structures_before(nodes: Sequence[Node]) -> list[Node]:
    """The reductions and scans that the nodes depend on, in graph order."""
    found = {n for node in nodes for n in ancestors(node) if n.target in row_ops.REDUCTIONS}
    return [n for n in nodes[0].graph.nodes if n in found] if nodes else []


def spread(current: Axis, sizes: Index, evaluator: Evaluator) -> Index:
    """The index in a tensor of `sizes` of the element that an axis' position counts in row-major order."""
    if tuple(s for s in sizes if s != 1) == current.sizes:
        symbols = iter(current.symbols)
        return tuple(sympy.Integer(0) if s == 1 else next(symbols) for s in sizes)
    return unflatten(flatten(current.symbols, current.sizes), sizes, evaluator.ranges)


def _domain(region: Region, outputs: Sequence[Node], reductions: Sequence[Reduction]) -> tuple[Index, Index]:
    """The sizes of rows and columns that all outputs and reductions share."""
    if not reductions:
        return region.sizes(outputs[0]), ()
    first = reductions[0]
    rows, columns = product(first.kept_sizes), product(first.reduced_sizes)
    for other in reductions[1:]:
        if product(other.kept_sizes) != rows or product(other.reduced_sizes) != columns:
            raise Unsupported("reductions of different rows in one region")
    return first.kept_sizes, first.reduced_sizes
