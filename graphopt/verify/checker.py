"""Check each rewrite of a compilation as it is made: the observer of `pipeline.run` under `verify="sample"|"all"`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import fx

from graphopt import text
from graphopt.edit import Application
from graphopt.errors import VerificationError
from graphopt.verify import assumptions, execution, field, inputs, judge, repro, wide
from graphopt.verify.cut import Pair, cut, widened
from graphopt.verify.shrink import shrink

_WIDENINGS = (1, 2, 4, 8, 16)


@dataclasses.dataclass(frozen=True)
class Failure:
    """A rewrite that does not compute what it replaces: what differs, on which inputs, and the smallest case found."""

    pair: Pair
    found: judge.Difference
    inputs: inputs.InputSet
    reproducer: Path | None = None

    @property
    def message(self) -> str:
        """What differs, as text."""
        return self.found.message

    def __str__(self) -> str:
        made = self.pair.provenance
        written = f"\nrun {self.reproducer} to see it" if self.reproducer else ""
        return (
            f"rewrite {made.number}, by {made.pass_name} ({self.pair.exactness}), of {', '.join(made.sources)}"
            f"{' at ' + self.pair.where if self.pair.where else ''} changes results: {self.message}"
            f"\nbefore:\n{_indented(self.pair.before)}\nafter:\n{_indented(self.pair.after)}{written}"
        )


@dataclasses.dataclass
class Checker:
    """An observer of rewrites that runs each distinct one on its inputs before and after.

    level: "sample" (a few inputs for each distinct rewrite) or "all". on_failure: called with each `Failure`; by
    default a VerificationError is raised. directory: where reproducers are written; None writes none.
    checked, distinct, unchecked: how many rewrites were seen, how many kinds there were, how many kinds could not be
    run (no valid inputs were found for them); failures: what was found.
    """

    level: str
    on_failure: Callable[[Failure], None] | None = None
    directory: Path | None = None
    checked: int = 0
    distinct: int = 0
    unchecked: int = 0
    failures: list[Failure] = dataclasses.field(default_factory=list)
    _known: dict[str, bool] = dataclasses.field(default_factory=dict)

    def __call__(self, application: Application) -> None:
        self.checked += 1
        with execution.real_execution():
            pair = cut(application)
            if pair.key in self._known:
                return
            self.distinct += 1
            self._known[pair.key] = True
            failure = self._check(application, pair)
            if failure is None:
                return
            failure = self._reduced(failure)
        self.failures.append(failure)
        if self.on_failure is None:
            raise VerificationError(str(failure))
        self.on_failure(failure)

    def summary(self) -> dict[str, Any]:
        """Counts for the report."""
        return {
            "checked": self.checked,
            "distinct": self.distinct,
            "unchecked": self.unchecked,
            "failed": len(self.failures),
        }

    def _check(self, application: Application, pair: Pair) -> Failure | None:
        order = random_order(application)
        if order is not None:
            return Failure(pair, order, inputs.InputSet("none", {}, []))
        failure, ran = self._first_failure(pair)
        if not ran:
            self.unchecked += 1
        if failure is None:
            return None
        # The rewrite may rest on a fact about its inputs: believe it if it holds when these are computed too.
        failures = [failure]
        for steps in _WIDENINGS:
            wider = widened(application, steps)
            if wider is None:
                break
            again, ran = self._first_failure(wider)
            if ran and again is None:
                return None
            failures += [again] if again is not None else []
        # The narrowest that fails as the widest does: what else a narrow one shows may come of impossible inputs.
        return next(narrow for narrow in failures if narrow.found.kinds <= failures[-1].found.kinds)

    def _first_failure(self, pair: Pair) -> tuple[Failure | None, bool]:
        ran = False
        for given in inputs.generate(pair.before, self.level):
            values = assumptions.satisfied(pair.after, given.values)
            if values is None:
                continue
            try:
                found = compare(pair, values)
            except InvalidInputs:
                continue
            ran = True
            if found is not None:
                return Failure(pair, found, dataclasses.replace(given, values=values)), True
        if field.applies(pair) and not assumptions.stated(pair.after):
            found = field.compare(pair)
            if found is not None:
                return Failure(pair, found, inputs.InputSet("finite field", {}, [])), True
        return None, ran

    def _reduced(self, failure: Failure) -> Failure:
        if failure.inputs.values:
            pair, given, found = shrink(failure.pair, failure.inputs, failure.found, compare_as_stated)
            failure = Failure(pair, found, given)
            if self.directory is not None:
                path = repro.write(self.directory, pair, given.values, found.message)
                failure = dataclasses.replace(failure, reproducer=path)
        return failure


class InvalidInputs(Exception):
    """The old graph cannot run on these inputs, or the rewrite does not claim to hold for them."""


def compare(pair: Pair, values: list[Any]) -> judge.Difference | None:
    """How the graphs of a pair differ on these inputs. Raises InvalidInputs if the old one cannot run on them."""
    try:
        old, old_inputs = execution.run(pair.before, values)
    except (RuntimeError, IndexError, ValueError, ZeroDivisionError) as raised:
        raise InvalidInputs(str(raised)) from raised
    try:
        new, new_inputs = execution.run(pair.after, values)
    except Exception as raised:
        return judge.different(f"the new nodes raise {type(raised).__name__}", f": {raised}")
    exact = None
    if pair.exactness == "rounding":
        torch.manual_seed(0)
        exact = wide.run_wide(pair.before, [execution.copy(value) for value in values])
    found = judge.difference(old, new, exact, pair.exactness, layout=pair.same_layout)
    if found is not None:
        return found
    changed = judge.difference(old_inputs, new_inputs, None, pair.exactness, layout=False)
    if changed is not None:
        return judge.Difference(f"inputs are changed differently: {changed}", frozenset({"inputs changed differently"}))
    return _alias_difference(pair, (old, old_inputs), (new, new_inputs))


def compare_as_stated(pair: Pair, values: list[Any]) -> judge.Difference | None:
    """As `compare`; inputs for which the rewrite does not claim to hold are invalid."""
    if not assumptions.hold(pair.after, values):
        raise InvalidInputs("what the rewrite rests on does not hold")
    return compare(pair, values)


def random_order(application: Application) -> judge.Difference | None:
    """Whether a rewrite moves a random draw past another one, or makes another number of draws."""
    nodes = list(application.graph_module.graph.nodes)
    new = {node for node in nodes if node.meta.get("graphopt") is application.provenance}
    draws = [node for node in nodes if _is_random(node)]
    replaced = [old for old, _ in application.pairs if old in draws]
    if not replaced and not any(node in new for node in draws):
        return None
    old_order = [node for node in draws if node not in new]
    new_order = [node for node in draws if node not in replaced]
    for old, fresh in application.pairs:
        if old in replaced and fresh in new_order and old_order.index(old) != new_order.index(fresh):
            was = f": {old.name} was draw {old_order.index(old) + 1}"
            return judge.different("random numbers are drawn in another order", was)
    if len(old_order) != len(new_order):
        return judge.different("another number of random draws", f": {len(old_order)} became {len(new_order)}")
    return None


def _is_random(node: fx.Node) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload) or node.target.namespace == "graphopt":
        return False  # the dialect marks what hands out memory as if it were random, so that it is never merged
    return torch.Tag.nondeterministic_seeded in node.target.tags


def _alias_difference(
    pair: Pair, before: tuple[list[Any], list[Any]], after: tuple[list[Any], list[Any]]
) -> judge.Difference | None:
    old, new = judge.alias_sets(*before), judge.alias_sets(*after)
    for (output, other), shared in new.items():
        kind, number = other.split()
        exposed = pair.exposed_inputs[int(number)] if kind == "input" else pair.exposed[int(number)]
        if pair.exposed[output] and exposed and shared != old.get((output, other), shared):
            verb = "now shares" if shared else "no longer shares"
            told = f"output {output} {verb} memory with {other}, and the caller can see it"
            return judge.Difference(told, frozenset({f"{verb} memory"}))
    return None


def _indented(graph_module: fx.GraphModule) -> str:
    return "\n".join("    " + row for row in text.render(graph_module).splitlines())
