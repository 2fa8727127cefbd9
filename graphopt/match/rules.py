"""Rewrite a graph by rules: a pattern, its replacement, and a condition on the match."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from graphopt import _compat, capture, edit, shapes, views
from graphopt.errors import PatternError
from graphopt.match import search
from graphopt.match.pattern import Pattern, Traced, draws_numbers, in_new_values

# How many readings of one loose match are tried; what share of a pattern makes a near miss worth telling, and what
# share where the pattern stands nowhere in the graph.
_TRIES = 12
_WORTH_TELLING = 0.6
_WORTH_A_WORD = 0.4


@dataclasses.dataclass(frozen=True)
class Match:
    """One place where a pattern stands. values: node or number for each parameter; inside: the nodes replaced.

    results: the nodes that hold what the pattern returns.
    """

    pattern: Pattern
    values: Mapping[str, Any]
    results: tuple[fx.Node, ...]
    inside: frozenset[fx.Node]

    def __getitem__(self, name: str) -> Any:
        """The node or number that a parameter of the pattern stands for."""
        return self.values[name]

    def tensor(self, name: str) -> torch.Tensor:
        """The fake value of a tensor parameter."""
        value: torch.Tensor = self.values[name].meta["val"]
        return value


@dataclasses.dataclass(frozen=True, eq=False)
class Rule:
    """Where `pattern` stands, compute `replacement` (same parameters, same results) instead.

    condition: asked with each match; returns "" or the reason to leave it alone. Raises PatternError if the replacement
    does not take the pattern's parameters by their names.
    """

    pattern: Pattern
    replacement: Callable[..., Any]
    condition: Callable[[Match], str] = lambda match: ""

    def __post_init__(self) -> None:
        if not isinstance(self.pattern, Pattern):
            raise PatternError(f"{self.pattern!r} is not a pattern: decorate it with @match.pattern(x=(2, 8), ...)")
        names = tuple(self.pattern.examples)
        signature = inspect.signature(self.replacement)
        try:
            signature.bind(**dict.fromkeys(names))
        except TypeError as error:
            called = getattr(self.replacement, "__name__", "the replacement")
            raise PatternError(
                f"pattern {self.pattern.name!r}: its replacement {called}{signature} must take the pattern's parameters"
                f" by their names ({', '.join(names)}): {error}"
            ) from error


def rewrite(
    graph_module: fx.GraphModule,
    pattern: Pattern,
    replacement: Callable[..., Any],
    condition: Callable[[Match], str] = lambda match: "",
) -> int:
    """Replace every occurrence of `pattern`; returns how many. Near misses are recorded as refusals."""
    return apply(graph_module, [Rule(pattern, replacement, condition)])


def find(graph_module: fx.GraphModule, pattern: Pattern) -> list[Match]:
    """All occurrences of a pattern, later ones first, changing nothing."""
    finder, rule = _Finder(graph_module), Rule(pattern, pattern.function)
    found = []
    for node in reversed(graph_module.graph.nodes):
        match = finder.match(rule, node)
        if isinstance(match, Match):
            found.append(match)
    return found


def apply(graph_module: fx.GraphModule, rules: Sequence[Rule]) -> int:
    """Rewrite by the first rule that matches at each place, from the end of the graph to its beginning."""
    finder = _Finder(graph_module)
    misses: list[tuple[fx.Node, Rule, search.Failure]] = []
    consumed: set[fx.Node] = set()
    applied: set[str] = set()
    count = 0
    for node in list(reversed(graph_module.graph.nodes)):
        if node in consumed:
            continue
        missed = []
        for rule in _fitting(rules, node):
            match = finder.match(rule, node)
            if isinstance(match, Match):
                count += finder.replace(rule, match)
                consumed |= {node, *match.inside}
                applied.add(rule.pattern.name)
                break
            missed.append((node, rule, match))
        else:
            misses += missed
    _tell(misses, consumed, applied)
    return count


def _fitting(rules: Sequence[Rule], node: fx.Node) -> Iterator[Rule]:
    if node.op == "call_function":
        for rule in rules:
            if search.anchor(rule.pattern.skeleton) == node.target:
                yield rule


def _tell(misses: Iterable[tuple[fx.Node, Rule, search.Failure]], consumed: set[fx.Node], applied: set[str]) -> None:
    """Record the deepest near miss at each place, and of each pattern that stands nowhere its deepest one."""
    deepest: dict[fx.Node, tuple[Rule, search.Failure]] = {}
    nowhere: dict[str, tuple[fx.Node, Rule, search.Failure]] = {}
    for anchor, rule, miss in misses:
        name = rule.pattern.name
        if anchor in consumed or miss.node is None:
            continue
        reordered = miss.matched > 0 and search.holds_operations(rule.pattern.skeleton, anchor)
        if not (miss.complete or miss.matched > 1 or reordered):
            continue
        near = _nearness(rule, miss)
        if name not in applied and near[1] > _WORTH_A_WORD:
            if name not in nowhere or near > _nearness(*nowhere[name][1:]):
                nowhere[name] = anchor, rule, miss
        worth_telling = miss.complete or near[1] > _WORTH_TELLING or reordered
        if worth_telling and (anchor not in deepest or near > _nearness(*deepest[anchor])):
            deepest[anchor] = rule, miss
    for anchor, rule, miss in nowhere.values():
        deepest.setdefault(anchor, (rule, miss))
    for anchor, (rule, miss) in _largest(deepest).items():
        assert miss.node is not None
        edit.refuse(
            miss.node if edit.source_line(miss.node) else anchor,
            f"{rule.pattern.name}: {miss.matched} of {rule.pattern.skeleton.computing} nodes matched"
            f" at %{anchor.name}; stopped at %{miss.node.name}: {miss.reason}",
        )


def _largest(
    misses: Mapping[fx.Node, tuple[Rule, search.Failure]],
) -> dict[fx.Node, tuple[Rule, search.Failure]]:
    """Of the near misses that one node stopped, the one of the largest pattern: smaller ones are parts of it."""
    kept: dict[tuple[str, fx.Node | None], fx.Node] = {}
    for anchor, (rule, miss) in misses.items():
        key = rule.pattern.name, miss.node
        known = misses.get(kept[key]) if key in kept else None
        if known is None or rule.pattern.skeleton.computing > known[0].pattern.skeleton.computing:
            kept[key] = anchor
    return {anchor: misses[anchor] for anchor in misses if anchor in kept.values()}


def _nearness(rule: Rule, miss: search.Failure) -> tuple[bool, float, int]:
    return miss.complete, miss.matched / rule.pattern.skeleton.computing, miss.depth


class _Finder:
    """Matches rules in one graph; keeps what it traced, by what it was traced on."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        self.graph_module = graph_module
        self.position = {node: index for index, node in enumerate(graph_module.graph.nodes)}
        self.writers = [node for node in self.position if views.may_write(node)]
        self.traced: dict[Any, Traced | None] = {}
        self.replacements: dict[Any, fx.GraphModule] = {}
        self.exposure = views.Exposure(graph_module.graph)

    def match(self, rule: Rule, anchor: fx.Node) -> Match | search.Failure:
        """The match whose first result is computed by `anchor`, or how far it came."""
        failure = search.Failure()
        skeleton = rule.pattern.skeleton
        if search.anchor(skeleton) != anchor.target:
            return failure
        loose = search.Search(skeleton, _examples_of_numbers(rule.pattern), None, failure).results(anchor)
        if loose is None:
            return failure
        # All operations are there: what fails now is a number, a cast, a view or a size at one of them.
        failure = search.Failure(complete=True)
        for bound in search.bindings(loose[0], _TRIES):
            values = {**loose[0].numbers, **bound}
            values = {name: values[name] for name in rule.pattern.examples}
            traced = self._trace(rule.pattern, values)
            if traced is None:
                continue
            exact = search.Search(traced, {}, bound, failure).results(anchor)
            if exact is None and failure.by_reading:
                continue
            if exact is None:
                break
            state, results = exact
            inside = frozenset(state.passed | {anchor}) - set(results)
            match = Match(rule.pattern, values, tuple(results), inside)
            reason = self._why_not(match) or _refused_by(rule, match)
            if not reason:
                return match
            failure.note(skeleton.computing, next(iter(state.pairs)), self._culprit(match), reason)
        failure.depth, failure.matched = failure.matched, max(failure.matched, skeleton.computing - 1)
        return failure

    def replace(self, rule: Rule, match: Match) -> int:
        """Put the replacement where the match is."""
        first = min(match.results, key=self.position.__getitem__)
        nodes = [value for value in match.values.values() if isinstance(value, fx.Node)]
        key = rule, _signature(match.values), tuple(nodes.index(node) for node in nodes)
        with edit.rewriting(self.graph_module, first) as rewriting:
            if key not in self.replacements:
                self.replacements[key] = _traced_replacement(rule, match, rewriting)
            made = rewriting.paste(self.replacements[key], list(dict.fromkeys(nodes)))
            new = made if isinstance(made, (list, tuple)) else (made,)
            for old, replacement in zip(match.results, new, strict=True):
                rewriting.replace(old, rewriting.like(self._kept_apart(rewriting, replacement, old), old))
        node = first.prev
        while node not in self.position:
            self.position[node] = self.position[first] - 1
            node = node.prev
        for node in sorted(match.inside | set(match.results), key=self.position.__getitem__, reverse=True):
            edit.erase_unused(node)
        return rewriting.applied

    def _kept_apart(self, rewriting: edit.Rewrite, new: fx.Node, old: fx.Node) -> fx.Node:
        """`new`, or a copy where the caller would see that it is no memory of its own, as `old` is."""
        if views.storage(new) in self.position and not self.exposure.may_become(old, new):
            return rewriting.call(torch.ops.aten.clone.default, new)
        self.exposure.became(old, new)
        return new

    def _trace(self, pattern: Pattern, values: Mapping[str, Any]) -> Traced | None:
        key = pattern, _signature(values)
        if key not in self.traced:
            fakes = {name: value.meta["val"] if isinstance(value, fx.Node) else value for name, value in values.items()}
            try:
                with _compat.speculative_execution(self.graph_module):
                    self.traced[key] = pattern.trace(fakes)
            except (RuntimeError, ValueError, IndexError, TypeError, NotImplementedError):
                # The function is not defined for such values: this is not what the holes stand for.
                self.traced[key] = None
        return self.traced[key]

    def _why_not(self, match: Match) -> str:
        """Why a match must not be replaced: others need what is inside, or memory is written in between."""
        culprit = self._culprit(match)
        if culprit in match.inside:
            users = ", ".join(f"%{user.name}" for user in culprit.users)
            return f"expected no other user, has {len(culprit.users)} ({users})"
        first = min(match.results, key=self.position.__getitem__)
        for name, value in match.values.items():
            if isinstance(value, fx.Node) and self.position[value] > self.position[first]:
                return f"{name} (%{value.name}) is computed after the result %{first.name}"
        return self._written(match)

    def _culprit(self, match: Match) -> fx.Node:
        """A node inside the match that others use, else the first result."""
        within = match.inside | set(match.results)
        for node in match.inside:
            if not within.issuperset(node.users):
                return node
        return match.results[0]

    def _written(self, match: Match) -> str:
        if not self.writers:
            return ""
        positions = [self.position[node] for node in (*match.inside, *match.results)]
        memory = {views.storage(value): value for value in match.values.values() if isinstance(value, fx.Node)}
        for writer in self.writers:
            if min(positions) < self.position[writer] < max(positions):
                for node in writer.all_input_nodes:
                    if views.storage(node) in memory:
                        return f"memory of %{memory[views.storage(node)].name} is written by %{writer.name} in between"
        return ""


