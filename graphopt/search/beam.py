"""Find the passes, their order and the places where they apply that make a graph cheapest on a device.

A bounded beam search (Lowerre, 1976; as compilers use it, e.g. Adams et al., 2019): from the captured graph, each move
applies one pass everywhere or at one place; the states with the least predicted time are followed further, equal graphs
once. Rewrites are the passes' own, so whatever is found is as exact as they are. Equality saturation would share work
between states, but e-graphs need every rewrite stated on terms of their own; passes are programs on the graph with
conditions on shapes, strides and memory, and a second form of each would have to be kept equal to the first.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import fx

from graphopt import _compat, edit, estimate, passes, pipeline, text
from graphopt.capture import capture
from graphopt.cost import Cost, CostModel, Device
from graphopt.errors import OptionError
from graphopt.options import Options
from graphopt.pipeline import graph_pass
from graphopt.runtime.artifact import Artifact

Pass = Callable[..., int]


@dataclasses.dataclass(frozen=True)
class Move:
    """One pass, applied everywhere (places is None) or at the places with these numbers, in the order it tries them."""

    function: Pass
    places: frozenset[int] | None = None

    def __str__(self) -> str:
        shown = "" if self.places is None else f" at {', '.join(map(str, sorted(self.places)))}"
        return f"{pipeline.describe(self.function).name}{shown}"

    def apply(self, graph_module: fx.GraphModule) -> tuple[int, int]:
        """Apply in place, undone if the pass raises; returns how many rewrites were made and how many were tried."""
        saved = copy.deepcopy(graph_module.graph)
        with edit.selecting(pipeline.describe(self.function).name, self.places) as session:
            made = session.rewrites
            try:
                count = self.function(graph_module)
                edit.eliminate_dead_code(graph_module)
                return count, session.attempts
            except Exception as raised:
                if _compat.is_control_flow(raised):
                    raise
                graph_module.graph, session.rewrites = saved, made
                return 0, 0


@dataclasses.dataclass(frozen=True)
class Plan:
    """What was found for one graph: the moves, the cost and predicted seconds before and after them.

    explored: how many different graphs were judged. complete: whether the search ended by itself, not by its budget.
    """

    moves: tuple[Move, ...]
    cost: Cost
    seconds: float
    captured_cost: Cost
    captured_seconds: float
    device: str
    sizes: dict[str, int]
    explored: int
    complete: bool

    def __str__(self) -> str:
        ended = "" if self.complete else ", stopped by the budget"
        return (
            f"{self.captured_seconds * 1e3:.4g} ms -> {self.seconds * 1e3:.4g} ms on {self.device}"
            f" ({self.explored} graphs{ended}): {'; '.join(map(str, self.moves)) or 'leave it as it is'}"
        )

    def options(self, **others: Any) -> dict[str, Any]:
        """Options for `torch.compile` that run this plan in place of the library's passes, and `others` besides."""
        moves = self.moves

        @graph_pass(exactness="rounding", stage="canonicalize", training=False)
        def planned(graph_module: fx.GraphModule) -> int:
            return sum(move.apply(graph_module)[0] for move in moves)

        own = tuple(function.__name__ for function in passes.PIPELINE)
        return {"passes": (planned,), "disable": own, **others}


@dataclasses.dataclass
class _State:
    graph_module: fx.GraphModule
    moves: tuple[Move, ...]
    cost: Cost
    seconds: float


