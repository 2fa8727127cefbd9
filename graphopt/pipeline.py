"""Run passes over a captured graph: order, contract, undo, timing, dumps and numbering in one place.

A pass is a function `def name(graph_module) -> int` under `@graph_pass`; it returns how many rewrites it made.
After each pass: dead code is gone, the graph lints, `meta["val"]` is right; a pass that raises is undone and reported.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal, TypeVar, cast

from torch import fx

from graphopt import _compat, capture, edit
from graphopt.errors import OptionError, PassError, nearest
from graphopt.options import Options

Exactness = Literal["bitwise", "rounding", "lossy"]
Stage = Literal["canonicalize", "recognize", "kv_cache", "prune", "quantize", "fuse"]
STAGES: tuple[Stage, ...] = ("canonicalize", "recognize", "kv_cache", "prune", "quantize", "fuse")

PassFunction = TypeVar("PassFunction", bound=Callable[..., int])


@dataclasses.dataclass(frozen=True)
class PassInfo:
    """What a pass declares: see `graph_pass`."""

    name: str
    exactness: Exactness
    stage: Stage
    training: bool
    before: str | None = None
    after: str | None = None


@dataclasses.dataclass(frozen=True)
class PassReport:
    """What one pass did to one graph. seconds is wall time; error is the exception's text if it was undone.

    notes: what its user should know of what it chose.
    """

    name: str
    stage: Stage
    exactness: Exactness
    rewrites: int
    seconds: float
    nodes_before: int
    nodes_after: int
    refusals: tuple[edit.Refusal, ...] = ()
    error: str = ""
    notes: tuple[str, ...] = ()


def graph_pass(
    *,
    exactness: Exactness,
    stage: Stage = "fuse",
    training: bool = True,
    before: str | None = None,
    after: str | None = None,
) -> Callable[[PassFunction], PassFunction]:
    """Declare a function on a GraphModule to be a pass.

    exactness: "bitwise" (same bits), "rounding" (another order of the same arithmetic) or "lossy" (only by name).
    stage: where in the pipeline it runs. training: whether it may run on forward and backward graphs.
    before, after: the name of a pass or a stage that it must precede or follow.
    """
    if exactness not in ("bitwise", "rounding", "lossy"):
        raise OptionError(f"exactness must be 'bitwise', 'rounding' or 'lossy', got {exactness!r}")
    if stage not in STAGES:
        raise OptionError(f"stage must be one of {', '.join(STAGES)}, got {stage!r}")
    for what, name in (("before", before), ("after", after)):
        if name is not None and not isinstance(name, str):
            raise OptionError(f"{what} must be the name of a pass or a stage (str), got {name!r}")

    def declare(function: PassFunction) -> PassFunction:
        name = function.__name__
        function.graph_pass = PassInfo(name, exactness, stage, training, before, after)  # type: ignore[attr-defined]
        return function

    return declare


def describe(function: Callable[..., int]) -> PassInfo:
    """The declaration of a pass."""
    declared = getattr(function, "graph_pass", None)
    if not isinstance(declared, PassInfo):
        raise OptionError(f"{function!r} is not a pass: decorate it with @graphopt.graph_pass(...)")
    return declared


def arrange(
    passes: Iterable[Callable[..., int]], absent: Iterable[Callable[..., int]] = ()
) -> list[Callable[..., int]]:
    """Passes in the order they run: by stage, then as given, moved where `before` and `after` ask for it.

    absent: passes that do not run, but may be named; each counts as its stage.
    Raises OptionError where `before` and `after` name what does not exist, contradict each other, or lead in a circle.
    """
    ordered = sorted(passes, key=lambda function: STAGES.index(describe(function).stage))
    present = {describe(function).name for function in ordered}
    stages = {describe(function).name: describe(function).stage for function in absent}
    _check_names(map(describe, ordered), {*STAGES, *present, *stages})
    placed = [function for function in ordered if not _named(describe(function))]
    waiting = [function for function in ordered if _named(describe(function))]
    while waiting:
        missing = {describe(function).name for function in waiting}
        ready = next((function for function in waiting if not missing & _named(describe(function))), None)
        if ready is None:
            raise OptionError(_circle([describe(function) for function in waiting]))
        placed.insert(_position(placed, describe(ready), stages), ready)
        waiting.remove(ready)
    return placed


def _named(declared: PassInfo) -> set[str]:
    """The passes and stages that a pass wants to precede or follow."""
    return {name for name in (declared.before, declared.after) if name}


def _check_names(passes: Iterable[PassInfo], known: set[str]) -> None:
    for declared in passes:
        for name in sorted(_named(declared) - known):
            raise OptionError(
                f"pass {declared.name!r} refers to unknown pass or stage {name!r}{nearest(name, sorted(known))};"
                f" known are {', '.join(sorted(known))}"
            )


def _circle(waiting: Sequence[PassInfo]) -> str:
    asked = (
        f"{one.name!r} {word} {name!r}"
        for one in waiting
        for word, name in (("before", one.before), ("after", one.after))
        if name
    )
    return f"passes cannot be ordered, their before= and after= lead in a circle: {', '.join(asked)}"


def _position(placed: Sequence[Callable[..., int]], declared: PassInfo, stages: Mapping[str, Stage]) -> int:
    def span(name: str) -> tuple[int, int]:
        """The places of the first and behind the last pass of a name or stage."""
        found = [
            index
            for index, function in enumerate(placed)
            if name in (describe(function).name, describe(function).stage)
        ]
        if found:
            return min(found), max(found) + 1
        if name in stages:
            return span(stages[name])
        earlier = STAGES[: STAGES.index(cast(Stage, name))]
        between = sum(describe(function).stage in earlier for function in placed)
        return between, between

    low = span(declared.after)[1] if declared.after else 0
    high = span(declared.before)[0] if declared.before else len(placed)
    # Of several that want to follow one pass the first stays the first.
    while declared.after and low < high and describe(placed[low]).after == declared.after:
        low += 1
    if low > high:
        raise OptionError(
            f"pass {declared.name!r} cannot run after {declared.after!r} and before {declared.before!r}:"
            f" {declared.after!r} runs later than {declared.before!r}"
        )
    return low if declared.after else high


def run(
    graph_module: fx.GraphModule,
    passes: Sequence[Callable[..., int]],
    options: Options,
    *,
    observer: Callable[[edit.Application], None] | None = None,
    after_pass: Callable[[str, fx.GraphModule], object] | None = None,
) -> list[PassReport]:
    """Run `passes` in order on the graph, in place. Passes that do not fit the graph's kind are left out.

    observer: called at each rewrite while both sides are in the graph. after_pass: called with the name of each
    pass that changed the graph, and the graph.
    """
    session = edit.Session(limit=options.limit, observer=observer)
    training = capture.info(graph_module).training
    reports = []
    saved: fx.Graph | None = None  # as the passes up to now left it; good until one changes the graph
    with edit.session(session):
        for function in passes:
            declared = describe(function)
            if declared.name in options.disable or (training and not declared.training):
                continue
            saved = saved or _copy(graph_module.graph)
            report = _run_one(graph_module, function, declared, session, options, saved)
            reports.append(report)
            if report.rewrites or report.error:
                saved = None
            if report.rewrites and after_pass is not None:
                after_pass(declared.name, graph_module)
    graph_module.recompile()
    return reports


def _run_one(
    graph_module: fx.GraphModule,
    function: Callable[..., int],
    declared: PassInfo,
    session: edit.Session,
    options: Options,
    saved: fx.Graph,
) -> PassReport:
    session.pass_name, session.exactness = declared.name, declared.exactness
    session.refusals, session.notes = [], []
    count_before, made = len(graph_module.graph.nodes), session.rewrites
    rewrites, error, started = 0, "", time.perf_counter()
    try:
        rewrites = _count(function(graph_module), declared.name)
        edit.eliminate_dead_code(graph_module)
        graph_module.graph.lint()
        _check_values(graph_module, declared.name)
    except Exception as raised:
        if options.strict or _compat.is_control_flow(raised):
            raise
        graph_module.graph, rewrites, session.rewrites = saved, 0, made
        error = f"{type(raised).__name__}: {raised}"
    seconds = time.perf_counter() - started
    return PassReport(
        declared.name,
        declared.stage,
        declared.exactness,
        rewrites,
        seconds,
        count_before,
        len(graph_module.graph.nodes),
        tuple(session.refusals),
        error,
        tuple(session.notes),
    )


def _count(rewrites: object, name: str) -> int:
    if not isinstance(rewrites, int) or rewrites < 0:
        raise PassError(f"{name} must return how many rewrites it made (int, 0 or more), got {rewrites!r}")
    return int(rewrites)


def _copy(graph: fx.Graph) -> fx.Graph:
    copy = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    copy.output(copy.graph_copy(graph, mapping))
    copy.output_node().meta = dict(graph.output_node().meta)
    return copy


def _check_values(graph_module: fx.GraphModule, name: str) -> None:
    for node in graph_module.graph.nodes:
        if node.op == "call_function" and "val" not in node.meta:
            raise PassError(
                f"{name} left node {node.format_node()} without meta['val']; use graphopt.edit to make nodes"
            )
