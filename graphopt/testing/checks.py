"""What a pass promises, checked in one call: `check_pass`, and for its refusals `assert_not_applied`."""

from __future__ import annotations

import copy
import dataclasses
import textwrap
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_leaves, tree_map

from graphopt import edit, pipeline, shapes, text
from graphopt.errors import OptionError
from graphopt.options import VERIFY, Options
from graphopt.testing import traced
from graphopt.verify import Checker, judge, wide

Pass = Callable[..., int]


def check_pass(
    pass_: Pass | Sequence[Pass],
    function: Callable[..., Any],
    inputs: Sequence[Any],
    *,
    count: int | None = None,
    after: str | Callable[[fx.GraphModule], bool] | None = None,
    second: Sequence[Any] | None = None,
    verify: str = "all",
    dynamic: bool | None = None,
) -> traced.TracedGraph:
    """Run `function` with only `pass_` (or several passes, the last one being tested) and check its contract.

    Checked: the number of rewrites (`count`), which is also the number that went through `graphopt.edit`; that
    the graph lints and `meta["val"]` is what running the nodes on fake values gives; the text of the graph
    (`after`: text as `graphopt.text.render` writes it, with or without its inputs, or a predicate on the graph);
    results and changed inputs against the graph without the pass, as its exactness demands, and against eager; which
    results share memory with what; the same numbers as eager after the weights of a module were scaled in place; that a
    second run changes nothing; all of it again on `second` (by default the inputs with a doubled first dimension, where
    eager takes that). Each rewrite is verified by itself at level `verify` ("off", "sample", "all"). Returns the first
    graph; AssertionError or VerificationError says what is wrong.
    """
    passes = _listed(pass_, inputs)
    if verify not in VERIFY:
        raise OptionError(f"verify={verify!r}: allowed are {', '.join(map(repr, VERIFY))}")
    function = copy.deepcopy(function) if isinstance(function, torch.nn.Module) else function
    observer = None if verify == "off" else Checker(verify)
    compiled = traced.trace(function, passes, observer=observer, dynamic=dynamic)
    exactness = _loosest(passes)
    _check_numbers(function, compiled, passes, inputs, exactness, dynamic)
    _check_compiled(compiled)
    found = sum(graph.reports[-1].rewrites for graph in compiled.graphs)
    if count is not None and found != count:
        refusals = "; ".join(refusal.reason for graph in compiled.graphs for refusal in graph.refusals)
        shown = "\n\n".join(text.render(graph.before) for graph in compiled.graphs)
        raise AssertionError(f"expected {count} rewrites, got {found}; refused: {refusals or 'nothing'}\n{shown}")
    first = compiled.graphs[0]
    if after is not None:
        _check_text(first.after, after)
    more = list(second) if second is not None else _doubled(function, inputs)
    if more:
        _check_numbers(function, compiled, passes, more, exactness, dynamic)
    for graph in compiled.graphs:
        check_graph(graph.after)
        if graph.applications != graph.rewrites:
            raise AssertionError(
                f"{graph.rewrites} rewrites reported, but {graph.applications} went through graphopt.edit"
            )
        _check_idempotent(graph.after, passes)
    return first


def assert_not_applied(
    pass_: Pass | Sequence[Pass],
    function: Callable[..., Any],
    inputs: Sequence[Any],
    *,
    reason: str | None = None,
    dynamic: bool | None = None,
) -> traced.TracedGraph:
    """Assert that the (last) pass changes nothing here and, if `reason` is given, that a refusal contains it."""
    passes = _listed(pass_, inputs)
    compiled = traced.trace(function, passes, dynamic=dynamic)
    with torch.no_grad():
        compiled(*copies(inputs))
    _check_compiled(compiled)
    last = [graph.reports[-1] for graph in compiled.graphs]
    applied = sum(report.rewrites for report in last)
    if applied:
        shown = "\n\n".join(text.render(graph.after) for graph in compiled.graphs)
        raise AssertionError(f"applied {applied} times:\n{shown}")
    reasons = [refusal.reason for report in last for refusal in report.refusals]
    if reason is not None and not any(reason in given for given in reasons):
        raise AssertionError(f"no refusal says {reason!r}; refusals: {reasons or 'none'}")
    return compiled.graphs[0]


def _listed(pass_: Pass | Sequence[Pass], inputs: Any) -> list[Pass]:
    """The passes as a list; raises OptionError for arguments of `check_pass` that mean something else."""
    passes = list(pass_) if isinstance(pass_, Sequence) else [pass_]
    if not passes:
        raise OptionError("there is no pass to check")
    if not isinstance(inputs, (list, tuple)):
        raise OptionError(
            f"inputs must be a list of the arguments, got {type(inputs).__name__}: write [x] for one tensor"
        )
    return passes


def _check_compiled(compiled: traced.Traced) -> None:
    if not compiled.graphs:
        raise AssertionError(
            "there is no graph to look at: the function computes nothing on tensors, or Dynamo left it alone"
        )


def check_graph(graph_module: fx.GraphModule) -> None:
    """Assert that a graph lints and that each `meta["val"]` is what running its node on fake values gives."""
    graph_module.graph.lint()
    for node in graph_module.graph.nodes:
        if node.op != "call_function" or edit.is_impure(node):
            continue
        found = shapes.difference(node.meta["val"], edit.evaluate(graph_module, node))
        if found:
            raise AssertionError(f"meta['val'] of {text.line(node)} has another {found} than a run gives")


