"""The memory of a generated program: which buffer a value lies in, when it is free again, and what takes it next."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import Node

from graphopt import views
from graphopt.backends.triton.printer import text_of
from graphopt.backends.triton.source import Scratch
from graphopt.index_arithmetic import size_expression
from graphopt.index_map import ALIASING_VIEWS

Slot = tuple[str, str]
"""What two buffers share if one may be taken for the other: dtype, and sizes with strides."""


def shape_text(sizes: Any) -> str:
    """Sizes or strides as a Python tuple."""
    texts = [text_of(size_expression(s)) for s in sizes]
    return f"({', '.join(texts)}{',' if len(texts) == 1 else ''})"


class Buffers:
    """The names of buffers, and those that are free. emit: appends a line to the program."""

    def __init__(self, emit: Callable[[str], None]) -> None:
        self._emit = emit
        self._count = 0
        self._free: dict[Slot, list[str]] = {}
        self._owned: dict[str, Slot] = {}

    def new(self, hint: str) -> str:
        """A name not given out before."""
        self._count += 1
        return f"{hint}{self._count - 1}"

    def allocate(self, value: torch.Tensor, device: str | None) -> str:
        """A buffer for a value, of memory that is free if there is any. device: its text; None: the value's own."""
        name = self.new("buf")
        size, stride = shape_text(value.shape), shape_text(value.stride())
        slot = (str(value.dtype), f"{size} {stride}")
        free = self._free.get(slot)
        if free:
            self._emit(f"{name} = {free.pop()}")
        else:
            place = device or repr(str(value.device))
            self._emit(f"{name} = torch.empty_strided({size}, {stride}, dtype={slot[0]}, device={place})")
        self._owned[name] = slot
        return name

    def scratch(self, scratch: Scratch, elements: str, device: str | None) -> tuple[str, Slot]:
        """Memory between the launches of one region, and its slot; zeros are left as zeros, for others."""
        made = "zeros" if scratch.zeroed else "empty"
        slot = (str(scratch.dtype), f"{made} {elements}")
        if self._free.get(slot):
            return self._free[slot].pop(), slot
        name = self.new("scratch")
        self._emit(f"{name} = torch.{made}(({elements},), dtype={slot[0]}, device={device})")
        return name, slot

    def give_back(self, name: str, slot: Slot) -> None:
        """Let scratch memory be taken by the regions that follow."""
        self._free.setdefault(slot, []).append(name)

    def release(self, name: str) -> None:
        """Let a buffer be taken by the values that follow; memory that is not the program's own stays as it is."""
        if name in self._owned:
            self.give_back(name, self._owned.pop(name))


def last_uses(nodes: Sequence[Node]) -> dict[int, list[Node]]:
    """By place in the graph, the results of regions whose memory nothing needs behind it, through views or itself."""
    roots = _roots(nodes)
    last: dict[Node, int] = {}
    for place, node in enumerate(nodes):
        for used in (node, *node.all_input_nodes):
            last[roots[used]] = place
    returned = {roots[n] for n in nodes[-1].all_input_nodes}
    uses: dict[int, list[Node]] = {}
    for node in nodes:
        if _is_result(node) and roots[node] is node and node not in returned:
            uses.setdefault(last[node], []).append(node)
    return uses


def _is_result(node: Node) -> bool:
    source = node.args[0] if node.target is operator.getitem else None
    return isinstance(source, Node) and source.op == "call_module"


def _roots(nodes: Sequence[Node]) -> dict[Node, Node]:
    """The earlier node whose memory a node's value may share: for a result of a region, what it is written into."""
    roots: dict[Node, Node] = {}
    for node in nodes:
        tensors = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), (torch.Tensor, tuple, list))]
        shares = node.target in ALIASING_VIEWS or node.target is operator.getitem or (
            isinstance(node.target, torch._ops.OpOverload)
            and any(r.alias_info is not None for r in node.target._schema.returns))
        source = tensors[0] if tensors and shares else None
        if _is_result(node):
            source = views.written_into(node)
        roots[node] = node if source is None else roots[source]
    return roots
