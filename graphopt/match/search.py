"""Find one pattern at one place: structural, with backtracking over the order of operands.

Matching is done twice. The loose search compares operations only and says what each hole of the pattern may stand
for. The exact search traces the pattern on those very values and compares everything: sizes (symbolic ones too),
dtypes, casts, views, numbers. So one pattern serves every rank, size and dtype, and a match has no exceptions.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from graphopt import shapes
from graphopt.match import paths
from graphopt.match.arguments import named, operands, same_argument
from graphopt.match.pattern import Traced

aten = torch.ops.aten

COMMUTATIVE = frozenset(
    (
        aten.add.Tensor,
        aten.mul.Tensor,
        aten.maximum.default,
        aten.minimum.default,
        aten.logical_and.default,
        aten.logical_or.default,
        aten.bitwise_and.Tensor,
        aten.logical_xor.default,
        aten.bitwise_or.Tensor,
        aten.bitwise_xor.Tensor,
        aten.eq.Tensor,
        aten.ne.Tensor,
    )
)


@dataclasses.dataclass
class Failure:
    """How far a search came: matched computations of the pattern, and what stopped it where.

    by_reading: whether it might come further if the holes stood for other nodes. complete: whether all operations
    of the pattern are there, so that only a number, a cast, a view, a size or another user is amiss; depth then says
    how many of them were found to be as they must be.
    """

    matched: int = -1
    pattern_node: fx.Node | None = None
    node: fx.Node | None = None
    reason: str = ""
    by_reading: bool = True
    complete: bool = False
    depth: int = 0

    def note(
        self, matched: int, pattern_node: fx.Node, node: fx.Node, reason: str, *, by_reading: bool = False
    ) -> None:
        """Keep the deepest failure; of equally deep ones the first."""
        if matched > self.matched:
            self.matched, self.pattern_node, self.node, self.reason = matched, pattern_node, node, reason
            self.by_reading = by_reading


@dataclasses.dataclass
class State:
    """What has been matched so far. pairs: computations of pattern and graph; candidates: what holes may stand for.

    passed: nodes of the graph inside the match, which a rewrite makes superfluous.
    """

    pairs: dict[fx.Node, fx.Node] = dataclasses.field(default_factory=dict)
    candidates: dict[str, dict[fx.Node, int]] = dataclasses.field(default_factory=dict)
    numbers: dict[str, Any] = dataclasses.field(default_factory=dict)
    passed: set[fx.Node] = dataclasses.field(default_factory=set)

    def copy(self) -> State:
        return State(dict(self.pairs), dict(self.candidates), dict(self.numbers), set(self.passed))


class Search:
    """A search for one traced pattern.

    numbers: for the loose search, the examples of number holes. bindings: for the exact search, what tensor holes
    stand for; None makes the search loose.
    """

    def __init__(
        self, traced: Traced, numbers: Mapping[str, Any], bindings: Mapping[str, fx.Node] | None, failure: Failure
    ) -> None:
        self.traced = traced
        self.numbers = numbers
        self.bindings = bindings
        self.failure = failure
        self.stop = frozenset(bindings.values()) if bindings is not None else frozenset()

    def results(self, anchor: fx.Node) -> tuple[State, list[fx.Node]] | None:
        """Match all results of the pattern, the first one being computed by `anchor`; returns the graph's results."""
        first, *others = (paths.walk(result) for result in self.traced.results)
        state = self.compute(first.base, anchor, State())
        found = [anchor]
        for other in others:
            if state is None:
                return None
            state, base = self._elsewhere(other.base, state)
            found.append(base)
        if state is None:
            return None
        if self.bindings is None:
            return state, found
        shown = []
        for path, base in zip((first, *others), found, strict=True):
            node = _downstream(base, path)
            if node is None:
                self.failure.note(len(state.pairs), path.base, base, f"expected {path.describe()} behind it")
                return None
            shown.append(node)
            state.passed.update(paths.walk(node, (base,)).nodes)
        return state, shown

    def _elsewhere(self, wanted: fx.Node, state: State) -> tuple[State | None, fx.Node]:
        """Match a further result, which is computed from something already matched."""
        if wanted in state.pairs:
            return state, state.pairs[wanted]
        for node in _near(state):
            if node.target is wanted.target:
                matched = self.compute(wanted, node, state)
                if matched is not None:
                    return matched, node
        anchor = next(iter(state.pairs.values()))
        self.failure.note(len(state.pairs), wanted, anchor, f"found no {wanted.target} for another result")
        return None, anchor

    def value(self, wanted: fx.Node, node: fx.Node, state: State) -> State | None:
        """Match an operand, with the views, copies and casts that it passes through."""
        wanted_path, path = paths.walk(wanted), paths.walk(node, self.stop)
        if self.bindings is None and wanted_path.base in self.traced.holes:
            return self._propose(wanted_path, path, state)
        if self.bindings is not None and (wanted_path.layout, wanted_path.casts) != (path.layout, path.casts):
            reason = f"expected {wanted_path.describe()} on the way, found {path.describe()}"
            by_reading = wanted_path.base in self.traced.holes or wanted_path.casts == path.casts
            self.failure.note(len(state.pairs), wanted, node, reason, by_reading=by_reading)
            return None
        if wanted_path.base in self.traced.holes:
            name = self.traced.holes[wanted_path.base]
            assert self.bindings is not None
            if path.base is not self.bindings[name]:
                expected = f"expected {name} (%{self.bindings[name].name}), found %{path.base.name}"
                self.failure.note(len(state.pairs), wanted, node, expected, by_reading=True)
                return None
            return state
        matched = self.compute(wanted_path.base, path.base, state)
        if matched is not None:
            matched.passed.update(path.nodes)
        return matched

    def compute(self, wanted: fx.Node, node: fx.Node, state: State) -> State | None:
        """Match a computation and all it is computed from."""
        if state.pairs.get(wanted) is node:
            return state.copy()
        if wanted.target != node.target:
            self.failure.note(len(state.pairs), wanted, node, f"expected {_name(wanted)}, found {_name(node)}")
            return None
        state = state.copy()
        reason = self._arguments_differ(wanted, node, state)
        theirs, ours = operands(wanted), operands(node)
        if not reason and len(theirs) != len(ours):
            reason = f"{_name(node)} has {len(ours)} tensor operands, expected {len(theirs)}"
        if reason:
            by_reading = reason.startswith("expected a result")
            self.failure.note(len(state.pairs), wanted, node, reason, by_reading=by_reading)
            return None
        state.pairs[wanted] = node
        for order in _orders(wanted, ours):
            matched: State | None = state
            for operand, given in zip(theirs, order, strict=True):
                if matched is not None:
                    matched = self.value(operand, given, matched)
            if matched is not None:
                return matched
        return None

    def _propose(self, wanted: paths.Path, path: paths.Path, state: State) -> State | None:
        """Loose: note what a hole may stand for, best first."""
        name = self.traced.holes[wanted.base]
        ranks = _ranks(wanted, path)
        known = state.candidates.get(name)
        if known is not None:
            ranks = {node: rank + known[node] for node, rank in ranks.items() if node in known}
        if not ranks:
            expected = min(known, key=known.__getitem__).name if known else ""
            reason = f"expected {name} again (%{expected}), found %{path.nodes[0].name}"
            self.failure.note(len(state.pairs), wanted.base, path.nodes[0], reason)
            return None
        state = state.copy()
        state.candidates[name] = ranks
        return state

    def _arguments_differ(self, wanted: fx.Node, node: fx.Node, state: State) -> str:
        """Compare what is no tensor; number holes take their value from the graph."""
        given = named(node)
        for name, value in named(wanted).items():
            hole = _hole_of(value, self.numbers)
            if self.bindings is None and hole is not None:
                if isinstance(given.get(name), (fx.Node, bool)) or not isinstance(given.get(name), (int, float)):
                    return f"expected a number as {name}"
                state.numbers.setdefault(hole, given[name])
            elif self.bindings is not None and not same_argument(value, given.get(name)):
                return f"expected {name}={_text(value)}, found {_text(given.get(name))}"
        if self.bindings is not None and (difference := _result_differs(wanted, node)):
            return difference
        return ""


