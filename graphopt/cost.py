"""What a graph costs: bytes and FLOPs as sympy expressions of its symbolic sizes, and the time a device needs for them.

A node run by itself reads its operands and writes its result; a view moves nothing. A fused region reads each of its
inputs once and writes each of its outputs once, which is what fusion gains. The predicted time is the roofline,

    max(bytes / bandwidth, flops / peak) + launch,

with figures from the vendors' data sheets (dense peaks, no sparsity) or, for "cpu", measured on this machine once.
A research user swaps the model through `options={"cost_model": ...}`: any function from a region to a `Cost`, which
region forming, `explain` and `graphopt.search` then ask.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import sympy
import torch
from torch.fx import Graph, GraphModule, Node

from graphopt import _compat, grouped
from graphopt.index_arithmetic import product, size_expression
from graphopt.index_map import ALIASING_VIEWS, RESHAPES
from graphopt.ops import WRITES
from graphopt.row_ops import CONSTANTS, REDUCTIONS, SPLITS, is_view
from graphopt.runtime import pages

aten = torch.ops.aten
_ZERO: sympy.Expr = sympy.Integer(0)


@dataclasses.dataclass(frozen=True)
class Cost:
    """Bytes moved and floating point operations, in the graph's symbols; launches is the number of kernels."""

    bytes: sympy.Expr = _ZERO
    flops: sympy.Expr = _ZERO
    launches: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.bytes + other.bytes, self.flops + other.flops, self.launches + other.launches)

    def at(self, sizes: Mapping[str, int]) -> Cost:
        """The cost with values for symbols, by name."""
        values = {s: sizes[s.name] for s in (self.bytes + self.flops).free_symbols if s.name in sizes}
        return Cost(sympy.sympify(self.bytes).subs(values), sympy.sympify(self.flops).subs(values), self.launches)


def total(costs: Iterable[Cost]) -> Cost:
    """The sum of many costs, at once: adding long expressions one by one takes quadratic time."""
    found = list(costs)
    return Cost(
        sympy.Add(*(one.bytes for one in found)),
        sympy.Add(*(one.flops for one in found)),
        sum(one.launches for one in found),
    )


CostModel = Callable[[GraphModule], Cost]
"""From a region (a graph whose inputs are read and whose outputs are written, in one kernel) to its cost."""


@dataclasses.dataclass(frozen=True)
class Device:
    """Bandwidth in bytes a second, peaks in operations a second by dtype, and seconds for one launch.

    processors: how many programs it takes to keep the device busy (multiprocessors, compute units, or one CPU).
    """

    name: str
    bandwidth: float
    peaks: Mapping[torch.dtype, float]
    launch: float = 3e-6
    processors: int = 1

    def drawn(self, programs: int) -> float:
        """The share of the bandwidth that so many programs draw: one alone about twice its share."""
        return min(1.0, 2 * programs / self.processors)

    def seconds(self, cost: Cost, dtype: torch.dtype = torch.bfloat16) -> float:
        """The predicted time of a cost without free symbols. Raises ValueError while symbols are left."""
        left = sorted(str(s) for s in sympy.sympify(cost.bytes + cost.flops).free_symbols)
        if left:
            raise ValueError(f"the cost still depends on {', '.join(left)}: give their values with Cost.at")
        peak = self.peaks.get(dtype, self.peaks[torch.float32])
        return max(float(cost.bytes) / self.bandwidth, float(cost.flops) / peak) + cost.launches * self.launch


def _peaks(single: float, half: float, byte: float) -> dict[torch.dtype, float]:
    return {
        torch.float32: single * 1e12,
        torch.float16: half * 1e12,
        torch.bfloat16: half * 1e12,
        torch.int8: byte * 1e12,
    }


DEVICES: dict[str, Device] = {
    device.name: device
    for device in (
        Device("H200", 4.8e12, _peaks(67, 989, 1979), processors=132),
        Device("H100", 3.35e12, _peaks(67, 989, 1979), processors=132),
        Device("A100", 2.039e12, _peaks(19.5, 312, 624), processors=108),
        Device("B200", 8.0e12, _peaks(75, 2250, 4500), processors=148),
        Device("MI300X", 5.3e12, _peaks(163.4, 1307.4, 2614.9), processors=304),
        Device("L4", 0.3e12, _peaks(30.3, 121, 242), processors=58),
        Device("RTX 4090", 1.008e12, _peaks(82.6, 165.2, 660.6), processors=128),
    )
}
"""Data sheet figures; H100, H200 and A100 are the SXM forms."""


