"""Check a kernel against the meaning of its operation, and a compiled model against eager."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from graphopt import ops, report
from graphopt.verify import execution, inputs, judge, wide


def check_kernel(
    op: Callable[..., Any],
    lowered: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    *,
    exactness: str = "rounding",
    kinds: Sequence[str] = inputs.KINDS["all"],
) -> None:
    """Assert that `lowered(*args, **kwargs)` computes what the dialect operation (or function) `op` means.

    Run with the given values and with floating point tensors of the same shapes, strides and dtypes filled with
    zeros, ties, denormals, infinities, NaN and large numbers (`kinds`, see `graphopt.verify.inputs`). Dtype, shape,
    stride and values are compared, the latter by their distance from a float64 run; inputs must stay as they were.
    """
    meaning = ops.meaning(op) or op
    named = dict(kwargs or {})
    for number, kind in enumerate(("as given", *kinds)):
        values = [value if kind == "as given" else _filled(value, kind, number + n) for n, value in enumerate(args)]
        with torch.no_grad():
            old, _ = execution.run(lambda *given: meaning(*given, **named), values)
            new, after = execution.run(lambda *given: lowered(*given, **named), values)
            exact = wide.run_wide(lambda *given: meaning(*given, **named), values)
        found = judge.difference(old, new, list(exact) if isinstance(exact, (tuple, list)) else [exact], exactness)
        found = found or judge.difference(list(values), after, None, "bitwise", layout=False)
        if found is not None:
            raise AssertionError(f"on {kind} inputs: {found}")


def check_model(
    model: Callable[..., Any],
    *args: Any,
    options: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> report.Report:
    """Assert that `model` compiled with graphopt answers as eager does, within rounding; returns the report.

    The distance of both from a float64 run is compared. `options` are those of the backend.
    """
    from graphopt.backend import graphopt

    torch.compiler.reset()

    def backend(graph_module: Any, example_inputs: Any) -> Any:
        return graphopt(graph_module, example_inputs, options=dict(options or {}))

    with torch.no_grad():
        plain = tree_leaves(model(*args, **kwargs))
        exact = wide.run_wide(lambda *given: tree_leaves(model(*given, **kwargs)), args)
        with report.collecting() as collected:
            made = tree_leaves(torch.compile(model, backend=backend)(*args, **kwargs))
    found = judge.difference(plain, made, exact, "rounding")
    if found is not None:
        raise AssertionError(f"{found}\n{collected}")
    return collected


def _filled(value: Any, kind: str, seed: int) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(_filled(part, kind, seed + n) for n, part in enumerate(value))
    if not isinstance(value, torch.Tensor) or not value.dtype.is_floating_point:
        return value
    return inputs.make([value], [None], {}, kind, seed).values[0]
