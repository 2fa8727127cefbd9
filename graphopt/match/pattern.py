"""Patterns: plain PyTorch functions, traced to the ATen graphs that captured models consist of."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from graphopt import _compat, capture, edit, views
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

    def __post_init__(self) -> None:
        try:
            inspect.signature(self.function).bind(**self.examples)
        except TypeError as error:
            signature = inspect.signature(self.function)
            raise self.wrong(f"give an example for each parameter of {signature}: {error}") from None
        for name, example in self.examples.items():
            if isinstance(example, bool) or not isinstance(example, (tuple, torch.Tensor, int, float)):
                raise self.wrong(f"the example of {name} must be a shape (tuple), tensor or number, got {example!r}")
            if isinstance(example, tuple) and not all(type(size) is int and size >= 0 for size in example):
                raise self.wrong(f"the shape {example!r} of {name} must hold whole numbers")

    def wrong(self, what: str) -> PatternError:
        """The error that names this pattern."""
        return PatternError(f"pattern {self.name!r}: {what}")

    @functools.cached_property
    def skeleton(self) -> Traced:
        """The pattern traced on its examples: which operations, in which order; sizes and dtypes mean nothing."""
        with _compat.new_fake_execution():
            values = {name: _example(example) for name, example in self.examples.items()}
            try:
                traced = self.trace(values)
            except PatternError:
                raise
            except Exception as error:
                raise self.wrong(f"it cannot be traced on its examples: {type(error).__name__}: {error}") from error
        self._check(traced, values)
        return traced

    def _check(self, traced: Traced, values: Mapping[str, Any]) -> None:
        """Raise PatternError for what no graph could hold, or no rewrite could replace."""
        for name, value in values.items():
            if not isinstance(value, torch.Tensor) and not any(value in _numbers(node) for node in traced.graph.nodes):
                raise self.wrong(f"the value of {name} ({value}) appears nowhere in its graph")
        if draws_numbers(traced.graph):
            raise self.wrong("it draws random numbers, and a rewrite may make no other draws than there were")
        unused = [name for hole, name in traced.holes.items() if not hole.users]
        if unused:
            raise self.wrong(f"it does not use its parameter {unused[0]}: leave it out")
        for result in traced.results:
            if not isinstance(result, fx.Node) or paths.walk(result).base.op != "call_function":
                raise self.wrong("each of its results must be a tensor that it computes, no parameter or view of one")

    def trace(self, values: Mapping[str, Any]) -> Traced:
        """The pattern traced on these fake tensors and numbers, inside the caller's fake execution."""
        tensors = [name for name, value in values.items() if isinstance(value, torch.Tensor)]

        def call(*given: torch.Tensor) -> Any:
            return self.function(**{**values, **dict(zip(tensors, given, strict=True))})

        fakes = [values[name] for name in tensors]
        module = in_new_values(call, lambda function: _compat.trace(function, fakes, capture.decompositions()))
        if module is None:
            raise self.wrong("it updates a parameter in place, which no rewrite may do: write it with new values")
        edit.eliminate_dead_code(module)
        placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
        results: Any = module.graph.output_node().args[0]
        computing = sum(
            node.op == "call_function"
            and isinstance(node.meta["val"], (torch.Tensor, tuple, list))
            and paths.kind(node) is None
            for node in module.graph.nodes
        )
        return Traced(
            module.graph,
            dict(zip(placeholders, tensors, strict=True)),
            tuple(results) if isinstance(results, (list, tuple)) else (results,),
            computing,
        )


def draws_numbers(graph: fx.Graph) -> bool:
    """Whether a graph that writes nowhere has nodes that must stay even if nothing uses them: random draws."""
    return any(node.op == "call_function" and edit.is_impure(node) for node in graph.nodes)


def in_new_values(
    function: Callable[..., Any], trace: Callable[[Callable[..., Any]], fx.GraphModule]
) -> fx.GraphModule | None:
    """The function traced; what it updates of its own is written as new values. None if it updates its arguments."""
    traced = trace(function)
    if any(map(views.may_write, traced.graph.nodes)):
        traced = trace(torch.func.functionalize(function, remove="mutations"))
    return None if any(map(views.may_write, traced.graph.nodes)) else traced


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
    if isinstance(example, torch.Tensor):
        return torch.empty_strided(example.shape, example.stride(), dtype=example.dtype)
    return example


def _numbers(node: fx.Node) -> list[Any]:
    return [value for value in (*node.args, *node.kwargs.values()) if isinstance(value, (int, float))]
