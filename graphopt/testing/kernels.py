"""Check a kernel against the meaning of its operation, and a compiled model against eager."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args

import torch

from graphopt import ops, report
from graphopt.errors import OptionError
from graphopt.options import Options
from graphopt.pipeline import Exactness
from graphopt.testing import checks
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
    stride, values and shared memory are compared, values by their distance from a float64 run; inputs must stay as the
    meaning leaves them.
    """
    if not isinstance(args, (list, tuple)):
        raise OptionError(f"args must be a list of the arguments, got {type(args).__name__}: write [x] for one tensor")
    choices = (("kinds", kinds, inputs.KINDS["all"]), ("exactness", [exactness], get_args(Exactness)))
    for what, given, allowed in choices:
        for wrong in set(given) - set(allowed):
            raise OptionError(f"{what}: {wrong!r} is not among {', '.join(map(repr, allowed))}")
    meaning = ops.meaning(op) or op
    named = dict(kwargs or {})
    for number, kind in enumerate(("as given", *kinds)):
        values = [value if kind == "as given" else _filled(value, kind, number + n) for n, value in enumerate(args)]
        with torch.no_grad():
            old, before = execution.run(lambda *given: meaning(*given, **named), values)
            new, after = execution.run(lambda *given: lowered(*given, **named), values)
            exact = wide.run_wide(lambda *given: meaning(*given, **named), values)
        found = judge.difference(old, new, list(exact) if isinstance(exact, (tuple, list)) else [exact], exactness)
        found = found or judge.difference(before, after, None, "bitwise", layout=False)
        shared = judge.alias_difference(judge.alias_sets(old, before), judge.alias_sets(new, after))
        if found is not None or shared:
            raise AssertionError(f"on {kind} inputs: {found or shared}")


def check_model(
    model: Callable[..., Any],
    *args: Any,
    options: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> report.Report:
    """Assert that `model` compiled with graphopt answers as eager does, within rounding; returns the report.

    Compared are the results, arguments and buffers afterwards, and which results share memory with what, by their
    distance from a float64 run; the call is made twice. Arguments and buffers are left as they were. `options` are
    those of the backend.
    """
    from graphopt.backend import graphopt

    if not callable(model):
        raise OptionError(f"model must be a module or a function, got {model!r}")
    chosen = Options.parse(None, dict(options or {}))
    torch.compiler.reset()

    def backend(graph_module: Any, example_inputs: Any) -> Any:
        return graphopt(graph_module, example_inputs, options=chosen)

    def call(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda given, named: function(*given, **named)

    inputs, compiled = [args, kwargs], torch.compile(model, backend=backend)
    with torch.no_grad():
        plain = checks.run(call(model), model, inputs)
        exact = checks.run(call(model), model, inputs, widened=True)
        with report.collecting() as collected:
            made = [checks.run(call(compiled), model, inputs) for _ in range(2)]
    for outcome in made:
        found = judge.difference(plain.values, outcome.values, exact.values, "rounding")
        shared = judge.alias_difference(plain.aliases, outcome.aliases)
        if found is not None or shared:
            raise AssertionError(f"{found or shared}\n{collected}")
    return collected


def _filled(value: Any, kind: str, seed: int) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(_filled(part, kind, seed + n) for n, part in enumerate(value))
    if not isinstance(value, torch.Tensor) or not value.dtype.is_floating_point:
        return value
    return inputs.make([value], [None], {}, kind, seed).values[0]
