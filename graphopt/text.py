"""A graph as a few lines of text, and the difference of two graphs.

    %x f32[s0, 64] = input            # L['x']
    %0 f32[s0, 64] = aten.mul.Tensor(%x, 2.0)
    return %0

A tensor is written as dtype[sizes]; strides follow after "@" where they are not those of a contiguous tensor.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from graphopt import edit, shapes

_DTYPES = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "b8",
}


def render(graph_module: fx.GraphModule, *, names: str = "number", comments: bool = False) -> str:
    """The graph as text, one node a line, submodules after it.

    names: "number" writes operations as %0, %1, ... in order, so that equal graphs give equal text whatever their
    nodes are called; "node" writes the nodes' own names. comments: add the pass and the model's source line.
    """
    labels = _labels(graph_module.graph, names)
    lines = []
    for node in graph_module.graph.nodes:
        remark = _remark(node) if comments else ""
        lines.append(line(node, labels) + (f"  # {remark}" if remark else ""))
    text = "\n".join(lines)
    for node in graph_module.graph.nodes:
        if node.op in ("call_module", "get_attr"):
            inner = graph_module
            for part in str(node.target).split("."):
                inner = getattr(inner, part)
            if isinstance(inner, fx.GraphModule):
                body = render(inner, names=names, comments=comments)
                text += f"\n{node.target}:\n" + "\n".join("  " + row for row in body.splitlines())
    return text


def line(node: fx.Node, labels: Mapping[fx.Node, str] | None = None) -> str:
    """One node as text; `labels` names nodes, which by default have their own names."""
    if node.op == "output":
        return f"return {argument(node.args[0], labels)}"
    shown = value(node.meta.get("val"))
    left = argument(node, labels) + (f" {shown}" if shown else "")
    if node.op == "placeholder":
        return f"{left} = input"
    if node.op == "get_attr":
        return f"{left} = constant {node.target}"
    given = [argument(item, labels) for item in node.args]
    given += [f"{name}={argument(item, labels)}" for name, item in node.kwargs.items()]
    return f"{left} = {target(node)}({', '.join(given)})"


def target(node: fx.Node) -> str:
    """The short name of what a node calls: "aten.mul.Tensor", "operator.getitem", the name of a submodule."""
    called = node.target
    if isinstance(called, str):
        return called
    if isinstance(called, torch._ops.OpOverload):
        return f"{called.namespace}.{called._schema.name.split('::')[1]}.{called._overloadname}"
    module = getattr(called, "__module__", None) or ""
    name = getattr(called, "__name__", repr(called))
    return f"{module.removeprefix('_')}.{name}" if module else name


def argument(item: Any, labels: Mapping[fx.Node, str] | None = None) -> str:
    """An argument of a node as text."""
    if isinstance(item, fx.Node):
        return "%" + (labels[item] if labels and item in labels else item.name)
    if isinstance(item, tuple):
        body = ", ".join(argument(part, labels) for part in item)
        return f"({body},)" if len(item) == 1 else f"({body})"
    if isinstance(item, list):
        return "[" + ", ".join(argument(part, labels) for part in item) + "]"
    if isinstance(item, slice):
        return ":".join("" if part is None else argument(part, labels) for part in (item.start, item.stop, item.step))
    if isinstance(item, torch.dtype):
        return _DTYPES.get(item, str(item).removeprefix("torch."))
    if isinstance(item, (torch.device, torch.layout, torch.memory_format)):
        return str(item).removeprefix("torch.")
    return str(item) if isinstance(item, torch.SymInt) else repr(item)


def value(item: Any) -> str:
    """A fake value as text: "f32[2, s0] @(1, 2)", "s0 + 1", "(f32[2], i64[])"; "" for None."""
    if isinstance(item, torch.Tensor):
        sizes = ", ".join(str(size) for size in item.shape)
        dtype = _DTYPES.get(item.dtype, str(item.dtype).removeprefix("torch."))
        return f"{dtype}[{sizes}]{_strides(item)}"
    if isinstance(item, (list, tuple)):
        return "(" + ", ".join(value(part) or "None" for part in item) + ")"
    return "" if item is None else str(item)


def diff(before: fx.GraphModule | str, after: fx.GraphModule | str) -> str:
    """What changed between two graphs (or texts) as a unified diff with three lines of context; "" if nothing."""
    texts = [graph if isinstance(graph, str) else render(graph, names="node") for graph in (before, after)]
    rows = difflib.unified_diff(texts[0].splitlines(), texts[1].splitlines(), "before", "after", lineterm="")
    return "\n".join(rows)


def canonical_symbols(text: str) -> str:
    """The text with symbolic sizes renamed s0, s1, ... in order of appearance, to compare two compilations."""
    order: dict[str, str] = {}

    def rename(found: re.Match[str]) -> str:
        kind = found[0].rstrip("0123456789")
        return order.setdefault(found[0], f"{kind}{sum(known.startswith(kind) for known in order.values())}")

    return re.sub(r"\b(?:s|u)\d+\b", rename, text)


def _labels(graph: fx.Graph, names: str) -> dict[fx.Node, str]:
    if names == "node":
        return {node: node.name for node in graph.nodes}
    inner = (node for node in graph.nodes if node.op not in ("placeholder", "output"))
    labels = {node: str(number) for number, node in enumerate(inner)}
    return labels | {node: node.name for node in graph.nodes if node.op == "placeholder"}


def _remark(node: fx.Node) -> str:
    if node.op == "placeholder":
        return str(node.meta.get("source") or "")
    provenance = node.meta.get("graphopt")
    made = f"{provenance.pass_name} #{provenance.number}" if isinstance(provenance, edit.Provenance) else ""
    return ", ".join(part for part in (made, edit.source_line(node)) if part)


def _strides(tensor: torch.Tensor) -> str:
    if tensor.layout != torch.strided:
        return f" {str(tensor.layout).removeprefix('torch.')}"
    expected: Any = 1
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.stride()), strict=True):
        if not shapes.same(size, 1) and not shapes.same(stride, expected):
            return f" @({', '.join(str(part) for part in tensor.stride())})"
        expected = expected * size
    return ""
