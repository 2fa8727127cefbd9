"""A graph as a Python program that runs by itself with torch and graphopt."""

from __future__ import annotations

import keyword
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from graphopt import edit, text

HEADER = """from __future__ import annotations

import operator
from math import inf, nan

import torch

import graphopt.ops  # noqa: F401  (defines torch.ops.graphopt)
"""
MOST_LITERALS = 256


def function(graph_module: fx.GraphModule, name: str) -> str:
    """The source of a function `name` that computes the graph; each line ends with the type and origin of its value.

    Constants of the graph are looked up in a dict `CONSTANTS` by name (see `constants`).
    """
    inner, rows, parameters = [], [], []
    for node in graph_module.graph.nodes:
        if node.op == "placeholder":
            parameters.append(_name(node))
        elif node.op == "output":
            rows.append(f"    return {literal(node.args[0])}")
        elif node.op in ("call_module", "get_attr"):
            held = _held(graph_module, node)
            label = f"{name}_{str(node.target).replace('.', '_')}"
            if isinstance(held, fx.GraphModule):
                inner.append(function(held, label))
                value = label
            else:
                value = f"CONSTANTS[{str(node.target)!r}]"
            arguments = f"({_arguments(node)})" if node.op == "call_module" else ""
            rows.append(f"    {_name(node)} = {value}{arguments}{_comment(node)}")
        else:
            rows.append(f"    {_name(node)} = {_target(node)}({_arguments(node)}){_comment(node)}")
    return "\n\n".join([*inner, "\n".join([f"def {name}({', '.join(parameters)}):", *rows])]) + "\n"


def constants(graph_module: fx.GraphModule, name: str = "CONSTANTS") -> str:
    """The source of the dict of the graph's constants; large ones are written as zeros of the right type."""
    rows = []
    for node in graph_module.graph.nodes:
        held = _held(graph_module, node) if node.op == "get_attr" else None
        if isinstance(held, torch.Tensor):
            rows.append(f"    {str(node.target)!r}: {tensor(held)},")
    return "\n".join([f"{name} = {{", *dict.fromkeys(rows), "}"]) + "\n"


def tensor(value: torch.Tensor) -> str:
    """The source of a tensor: its values if there are few, else zeros of its type; strides are kept."""
    device = "" if value.device.type == "cpu" else f", device={str(value.device)!r}"
    if value.numel() > MOST_LITERALS or value.layout != torch.strided:
        made = f"torch.zeros({list(value.shape)}, dtype={value.dtype}{device})"
    else:
        made = f"torch.tensor({literal(value.tolist())}, dtype={value.dtype}{device})"
        made += f".reshape({list(value.shape)})" if value.numel() == 0 else ""
    if value.layout == torch.strided and value.numel() and not value.is_contiguous():
        made = f"strided({made}, {list(value.stride())})"
    return made


def literal(item: Any) -> str:
    """The source of an argument of a node, or of numbers that may be infinite."""
    if isinstance(item, fx.Node):
        return _name(item)
    if isinstance(item, tuple):
        return "(" + "".join(f"{literal(part)}, " for part in item).rstrip() + ")"
    if isinstance(item, list):
        return "[" + ", ".join(literal(part) for part in item) + "]"
    if isinstance(item, slice):
        return f"slice({literal(item.start)}, {literal(item.stop)}, {literal(item.step)})"
    if isinstance(item, torch.device):
        return f"torch.device({str(item)!r})"
    if isinstance(item, float) and not math.isfinite(item):
        return "nan" if math.isnan(item) else ("inf" if item > 0 else "-inf")
    return str(item) if isinstance(item, (torch.dtype, torch.layout, torch.memory_format)) else repr(item)


def example_inputs(graph_module: fx.GraphModule) -> str:
    """The source of a function `inputs()` that makes random inputs of the types the graph was traced with."""
    rows = []
    for node in graph_module.graph.nodes:
        if node.op == "placeholder":
            source = node.meta.get("source") or node.name
            rows.append(f"        {_example(node.meta.get('val'))},  # {source}")
    return "\n".join(["def inputs():", "    return [", *rows, "    ]"]) + "\n"


def _example(value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return repr(_hint(value)) if value is not None else "None"
    sizes = [_hint(size) for size in value.shape]
    if value.dtype.is_floating_point:
        made = f"torch.randn({sizes}).to({value.dtype})"
    else:
        made = f"torch.zeros({sizes}, dtype={value.dtype})"
    if value.layout == torch.strided and text.value(value).endswith(")"):
        made = f"strided({made}, {[_hint(stride) for stride in value.stride()]})"
    return made


def _hint(size: Any) -> Any:
    if isinstance(size, torch.SymInt):
        return size.node.hint if size.node.hint is not None else 2
    return size


STRIDED = '''def strided(values, strides):
    """The values in memory with these strides."""
    extent = 1 + sum((size - 1) * stride for size, stride in zip(values.shape, strides))
    made = torch.empty(extent, dtype=values.dtype, device=values.device).as_strided(values.shape, strides)
    once = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in strides)
    made[once] = values[once]
    return made
'''


def join(parts: Sequence[str]) -> str:
    """Top-level pieces of a program, two blank lines apart."""
    return "\n\n\n".join(part.strip("\n") for part in parts) + "\n"


def _held(graph_module: fx.GraphModule, node: fx.Node) -> Any:
    held: Any = graph_module
    for part in str(node.target).split("."):
        held = getattr(held, part)
    return held


def _name(node: fx.Node) -> str:
    name = node.name.replace(".", "_")
    return f"{name}_" if keyword.iskeyword(name) or name in ("torch", "operator", "graphopt", "inf", "nan") else name


def _target(node: fx.Node) -> str:
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return f"torch.ops.{text.target(node)}"
    if isinstance(target, torch._ops.HigherOrderOperator):
        return f"torch.ops.higher_order.{target.name()}"
    module = (getattr(target, "__module__", "") or "").removeprefix("_")
    name = getattr(target, "__name__", str(target))
    return name if module == "builtins" else f"{module}.{name}"


def _arguments(node: fx.Node) -> str:
    given = [literal(item) for item in node.args]
    return ", ".join(given + [f"{name}={literal(item)}" for name, item in node.kwargs.items()])


def _comment(node: fx.Node) -> str:
    made = node.meta.get("graphopt")
    origin = f"{made.pass_name} #{made.number}" if isinstance(made, edit.Provenance) else ""
    parts = [part for part in (text.value(node.meta.get("val")), origin, edit.source_line(node)) if part]
    return f"  # {', '.join(parts)}" if parts else ""