def _refused_by(rule: Rule, match: Match) -> str:
    reason = rule.condition(match)
    if not isinstance(reason, str):
        raise PatternError(
            f"pattern {rule.pattern.name!r}: its condition must return '' to accept a match, or the reason (str) to"
            f" leave it alone, got {reason!r}"
        )
    return reason


def _traced_replacement(rule: Rule, match: Match, rewriting: edit.Rewrite) -> fx.GraphModule:
    traced = in_new_values(
        rule.replacement,
        lambda function: rewriting.trace(function, decompositions=capture.decompositions(), **match.values),
    )
    if traced is None:
        raise rule.pattern.wrong("its replacement updates a parameter in place, which no rewrite may do")
    if draws_numbers(traced.graph):
        raise rule.pattern.wrong("its replacement draws random numbers, which the pattern does not")
    made: Any = traced.graph.output_node().args[0]
    results = made if isinstance(made, (list, tuple)) else (made,)
    if len(results) != len(match.results) or not all(isinstance(result, fx.Node) for result in results):
        raise rule.pattern.wrong(
            f"it returns {len(match.results)} tensors, its replacement {', '.join(map(_kind_of, results))}"
        )
    return traced


def _kind_of(result: Any) -> str:
    return "a tensor" if isinstance(result, fx.Node) else repr(result)


def _examples_of_numbers(pattern: Pattern) -> dict[str, Any]:
    return {
        name: example for name, example in pattern.examples.items() if not isinstance(example, (tuple, torch.Tensor))
    }


def _signature(values: Mapping[str, Any]) -> tuple[Any, ...]:
    """What tracing on these values depends on."""
    return tuple(
        (shapes.signature(value.meta["val"]) if isinstance(value, fx.Node) else value) for value in values.values()
    )