def device(name: str) -> Device:
    """A device of the table, or "cpu", measured. Raises ValueError for another name."""
    if name == "cpu":
        return measured_cpu()
    if name not in DEVICES:
        raise ValueError(f"unknown device {name!r}: it must be one of {', '.join((*DEVICES, 'cpu'))}")
    return DEVICES[name]


@functools.cache
def measured_cpu() -> Device:
    """This machine, measured once a process in some tenths of a second."""
    peaks = {dtype: product_rate(dtype, 768, 0.05) for dtype in (torch.float32, torch.bfloat16)}
    return Device("cpu", read_bandwidth(1 << 27, 0.1), peaks, launch=1e-6)


def read_bandwidth(size: int, seconds: float) -> float:
    """Bytes a second: the best of a few ways to read `size` bytes with all threads, tried for about `seconds`."""
    with _compat.real_execution():
        buffer = torch.ones(size // 4)
        pages.enlarge([buffer])
        readers: list[Callable[[], object]] = [buffer.sum, buffer.max, lambda: torch.dot(buffer, buffer)]
        return size / min(_shortest(reader, seconds / len(readers)) for reader in readers)


def product_rate(dtype: torch.dtype, side: int, seconds: float) -> float:
    """Operations a second of a square matrix product with `side` rows, tried for about `seconds`.

    Of a dtype that torch multiplies slowly here they are those of float32, by way of which graphopt goes.
    """
    dtype = dtype if _compat.multiplies_fast(dtype) else torch.float32
    with _compat.real_execution():
        square = torch.ones(side, side, dtype=dtype)
        return 2 * side**3 / _shortest(lambda: square @ square, seconds)


def _shortest(run: Callable[[], object], seconds: float) -> float:
    """The shortest of the calls that fit in `seconds` (three at least)."""
    run()
    times: list[float] = []
    while len(times) < 3 or sum(times) < seconds:
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return max(min(times), 1e-9)


def value_bytes(value: Any) -> sympy.Expr:
    """The bytes that a fake value's elements take; an expanded dimension (stride 0) counts once."""
    if isinstance(value, (tuple, list)):
        return sum((value_bytes(v) for v in value), _ZERO)
    if not isinstance(value, torch.Tensor):
        return _ZERO
    dims = [
        size_expression(s)
        for s, stride in zip(value.shape, value.stride(), strict=True)
        if isinstance(stride, torch.SymInt) or stride != 0
    ]
    return product(dims) * value.dtype.itemsize


def _written_bytes(node: Node) -> sympy.Expr:
    """The bytes that a node writes: its value, or the rows that it writes into a cache."""
    written = node.args[1] if node.target in WRITES else node
    assert isinstance(written, Node)
    return value_bytes(written.meta.get("val"))


def _numel(value: Any) -> sympy.Expr:
    if isinstance(value, (tuple, list)):
        return sum((_numel(v) for v in value), _ZERO)
    return product([size_expression(s) for s in value.shape]) if isinstance(value, torch.Tensor) else _ZERO


_GATHERS = frozenset({aten.embedding.default, aten.index_select.default, aten.gather.default, aten.index.Tensor})

# Packed experts too: then x, what they are packed in, ends.
_GROUPED = (*grouped.NAMES, "graphopt.quantized_grouped_linear.default")

# Done outside of the graph, or handed out without being touched.
_FREE = frozenset(
    {
        "graphopt.quantize_weight.default",
        "graphopt.input_scales.default",
        "graphopt.kv_reserve.default",
        "graphopt.kv_quantized_reserve.default",
        "graphopt.kv_paged_reserve.default",
        "graphopt.kv_window.default",
        "graphopt.kv_allocate.default",
    }
)


def _reads(node: Node, operand: Node) -> sympy.Expr:
    """The bytes that a node reads of an operand: a gather reads only the rows it picks, a slice only its part, a
    product with experts no more of them than it has rows (each row has one)."""
    value = node.meta.get("val")
    mixture = _mixture(node)
    if mixture is not None and operand in mixture.experts:
        return value_bytes(operand.meta["val"]) * sympy.Min(mixture.rows, mixture.count) / mixture.count
    if node.target in _GATHERS and node.args[0] is operand:
        return value_bytes(value)
    if node.target in (aten.copy_.default, *WRITES) and node.args[0] is operand:
        return _ZERO
    if str(node.target) == "graphopt.quantized_embedding.default" and node.args[0] is not operand:
        picked, table = node.args[0], operand.meta["val"]
        assert isinstance(picked, Node)
        return _numel(picked.meta["val"]) * product([size_expression(s) for s in table.shape[1:]]) * table.itemsize
    if node.op == "call_function" and is_view(node) and node.target not in (aten.expand.default,):
        return _numel(value) * operand.meta["val"].dtype.itemsize if isinstance(value, torch.Tensor) else _ZERO
    return value_bytes(operand.meta.get("val"))


@dataclasses.dataclass(frozen=True)
class _Mixture:
    """A product of rows with their experts: how many rows, how many experts, and the nodes that hold these."""

    rows: sympy.Expr
    count: sympy.Expr
    experts: tuple[Node, ...]


def _mixture(node: Node) -> _Mixture | None:
    if str(node.target) not in _GROUPED:
        return None
    x, experts, *more = node.args
    ends = more[0] if more else node.kwargs.get("offs")
    held = tuple(experts) if isinstance(experts, (list, tuple)) else (experts,)
    if not isinstance(x, Node) or not isinstance(ends, Node) or x.meta["val"].dim() != 2:
        return None
    if isinstance(experts, Node) and experts.meta["val"].dim() != 3:
        return None  # the gradient of experts
    rows, count = (size_expression(given.meta["val"].shape[0]) for given in (x, ends))
    return _Mixture(rows, count, tuple(part for part in held if isinstance(part, Node)))


# Which argument's last dimension is summed over.
_PRODUCTS = {
    "aten.mm.default": 0,
    "aten.addmm.default": 1,
    "aten.bmm.default": 0,
    "aten.baddbmm.default": 1,
    "graphopt.linear.default": 0,
    "graphopt.parallel_linear.default": 0,
    "graphopt.quantized_linear.default": 0,
    "graphopt.parallel_quantized_linear.default": 0,
}


def flops(node: Node) -> sympy.Expr:
    """The floating point operations of a node: two for each multiplication and addition of a contraction, one for each
    element of an elementwise node or of a reduction's operand, none for moving data."""
    if node.op != "call_function" or is_view(node) or node.target in CONSTANTS or node.target in SPLITS:
        return _ZERO
    name = str(node.target)
    operands = [n.meta.get("val") for n in node.all_input_nodes]
    if name in _PRODUCTS or _mixture(node) is not None:
        left = node.args[_PRODUCTS.get(name, 0)]
        assert isinstance(left, Node)
        return 2 * _numel(node.meta["val"]) * size_expression(left.meta["val"].shape[-1])
    if node.target is aten.convolution.default:
        x, weight = operands[:2]
        assert isinstance(x, torch.Tensor) and isinstance(weight, torch.Tensor)
        places = x if node.args[6] else node.meta["val"]
        return 2 * _numel(places) * product([size_expression(s) for s in weight.shape[1:]])
    if "attention" in name and len(operands) >= 3:
        q, k, v = operands[:3]
        assert isinstance(q, torch.Tensor) and isinstance(k, torch.Tensor) and isinstance(v, torch.Tensor)
        pairs = _numel(q) * size_expression(k.shape[-2])
        return 2 * pairs + 2 * pairs / size_expression(q.shape[-1]) * size_expression(v.shape[-1])
    if node.target in REDUCTIONS:
        return _numel(operands[0])
    value = node.meta.get("val")
    return _numel(value) if isinstance(value, torch.Tensor) and node.target not in _GATHERS else _ZERO


def region_of(graph_module: GraphModule, node: Node) -> GraphModule:
    """What a node computes as a graph of its own: the region that it calls, else a region of it alone."""
    if node.op == "call_module":
        module = graph_module.get_submodule(str(node.target))
        assert isinstance(module, GraphModule)
        return module
    region = Graph()
    inner: dict[Node, Node] = {}
    for operand in node.all_input_nodes:
        inner[operand] = region.placeholder(f"in_{len(inner)}")
        inner[operand].meta.update(val=operand.meta.get("val"))
    region.output((region.node_copy(node, inner.__getitem__),))
    return GraphModule(torch.nn.Module(), region)


def node_cost(graph_module: GraphModule, node: Node, model: CostModel | None = None) -> Cost:
    """The cost of a node run by itself; of a region, when the node calls one. model: what to ask instead."""
    if not _moves_data(node):
        return Cost()
    if model is not None:
        return model(region_of(graph_module, node))
    if node.op == "call_module":
        return region_cost(region_of(graph_module, node))
    reads = sum((_reads(node, operand) for operand in node.all_input_nodes), _ZERO)
    return Cost(reads + _written_bytes(node), flops(node), 1)


def _moves_data(node: Node) -> bool:
    """Is the node a kernel: no input, no view, no arithmetic on sizes, nothing done outside of the graph?"""
    if node.op == "call_module":
        return True
    if node.op != "call_function" or node.target in ALIASING_VIEWS or node.target in SPLITS:
        return False
    if str(node.target) in _FREE or not isinstance(node.meta.get("val"), (torch.Tensor, tuple, list)):
        return False
    return getattr(node.target, "__module__", "") not in ("_operator", "operator")


def region_cost(region: GraphModule) -> Cost:
    """The cost of a fused region: every input is read once, every output written once."""
    total: sympy.Expr = _ZERO
    for node in region.graph.nodes:
        if node.op == "placeholder":
            total += _input_bytes(node)
    returned = region.graph.output_node().all_input_nodes
    written = sum((_written_bytes(n) for n in returned if n.op != "placeholder"), _ZERO)
    return Cost(total + written, sum((flops(n) for n in region.graph.nodes), _ZERO), 1)


def _input_bytes(node: Node) -> sympy.Expr:
    """What a region reads of an input: no more than its readers ask for when all of them pick parts."""
    picked = _picked(node)
    return value_bytes(node.meta.get("val")) if picked is None else picked


def _picked(node: Node) -> sympy.Expr | None:
    """The bytes that the readers of a node, and of views of it, ask for; None unless all of them pick parts."""
    read: list[sympy.Expr] = []
    for user in node.users:
        mixture = _mixture(user)
        if (user.target in _GATHERS and user.args[0] is node) or (mixture is not None and node in mixture.experts):
            read.append(_reads(user, node))
            continue
        if user.target in WRITES and user.args[0] is node:
            read.append(_ZERO)
            continue
        inner = _picked(user) if user.target in RESHAPES | {aten.permute.default} else None
        if inner is None:
            return None
        read.append(inner)
    return sympy.Add(*read) if read else None


def graph_cost(graph_module: GraphModule, model: CostModel | None = None) -> Cost:
    """The cost of a whole graph, as it stands: the sum over its regions and remaining nodes."""
    return total(node_cost(graph_module, n, model) for n in graph_module.graph.nodes)


def minimal_bytes(graph_module: GraphModule) -> sympy.Expr:
    """The least that any kernels could move: each used input once, and once what is new of each output."""
    inputs = [n for n in graph_module.graph.nodes if n.op == "placeholder" and n.users]
    outputs = graph_module.graph.output_node().all_input_nodes
    read = sum((_input_bytes(n) for n in inputs), _ZERO)
    return read + sum((_new_bytes(n) for n in outputs if n.op != "placeholder"), _ZERO)


def _new_bytes(output: Node) -> sympy.Expr:
    """What must be written for an output: of an input that is continued, only what comes behind it (in its own memory,
    where there is room)."""
    listed = output.args[0] if output.target is aten.cat.default else ()
    first, *others = listed if isinstance(listed, (tuple, list)) and listed else (None,)
    if isinstance(first, Node) and first.op == "placeholder":
        return sum((value_bytes(other.meta["val"]) for other in others if isinstance(other, Node)), _ZERO)
    return _written_bytes(output)
