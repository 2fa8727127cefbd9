"""Patterns: plain PyTorch functions, traced to the ATen graphs that captured models consist of."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from graphopt import _compat, capture, edit
from graphopt.errors import PatternError
from graphopt.match import paths

Example = tuple[int, ...] | torch.Tensor | float

# Dtype of tensors in examples: narrow, so that the casts a pattern asks for show.
EXAMPLE_DTYPE = torch.bfloat16


@dataclasses.dataclass(frozen=True)
class Traced:
    """A pattern as a graph: its holes (name of each placeholder), its results, how many nodes compute."""

    graph: fx.Graph
    holes: dict[fx.Node, str]
    results: tuple[fx.Node, ...]
    computing: int


@dataclasses.dataclass(frozen=True, eq=False)
class Pattern:
    """A function to look for; made by `pattern`. examples: for each parameter, what to trace it with."""

    name: str
    function: Callable[..., Any]
    examples: Mapping[str, Example]

    @functools.cached_property
    def skeleton(self) -> Traced:
        """The pattern traced on its examples: which operations, in which order; sizes and dtypes mean nothing."""
        with _compat.new_fake_execution():
            values = {name: _example(example) for name, example in self.examples.items()}
            traced = self.trace(values)
        for name, value in values.items():
            if not isinstance(value, torch.Tensor) and not any(
                value in _numbers(node) for node in traced.graph.nodes
            ):
                raise PatternError(f"pattern {self.name!r}: the value of {name} ({value}) appears nowhere in its graph")
        return traced

    def trace(self, values: Mapping[str, Any]) -> Traced:
        """The pattern traced on these fake tensors and numbers, inside the caller's fake execution."""
        tensors = [name for name, value in values.items() if isinstance(value, torch.Tensor)]

        def call(*given: torch.Tensor) -> Any:
            return self.function(**{**values, **dict(zip(tensors, given, strict=True))})

        module = _compat.trace(call, [values[name] for name in tensors], capture.decompositions())
        edit.eliminate_dead_code(module)
        placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
        results: Any = module.graph.output_node().args[0]
        computing = sum(
            node.op == "call_function"
            and isinstance(node.meta["val"], torch.Tensor)
            and paths.kind(node) is None
            for node in module.graph.nodes
        )
        return Traced(
            module.graph,
            dict(zip(placeholders, tensors, strict=True)),
            tuple(results) if isinstance(results, (list, tuple)) else (results,),
            computing,
        )


def pattern(*, name: str = "", **examples: Example) -> Callable[[Callable[..., Any]], Pattern]:
    """Make a function a pattern.

        @match.pattern(x=(2, 3, 8), weight=(8,), eps=1e-6)
        def rms_norm(x, weight, eps): ...

    For each parameter an example: the shape of a tensor, a tensor, or a number that appears nowhere else in the
    function. Ranks, sizes and dtypes of the examples only serve to trace the function; what is found may have others.
    """

    def make(function: Callable[..., Any]) -> Pattern:
        return Pattern(name or function.__name__, function, examples)

    return make


def _example(example: Example) -> torch.Tensor | float:
    if isinstance(example, tuple):
        return torch.empty(example, dtype=EXAMPLE_DTYPE)
    return torch.empty_like(example, device="cpu") if isinstance(example, torch.Tensor) else example


def _numbers(node: fx.Node) -> list[Any]:
    return [value for value in (*node.args, *node.kwargs.values()) if isinstance(value, (int, float))]
