"""The arguments of a node, independent of how they were spelled: by name, defaults filled in, dimensions from zero."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from graphopt import shapes

TENSOR = "a tensor"
"""Stands in the place of each tensor among the arguments of a node."""


def named(node: fx.Node) -> dict[str, Any]:
    """All arguments by name, with `TENSOR` for each tensor. Dimensions count from the front."""
    found = {}
    for name, value in everything(node).items():
        found[name] = _from_front(node, value) if name in ("dim", "dims") else _without_tensors(value)
    return found


def operands(node: fx.Node) -> list[fx.Node]:
    """All arguments that are tensors, in order; those in lists too."""
    found = []
    for value in everything(node).values():
        for item in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(item, fx.Node) and _is_tensor(item):
                found.append(item)
    return found


def same_argument(a: Any, b: Any) -> bool:
    """Whether two arguments are equal: numbers by value, sizes as expressions."""
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(same_argument, a, b))
    if _is_size(a) and _is_size(b):
        return bool(_expression(a) == _expression(b))
    if isinstance(a, float) and isinstance(b, float) and a != a:
        return b != b
    return bool(a == b)


def everything(node: fx.Node) -> dict[str, Any]:
    """All arguments by name, defaults filled in."""
    if node.target is operator.getitem:
        return {"operation": node.args[0], "result": node.args[1]}
    if not isinstance(node.target, torch._ops.OpOverload):
        return {**{str(index): value for index, value in enumerate(node.args)}, **node.kwargs}
    schema = node.target._schema.arguments
    found = {argument.name: argument.default_value for argument in schema if argument.has_default_value()}
    for argument, value in zip(schema, node.args, strict=False):
        found[argument.name] = value
    return {argument.name: {**found, **node.kwargs}.get(argument.name) for argument in schema}


def _from_front(node: fx.Node, dims: Any) -> Any:
    if isinstance(dims, (list, tuple)):
        return [_from_front(node, dim) for dim in dims]
    tensors = operands(node)
    if isinstance(dims, int) and tensors:
        return dims % max(tensors[0].meta["val"].dim(), 1)
    return dims


def _is_size(value: Any) -> bool:
    if isinstance(value, fx.Node):
        return isinstance(value.meta.get("val"), (int, torch.SymInt))
    return isinstance(value, int) and not isinstance(value, bool)


def _expression(value: Any) -> Any:
    return shapes.expression(value.meta["val"] if isinstance(value, fx.Node) else value)


def _is_tensor(node: fx.Node) -> bool:
    return not isinstance(node.meta.get("val"), (int, float, torch.SymInt, torch.SymFloat, torch.SymBool))


def _without_tensors(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_without_tensors(item) for item in value]
    return TENSOR if isinstance(value, fx.Node) and _is_tensor(value) else value