def anchor(traced: Traced) -> object:
    """The operation that computes the pattern's first result: a search begins at each node that calls it."""
    return paths.walk(traced.results[0]).base.target


def holds_operations(traced: Traced, anchor: fx.Node) -> bool:
    """Whether `anchor` is computed by all operations of the pattern, in whatever order, and few others."""
    wanted = collections.Counter(node.target for node in traced.graph.nodes if _computes(node))
    seen, waiting = {anchor}, [anchor]
    while waiting and len(seen) < 8 * traced.computing:
        for source in waiting.pop(0).all_input_nodes:
            if source not in seen and (source.target in wanted or paths.kind(source) is not None):
                seen.add(source)
                waiting.append(source)
    found = collections.Counter(node.target for node in seen if _computes(node))
    return wanted <= found and found.total() <= 2 * wanted.total()


def _computes(node: fx.Node) -> bool:
    return node.op == "call_function" and paths.kind(node) is None


def bindings(state: State, limit: int) -> Iterator[dict[str, fx.Node]]:
    """What the holes may stand for together, best first."""
    names = list(state.candidates)
    ranked = [sorted(state.candidates[name].items(), key=lambda item: item[1]) for name in names]
    choices = sorted(itertools.product(*ranked), key=lambda choice: sum(rank for _, rank in choice))
    for choice in choices[:limit]:
        yield {name: node for name, (node, _) in zip(names, choice, strict=True)}