def best(
    model: Callable[..., Any],
    *inputs: Any,
    using: Sequence[Pass] = passes.PIPELINE,
    finish: Sequence[Pass] | None = None,
    roofline: str = "auto",
    cost_model: CostModel | None = None,
    beam: int = 4,
    places: int = 4,
    budget: int = 200,
    **kwargs: Any,
) -> list[Plan]:
    """The cheapest sequence of moves found for each graph that running `model` once compiles.

    using: the passes to choose from; lossy ones are refused. finish: passes that run on a copy of each graph before it
    is judged; None forms regions, as what costs is what is left after fusion. roofline, cost_model: as for `explain`
    and as the option. beam: how many graphs are followed further at each depth. places: a pass that applies at no more
    places than this is also tried at each by itself. budget: how many graphs are judged at most.
    """
    for name, value in (("beam", beam), ("places", places), ("budget", budget)):
        if not isinstance(value, int) or value < (0 if name == "places" else 1):
            raise OptionError(f"{name} must be a whole number, {0 if name == 'places' else 1} or more, got {value!r}")
    for function in using:
        if pipeline.describe(function).exactness == "lossy":
            raise OptionError(f"pass {pipeline.describe(function).name!r} is lossy: only exact rewrites are searched")
    ending = passes.for_target("triton", Options(cost_model=cost_model)) if finish is None else finish
    found: list[Plan] = []

    def backend(graph_module: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        def search(captured: fx.GraphModule, fake_inputs: Sequence[Any], info: Any) -> Callable[..., Any]:
            device = estimate.device_of(captured, roofline)
            judge = _Judge(device, cost_model, ending, budget)
            found.append(_search(captured, [f for f in using if _fits(f, info.training)], judge, beam, places))
            return Artifact(lambda boxed: captured.forward(*boxed))

        return capture(graph_module, example_inputs, search)

    torch.compile(model, backend=backend)(*inputs, **kwargs)
    return found


def _fits(function: Pass, training: bool) -> bool:
    return pipeline.describe(function).training or not training


@dataclasses.dataclass
class _Judge:
    """Says what a graph costs; counts how often it was asked."""

    device: Device
    model: CostModel | None
    finish: Sequence[Pass]
    budget: int
    asked: int = 0

    def __call__(self, graph_module: fx.GraphModule, moves: tuple[Move, ...]) -> _State:
        self.asked += 1
        finished = _copy(graph_module)
        pipeline.run(finished, self.finish, Options())
        whole = estimate.estimate(finished, self.device, self.model)
        return _State(graph_module, moves, whole.cost, whole.seconds)


def _search(captured: fx.GraphModule, using: Sequence[Pass], judge: _Judge, beam: int, places: int) -> Plan:
    first = judge(_copy(captured), ())
    seen = {text.render(captured)}
    states, winner, complete = [first], first, True
    while states:
        following = []
        for changed, moves in _successors(states, using, places, seen):
            if judge.asked >= judge.budget:
                complete = False
                break
            following.append(judge(changed, moves))
        states = sorted(following, key=lambda state: (state.seconds, len(state.moves)))[:beam] if complete else []
        winner = min([winner, *following], key=lambda state: (state.seconds, len(state.moves)))
    return Plan(
        winner.moves,
        winner.cost,
        winner.seconds,
        first.cost,
        first.seconds,
        judge.device.name,
        estimate.example_sizes(captured),
        judge.asked,
        complete,
    )


def _successors(
    states: Sequence[_State], using: Sequence[Pass], places: int, seen: set[str]
) -> Iterator[tuple[fx.GraphModule, tuple[Move, ...]]]:
    """Every graph that one move leads to and that was not seen before."""
    for state in states:
        for function in using:
            moves = [Move(function)]
            while moves:
                move = moves.pop(0)
                changed = _copy(state.graph_module)
                rewrites, attempts = move.apply(changed)
                if move.places is None and 1 < attempts <= places:
                    moves += [Move(function, frozenset((number,))) for number in range(1, attempts + 1)]
                key = text.render(changed)
                if rewrites and key not in seen:
                    seen.add(key)
                    yield changed, (*state.moves, move)


def _copy(graph_module: fx.GraphModule) -> fx.GraphModule:
    made = fx.GraphModule(graph_module, copy.deepcopy(graph_module.graph))
    made.meta.update(graph_module.meta)
    return made
