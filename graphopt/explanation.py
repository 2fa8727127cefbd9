"""`graphopt.explain(model, *inputs)`: compile a model afresh, run it once, and say what was done to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from graphopt import _compat, cost, report
from graphopt.errors import OptionError
from graphopt.options import Options


def explain(
    model: Callable[..., Any],
    *inputs: Any,
    mode: str | None = None,
    options: dict[str, Any] | Options | None = None,
    roofline: str = "auto",
    **kwargs: Any,
) -> report.Report:
    """Compile `model` (a module or function) for the given inputs and run it once.

    Nothing is taken from caches and nothing compiled before is touched. Returns a `Report`, which prints as tables
    and holds the data: passes with rewrites, time and refusals; lowerings; bytes and FLOPs of each graph before and
    after the passes, and the time that the device named `roofline` needs for them ("auto": the one the model is on;
    "cpu", measured; or a name of `graphopt.cost.DEVICES`); graph breaks and recompilations with reasons; what was left
    to torch.
    Gradients are recorded only if they are enabled at the call, as for the model itself.
    """
    from graphopt.backend import graphopt

    chosen = Options.parse(mode, options)

    def backend(graph_module: Any, example_inputs: Any) -> Any:
        return graphopt(graph_module, example_inputs, options=chosen)

    compiled = torch.compile(model, backend=backend)
    try:
        roofline == "auto" or cost.device(roofline)
    except ValueError as error:
        raise OptionError(f"roofline: {error}") from None
    with report.collecting(roofline) as collected, _compat.watching_dynamo() as watched:
        compiled(*inputs, **kwargs)
    collected.graph_breaks, collected.recompiles = watched.graph_breaks, watched.recompiles
    return collected