def _ranks(wanted: paths.Path, path: paths.Path) -> dict[fx.Node, int]:
    """The nodes of a path by how likely the hole stands for them: best where the pattern's own steps are used up.

    Before that place, because steps that change nothing for these values are gone from the graph; never behind it.
    """
    index = 0
    for wanted_kind in map(paths.kind, wanted.nodes[:-1]):
        ahead = index
        while ahead < len(path.nodes) - 1 and paths.kind(path.nodes[ahead]) == "copy":
            ahead += 1
        if paths.kind(path.nodes[ahead]) == wanted_kind:
            index = ahead + 1
    return {node: index - place for place, node in enumerate(path.nodes[: index + 1])}


def _orders(wanted: fx.Node, ours: list[fx.Node]) -> Sequence[list[fx.Node]]:
    """The operands as they are, and the other way round where that makes no difference: not in `x + alpha * y`."""
    commutes = wanted.target in COMMUTATIVE and wanted.kwargs.get("alpha", 1) == 1
    if commutes and len(ours) == 2 and ours[0] is not ours[1]:
        return ours, ours[::-1]
    return (ours,)


def _near(state: State) -> Iterator[fx.Node]:
    """Computations that read something already matched, or what a hole may stand for."""
    seen = dict.fromkeys((*state.pairs.values(), *itertools.chain.from_iterable(state.candidates.values())))
    waiting = list(seen)
    while waiting:
        for user in waiting.pop(0).users:
            if user not in seen:
                seen[user] = None
                if paths.kind(user) is None:
                    yield user
                else:
                    waiting.append(user)


def _downstream(base: fx.Node, wanted: paths.Path) -> fx.Node | None:
    """The node that shows the value of `base` as the pattern's result shows its own; the nearest one."""
    waiting = [base]
    while waiting:
        node = waiting.pop(0)
        path = paths.walk(node, (base,))
        if (path.layout, path.casts) == (wanted.layout, wanted.casts):
            return node
        waiting += [user for user in node.users if paths.kind(user) is not None and user.args[0] is node]
    return None


def _hole_of(value: Any, numbers: Mapping[str, Any]) -> str | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return next((name for name, example in numbers.items() if example == value), None)


def _result_differs(wanted: fx.Node, node: fx.Node) -> str:
    mine, given = wanted.meta.get("val"), node.meta.get("val")
    if not isinstance(mine, torch.Tensor) or not isinstance(given, torch.Tensor):
        return ""
    if mine.dtype != given.dtype:
        return f"expected a result in {_text(mine.dtype)}, found {_text(given.dtype)}"
    if not shapes.same_shape(mine, given):
        return f"expected a result of shape {tuple(mine.shape)}, found {tuple(given.shape)}"
    return ""


def _name(node: fx.Node) -> str:
    return str(node.target) if node.op == "call_function" else f"the {node.op} %{node.name}"


def _text(value: Any) -> str:
    return f"%{value.name}" if isinstance(value, fx.Node) else str(value).removeprefix("torch.")
