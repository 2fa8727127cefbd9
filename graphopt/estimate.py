"""What a graph will take on a named device: bytes, FLOPs and time of each kernel, and memory in use over its course.

The time of a kernel is the roofline of `cost.Device`; symbolic sizes stay symbols in the costs and take the values of
the traced call where seconds are asked for. Everything here reads the graph as it stands and changes nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import sympy
import torch
from torch.fx import GraphModule, Node

from graphopt import _compat, cost, edit, text, views
from graphopt.cost import Cost, CostModel, Device

Bound = Literal["memory", "compute", "launch"]


@dataclasses.dataclass(frozen=True)
class KernelEstimate:
    """One kernel: a region, or a node that runs by itself.

    memory_seconds, compute_seconds: the two sides of the roofline, of which the larger one counts; launch_seconds comes
    on top. shapes: the values that it reads, and what it makes, as text. where: the line of the model's source.
    """

    node: str
    op: str
    shapes: str
    where: str
    cost: Cost
    memory_seconds: float
    compute_seconds: float
    launch_seconds: float

    @property
    def seconds(self) -> float:
        return max(self.memory_seconds, self.compute_seconds) + self.launch_seconds

    @property
    def bound(self) -> Bound:
        """What most of the time is spent on."""
        sides: dict[Bound, float] = {
            "memory": self.memory_seconds,
            "compute": self.compute_seconds,
            "launch": self.launch_seconds,
        }
        return max(sides, key=sides.__getitem__)


@dataclasses.dataclass(frozen=True)
class MemoryPoint:
    """Bytes of intermediate and output values that exist while a node runs; inputs and weights are not counted."""

    node: str
    bytes: int


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A graph on a device.

    sizes: values of the symbols, by name. least: bytes if each input were read and each output written once;
    least_seconds: the roofline of the whole graph as one kernel, which no fusion can beat. input_bytes: weights and
    inputs, which exist all the time.
    """

    device: str
    sizes: dict[str, int]
    cost: Cost
    seconds: float
    least: sympy.Expr
    least_seconds: float
    input_bytes: int
    kernels: tuple[KernelEstimate, ...]
    memory: tuple[MemoryPoint, ...]

    @property
    def peak(self) -> MemoryPoint:
        """Where most memory is in use."""
        return max(self.memory, key=lambda point: point.bytes, default=MemoryPoint("", 0))


def estimate(graph_module: GraphModule, device: Device, model: CostModel | None = None) -> Estimate:
    """The estimate of a captured or optimised graph. model: asked for the cost of each kernel, instead of `cost`."""
    sizes = example_sizes(graph_module)
    nodes = list(graph_module.graph.nodes)
    kernels = [_kernel(graph_module, node, device, model, sizes) for node in nodes]
    ran = tuple(kernel for kernel in kernels if kernel is not None)
    least = cost.minimal_bytes(graph_module)
    inputs = sum(_number(cost.value_bytes(n.meta.get("val")), sizes) for n in nodes if n.op == "placeholder")
    moved = device.seconds(Cost(sympy.Integer(_number(least, sizes))))
    return Estimate(
        device.name,
        sizes,
        cost.total(kernel.cost for kernel in ran),
        sum(kernel.seconds for kernel in ran),
        least,
        max(moved, sum(kernel.compute_seconds for kernel in ran)),
        inputs,
        ran,
        tuple(_memory(graph_module, sizes)),
    )


def device_of(graph_module: GraphModule, name: str) -> Device:
    """The device `name`; for "auto" the one that the graph's values are on, as far as the table knows it.

    Raises ValueError for an unknown name. A GPU that is not in the table counts as an H100.
    """
    if name != "auto":
        return cost.device(name)
    values = (node.meta.get("val") for node in graph_module.graph.nodes)
    first = next((value.device for value in values if isinstance(value, torch.Tensor)), torch.device("cpu"))
    if first.type == "cpu":
        return cost.device("cpu")
    called = torch.cuda.get_device_name(first) if torch.cuda.is_available() else ""
    return next((device for name, device in cost.DEVICES.items() if name in called), cost.DEVICES["H100"])


def gpu_of(graph_module: GraphModule) -> Device:
    """The GPU that the graph's values are on; an H100 for those on the CPU, where generated kernels are not timed."""
    values = (node.meta.get("val") for node in graph_module.graph.nodes)
    on = {value.device.type for value in values if isinstance(value, torch.Tensor)}
    return cost.DEVICES["H100"] if on <= {"cpu", "meta"} else device_of(graph_module, "auto")


def example_sizes(graph_module: GraphModule) -> dict[str, int]:
    """A value for each symbol of the graph: that of the traced call, else the lowest possible, at least 1."""
    values = [node.meta.get("val") for node in graph_module.graph.nodes]
    facts = _compat.symbol_facts([value for value in values if value is not None])
    return {s.name: max(low, 1) if hint is None else hint for s, (hint, low, _) in facts.symbols.items()}


def _kernel(
    graph_module: GraphModule, node: Node, device: Device, model: CostModel | None, sizes: Mapping[str, int]
) -> KernelEstimate | None:
    found = cost.node_cost(graph_module, node, model)
    if found == Cost():
        return None
    at = found.at(sizes)
    dtype = next((d for value in _tensors(node) if (d := value.dtype).is_floating_point), torch.float32)
    return KernelEstimate(
        node.name,
        text.target(node),
        _shapes(node),
        edit.source_line(node),
        found,
        device.seconds(Cost(at.bytes), dtype),
        device.seconds(Cost(flops=at.flops), dtype),
        device.seconds(Cost(launches=at.launches), dtype),
    )


def _shapes(node: Node) -> str:
    """As "f32[1, 8], f32[16, 8] -> f32[1, 16]"."""
    read = ", ".join(text.value(operand.meta.get("val")) for operand in node.all_input_nodes)
    return f"{read} -> {text.value(node.meta.get('val'))}"


def _tensors(node: Node) -> Iterator[torch.Tensor]:
    """The tensors that a node reads first, then those that it makes: a product runs at the speed of its operands."""
    for seen in (*node.all_input_nodes, node):
        value = seen.meta.get("val")
        yield from (v for v in (value if isinstance(value, (tuple, list)) else (value,)) if isinstance(v, torch.Tensor))


def _number(expression: Any, sizes: Mapping[str, int]) -> int:
    expression = sympy.sympify(expression)
    return int(expression.subs({symbol: sizes.get(symbol.name, 1) for symbol in expression.free_symbols}))


def _memory(graph_module: GraphModule, sizes: Mapping[str, int]) -> Iterator[MemoryPoint]:
    """Memory is taken where a value is made and given back after the last node that reads it or a view of it."""
    nodes = list(graph_module.graph.nodes)
    last: dict[Node, int] = {}
    for place, node in enumerate(nodes):
        for operand in node.all_input_nodes:
            last[views.storage(operand)] = place
    for operand in graph_module.graph.output_node().all_input_nodes:
        last[views.storage(operand)] = len(nodes)
    freed: dict[int, int] = {}
    live = 0
    for place, node in enumerate(nodes):
        own = node.op in ("call_function", "call_module") and views.storage(node) is node
        value = node.meta.get("val")
        if own and isinstance(value, torch.Tensor):
            taken = _number(cost.value_bytes(value), sizes)
            live += taken
            end = last.get(node, place)
            freed[end] = freed.get(end, 0) + taken
        if node.op in ("call_function", "call_module"):
            yield MemoryPoint(node.name, live)
        live -= freed.pop(place, 0)
