"""Almost the pattern: variants of a function that a pass must refuse, or rewrite rightly.

Each variant changes one thing that careless matchers overlook: an intermediate value that somebody else uses too,
another constant, swapped operands, a cast in the middle, two values where the pattern has one twice. They are made
from the function's own ATen graph.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_flatten

from graphopt import _compat, text
from graphopt.testing.checks import check_pass

aten = torch.ops.aten
_ORDERED = (aten.sub.Tensor, aten.div.Tensor, aten.mm.default, aten.bmm.default, aten.pow.Tensor_Tensor)


@dataclasses.dataclass(frozen=True)
class NearMiss:
    """A variant: what was changed, in words, and the changed function."""

    change: str
    function: Callable[..., Any]


def near_misses(function: Callable[..., Any], inputs: Sequence[torch.Tensor]) -> list[NearMiss]:
    """All single changes of the ATen graph of `function(*inputs)` that still run on these inputs."""
    with torch.no_grad():
        graph_module = _compat.trace(function, list(inputs), {})
        found = []
        for change, mutate in _mutations(graph_module):
            variant = fx.GraphModule(graph_module, copy.deepcopy(graph_module.graph))
            mutate({node.name: node for node in variant.graph.nodes})
            variant.recompile()
            try:
                variant(*(value.clone() for value in inputs))
            except (RuntimeError, IndexError):
                continue  # operands of other shapes cannot be swapped
            found.append(NearMiss(change, variant))
    return found


def check_near_misses(
    pass_: Callable[..., int], function: Callable[..., Any], inputs: Sequence[torch.Tensor], **options: Any
) -> list[NearMiss]:
    """`check_pass` on each near miss of `function`: the pass may apply or refuse, the answers must be right."""
    variants = near_misses(function, inputs)
    for variant in variants:
        try:
            check_pass(pass_, variant.function, inputs, **options)
        except Exception as raised:
            raised.add_note(f"near miss: {variant.change}")
            raise
    return variants


def _mutations(graph_module: fx.GraphModule) -> Iterator[tuple[str, Callable[[dict[str, fx.Node]], None]]]:
    for node in graph_module.graph.nodes:
        if node.op != "call_function":
            continue
        shown = text.target(node)
        value = node.meta.get("val", node.meta.get("tensor_meta"))
        if isinstance(value, torch.Tensor) and not any(user.op == "output" for user in node.users):
            yield f"{node.name} ({shown}) is returned too", _returned(node.name)
        if isinstance(value, torch.Tensor) and value.dtype in (torch.float32, torch.bfloat16, torch.float16):
            yield f"{node.name} ({shown}) is rounded to a narrower dtype and back", _rounded(node.name, value.dtype)
        for index, item in enumerate(node.args):
            if isinstance(item, fx.Node) and _is_floating(item) and len(item.users) > 1:
                yield f"{node.name} ({shown}) reads the negative of {item.name}", _negated(node.name, index)
            if isinstance(item, float):
                yield f"constant {item} of {node.name} ({shown}) is doubled", _changed(node.name, index, item * 2 + 0.5)
        if node.target in _ORDERED or node.target is aten.where.self:
            yield f"operands of {node.name} ({shown}) are swapped", _swapped(node.name)


def _returned(name: str) -> Callable[[dict[str, fx.Node]], None]:
    def mutate(nodes: dict[str, fx.Node]) -> None:
        output = nodes["output"]
        flat, _ = tree_flatten(output.args[0])
        output.args = ((*flat, nodes[name]),)

    return mutate


def _rounded(name: str, dtype: torch.dtype) -> Callable[[dict[str, fx.Node]], None]:
    narrow = torch.float16 if dtype == torch.bfloat16 else torch.bfloat16

    def mutate(nodes: dict[str, fx.Node]) -> None:
        node = nodes[name]
        users = list(node.users)
        with node.graph.inserting_after(node):
            down = node.graph.call_function(aten._to_copy.default, (node,), {"dtype": narrow})
        with node.graph.inserting_after(down):
            up = node.graph.call_function(aten._to_copy.default, (down,), {"dtype": dtype})
        for user in users:
            user.replace_input_with(node, up)

    return mutate


def _negated(name: str, index: int) -> Callable[[dict[str, fx.Node]], None]:
    """What looks like one value used twice is two values."""

    def mutate(nodes: dict[str, fx.Node]) -> None:
        node = nodes[name]
        with node.graph.inserting_before(node):
            other = node.graph.call_function(aten.neg.default, (node.args[index],))
        node.update_arg(index, other)

    return mutate


def _is_floating(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dtype.is_floating_point


def _changed(name: str, index: int, number: float) -> Callable[[dict[str, fx.Node]], None]:
    return lambda nodes: nodes[name].update_arg(index, number)


def _swapped(name: str) -> Callable[[dict[str, fx.Node]], None]:
    def mutate(nodes: dict[str, fx.Node]) -> None:
        *kept, a, b = nodes[name].args
        nodes[name].args = (*kept, b, a)

    return mutate
