"""Run passes on the graphs of a function or module, and keep what they looked like before and after."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from graphopt import _compat, capture, edit, pipeline
from graphopt.options import Options


@dataclasses.dataclass
class TracedGraph:
    """One captured graph: as it was, as the passes left it, their reports, how many rewrites were numbered, and
    whether all of them keep how values lie in memory."""

    kind: str
    before: fx.GraphModule
    after: fx.GraphModule
    reports: list[pipeline.PassReport]
    applications: int
    same_layout: bool

    @property
    def rewrites(self) -> int:
        """How many rewrites the passes say they made."""
        return sum(report.rewrites for report in self.reports)

    @property
    def refusals(self) -> list[edit.Refusal]:
        """What the passes left alone, and why."""
        return [refusal for report in self.reports for refusal in report.refusals]


@dataclasses.dataclass
class Traced:
    """A compiled function whose graphs are run as the passes left them; `graphs` grows with each (re)compilation."""

    compiled: Callable[..., Any]
    graphs: list[TracedGraph]

    def __call__(self, *inputs: Any, **kwargs: Any) -> Any:
        return self.compiled(*inputs, **kwargs)


def trace(
    function: Callable[..., Any],
    passes: Sequence[Callable[..., int]] = (),
    *,
    observer: Callable[[edit.Application], None] | None = None,
    dynamic: bool | None = None,
    optimised: bool = True,
) -> Traced:
    """Compile `function` through Dynamo and AOTAutograd with just these passes; its graphs are run node by node.

    A pass that raises makes the call raise. optimised=False runs the graphs as they were before the passes.
    """
    from graphopt import passes as library

    graphs: list[TracedGraph] = []
    ordered = pipeline.arrange(passes, (*library.PIPELINE, *library.OPTIONAL))

    def compile_graph(graph_module: fx.GraphModule, inputs: Sequence[Any], info: capture.GraphInfo) -> Any:
        del inputs
        before = copied(graph_module)
        seen, same_layout = 0, True

        def count(application: edit.Application) -> None:
            nonlocal seen, same_layout
            seen += 1
            same_layout &= application.same_layout
            if observer is not None:
                observer(application)

        reports = pipeline.run(graph_module, ordered, Options(strict=True), observer=count)
        graphs.append(TracedGraph(info.kind, before, graph_module, reports, seen, same_layout))
        return _boxed(graph_module if optimised else before)

    def backend(graph_module: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        return capture.capture(graph_module, inputs, compile_graph)

    _compat.prepare_dynamo()
    torch.compiler.reset()
    return Traced(torch.compile(function, backend=backend, dynamic=dynamic), graphs)


def copied(graph_module: fx.GraphModule) -> fx.GraphModule:
    """The same graph on nodes of its own; constants are shared."""
    made = fx.GraphModule(graph_module, copy.deepcopy(graph_module.graph))
    made.meta = dict(graph_module.meta)
    return made


def _boxed(graph_module: fx.GraphModule) -> Callable[[list[Any]], Any]:
    def run(arguments: list[Any]) -> Any:
        values = list(arguments)
        arguments.clear()
        return graph_module(*values)

    run._boxed_call = True  # type: ignore[attr-defined]
    return run