def _check_numbers(
    function: Callable[..., Any],
    compiled: traced.Traced,
    passes: Sequence[Pass],
    inputs: Sequence[Any],
    exactness: str,
    dynamic: bool | None,
) -> None:
    with torch.no_grad():
        optimised = run(compiled, function, inputs)
        if exactness != "lossy":
            _check_other_weights(function, compiled, inputs)
        eager = run(function, function, inputs)
        graphs = list(compiled.graphs)
        plain = run(traced.trace(function, passes, optimised=False, dynamic=dynamic), function, inputs)
        exact = run(function, function, inputs, widened=True)
    compiled.graphs[:] = graphs
    layout = all(graph.same_layout for graph in graphs)
    found = judge.difference(plain.values, optimised.values, exact.values, exactness, layout=layout)
    if found is not None:
        raise AssertionError(f"results differ from the graph without the pass: {found}")
    against_eager = "lossy" if exactness == "lossy" else "rounding"
    found = judge.difference(eager.values, optimised.values, exact.values, against_eager, layout=layout)
    if found is not None:
        raise AssertionError(f"results differ from eager: {found}")
    found_alias = judge.alias_difference(eager.aliases, optimised.aliases)
    if found_alias:
        raise AssertionError(found_alias)


def _check_other_weights(function: Callable[..., Any], compiled: traced.Traced, inputs: Sequence[Any]) -> None:
    """Compare with eager after an update of the weights. Scaling them keeps what is zero or infinite."""
    weights = list(function.parameters()) if isinstance(function, torch.nn.Module) else []
    floating = [weight for weight in weights if weight.is_floating_point()]
    if not floating:
        return
    saved = [weight.detach().clone() for weight in floating]
    try:
        for weight in floating:
            weight.mul_(1.25)
        optimised = run(compiled, function, inputs).values
        eager, exact = (run(function, function, inputs, widened=widened).values for widened in (False, True))
    finally:
        for weight, value in zip(floating, saved, strict=True):
            weight.copy_(value)
    found = judge.difference(eager, optimised, exact, "rounding", layout=False)
    if found is not None:
        raise AssertionError(f"results differ from eager after an update of the weights: {found}")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Results, inputs after the call and buffers after the call, and which results share memory with what.

    values is None where a float64 run is not possible.
    """

    values: list[Any] | None
    aliases: dict[tuple[int, str], bool]


def run(call: Callable[..., Any], owner: Callable[..., Any], inputs: Sequence[Any], widened: bool = False) -> Outcome:
    """One call; whatever it does to the owner's buffers is undone."""
    state = {name: value.detach().clone() for name, value in _state(owner)}
    given = wide.widened(copies(inputs)) if widened else copies(inputs)
    torch.manual_seed(0)
    try:
        results = wide.run_wide(call, given) if widened else call(*given)
        if results is None and widened:
            return Outcome(None, {})
        made, after = tree_leaves(results), tree_leaves(given)
        found = [leaf for leaf in (*made, *after) if leaf is not None]
        # In float64 no buffer is updated: those are compared within a tolerance.
        buffers = [None if widened else value.detach().clone() for _, value in _state(owner)]
        return Outcome([*found, *buffers], judge.alias_sets(made, after))
    finally:
        with torch.no_grad():
            for name, value in _state(owner):
                value.copy_(state[name])


def _state(owner: Callable[..., Any]) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(owner, torch.nn.Module):
        yield from owner.named_buffers()


def _check_text(graph_module: fx.GraphModule, after: str | Callable[[fx.GraphModule], bool]) -> None:
    found = text.canonical_symbols(text.render(graph_module))
    if callable(after):
        if not after(graph_module):
            raise AssertionError(f"the predicate does not hold for the graph:\n{found}")
        return
    expected = textwrap.dedent(after).strip()
    operations = "\n".join(row for row in found.splitlines() if not row.endswith(" = input"))
    if text.canonical_symbols(expected) not in (found, text.canonical_symbols(operations)):
        changed = text.diff(expected, operations)
        raise AssertionError(f"another graph than expected:\n{changed}\n\nthe graph is\n{found}")


def _check_idempotent(graph_module: fx.GraphModule, passes: Sequence[Pass]) -> None:
    again = traced.copied(graph_module)
    before = text.render(again)
    report = pipeline.run(again, [passes[-1]], Options(strict=True))
    if report and report[0].rewrites:
        changed = text.diff(before, text.render(again))
        raise AssertionError(f"a second run makes {report[0].rewrites} more rewrites:\n{changed}")


def _loosest(passes: Sequence[Pass]) -> str:
    order = ("bitwise", "rounding", "lossy")
    return max((pipeline.describe(function).exactness for function in passes), key=order.index)


def _doubled(function: Callable[..., Any], inputs: Sequence[Any]) -> list[Any]:
    """The inputs with a doubled first dimension, where it is that of the first tensor; [] if eager refuses."""
    tensors = [leaf for leaf in tree_leaves(tuple(inputs)) if isinstance(leaf, torch.Tensor)]
    if not tensors or tensors[0].dim() == 0:
        return []
    batch = tensors[0].shape[0]

    def double(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor) and leaf.dim() and leaf.shape[0] == batch:
            return torch.cat((leaf, leaf.flip(0)))
        return leaf

    more = list(tree_map(double, tuple(inputs)))
    try:
        with torch.no_grad():
            run(function, function, more)
    except (RuntimeError, IndexError, ValueError):
        return []
    return more


def copies(inputs: Sequence[Any]) -> list[Any]:
    """The inputs with new tensors, so that a call may change them."""

    def copied(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return copy.deepcopy(leaf)
        return leaf.detach().clone().requires_grad_(leaf.requires_grad)

    return list(tree_map(copied, tuple(inputs)))
