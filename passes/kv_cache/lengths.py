"""Symbolic lengths as nodes of the graph, made from its inputs."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable

import sympy
import torch
from torch import fx

from graphopt import edit, shapes

_OPERATORS: dict[type[sympy.Expr], Callable[..., object]] = {sympy.Add: operator.add, sympy.Mul: operator.mul}


def length_node(rewrite: edit.Rewrite, size: shapes.Size) -> fx.Node | int | None:
    """An int, or a node that computes `size` from the integer inputs of the graph; None when it cannot be."""
    if not isinstance(size, torch.SymInt):
        return size
    known = {
        shapes.expression(node.meta["val"]): node
        for node in rewrite.graph_module.graph.nodes
        if node.op == "placeholder" and isinstance(node.meta.get("val"), torch.SymInt)
    }
    return _build(rewrite, shapes.expression(size), known)


def _build(rewrite: edit.Rewrite, expression: sympy.Expr, known: dict[sympy.Expr, fx.Node]) -> fx.Node | int | None:
    if isinstance(expression, sympy.Integer):
        return int(expression)
    if expression in known:
        return known[expression]
    function = _OPERATORS.get(expression.func)
    if function is None:
        return None
    parts = [_build(rewrite, argument, known) for argument in expression.args]
    if any(part is None for part in parts):
        return None
    return functools.reduce(lambda a, b: rewrite.call(function, a, b), parts)
