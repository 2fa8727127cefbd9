"""The cost model: bytes and FLOPs of nodes and regions as expressions of symbolic sizes, and predicted times."""

from __future__ import annotations

from typing import Any

import pytest
import sympy
import torch
import torch.nn.functional as F
from torch.fx import GraphModule

from graphopt import _compat, cost
from graphopt.passes.fuse.form_regions import form_regions
from tests.backends.graphs import run


def captured(function: object, *inputs: torch.Tensor, dynamic: bool | None = None) -> GraphModule:
    kept: list[GraphModule] = []
    run(function, *inputs, prepare=kept.append, dynamic=dynamic)  # type: ignore[arg-type]
    return kept[0]


def test_a_product_reads_both_operands_and_multiplies_and_adds() -> None:
    graph = captured(lambda a, b: a @ b, torch.randn(3, 5), torch.randn(5, 7))
    total = cost.graph_cost(graph)
    assert total.bytes == 4 * (15 + 35 + 21) and total.flops == 2 * 3 * 5 * 7 and total.launches == 1


def test_a_region_reads_each_input_and_writes_each_output_once() -> None:
    def function(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        total = a + b
        return total.relu() * 2 - a, total

    graph = captured(function, torch.randn(4, 8), torch.randn(8))
    apart = cost.graph_cost(graph)
    form_regions(graph)
    fused = cost.graph_cost(graph)
    assert fused.bytes == 4 * (32 + 8 + 2 * 32) == cost.minimal_bytes(graph)
    assert fused.launches == 1 and apart.launches > 3 and apart.bytes > fused.bytes
    assert fused.flops == apart.flops


def test_symbolic_sizes_stay_symbolic() -> None:
    graph = captured(lambda a, b: F.linear(a, b), torch.randn(9, 6), torch.randn(4, 6), dynamic=True)
    total = cost.graph_cost(graph)
    symbols = {s.name for s in total.bytes.free_symbols}
    assert symbols
    values = dict.fromkeys(symbols, 2)
    assert not total.at(values).bytes.free_symbols
    with pytest.raises(ValueError, match="still depends on"):
        cost.device("H200").seconds(total)


def test_a_gather_reads_the_rows_it_picks() -> None:
    graph = captured(lambda w, i: F.embedding(i, w), torch.randn(1000, 8), torch.tensor([1, 2, 3]))
    assert cost.graph_cost(graph).bytes == 4 * 24 + 8 * 3 + 4 * 24


@pytest.mark.parametrize("rows", [1, 3, 4, 50])
def test_a_mixture_reads_no_more_experts_than_it_has_rows(rows: int) -> None:
    from transformers.integrations import moe  # noqa: F401  (registers transformers::grouped_mm_fallback)

    def product(x: torch.Tensor, experts: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        return torch.ops.transformers.grouped_mm_fallback(x, experts.transpose(1, 2), ends)

    x, experts, ends = torch.randn(rows, 64), torch.randn(4, 32, 64), torch.tensor([rows] * 4)
    graph = captured(product, x, experts, ends)
    total, read = cost.graph_cost(graph), 32 * 64 * min(rows, 4)
    assert total.flops == 2 * rows * 32 * 64 and total.launches == 1
    assert total.bytes == 4 * (rows * 64 + read + rows * 32) + 8 * 4 == cost.minimal_bytes(graph)
    # The same for packed experts: a byte for each weight, four for the scale of each row.
    packed = captured(
        lambda x, codes, scales, ends: torch.ops.graphopt.quantized_grouped_linear(x, [codes, scales], ends, "int8"),
        x,
        torch.ones(4 * 32, 64, dtype=torch.int8),
        torch.ones(4 * 32),
        ends,
    )
    total = cost.graph_cost(packed)
    assert total.flops == 2 * rows * 32 * 64
    assert total.bytes == 4 * (rows * 64 + rows * 32) + read + 4 * 32 * min(rows, 4) + 8 * 4


def test_rows_of_a_mixture_may_be_symbolic() -> None:
    from transformers.integrations import moe  # noqa: F401

    graph = captured(
        lambda x, experts, ends: torch.ops.transformers.grouped_mm_fallback(x, experts, ends),
        torch.randn(9, 64),
        torch.randn(4, 64, 32),
        torch.tensor([2, 5, 7, 9]),
        dynamic=True,
    )
    total = cost.graph_cost(graph)
    sizes = {s.name for s in total.bytes.free_symbols}
    assert sizes and not total.at(dict.fromkeys(sizes, 4)).bytes.free_symbols


def test_views_are_free() -> None:
    graph = captured(lambda a: a.t().reshape(8, 4)[1:] + 1, torch.randn(8, 4))
    views = [n for n in graph.graph.nodes if "permute" in str(n.target)]
    assert views and all(cost.node_cost(graph, v) == cost.Cost() for v in views)


def test_predicted_time_is_the_roofline() -> None:
    device = cost.Device("d", 100.0, {torch.float32: 10.0}, launch=1.0)
    assert device.seconds(cost.Cost(sympy.Integer(200), sympy.Integer(5), 3), torch.float32) == 5.0
    assert device.seconds(cost.Cost(sympy.Integer(10), sympy.Integer(50), 0), torch.float32) == 5.0


def test_devices() -> None:
    assert {"H200", "H100", "A100", "B200", "MI300X", "L4", "RTX 4090"} == set(cost.DEVICES)
    assert cost.device("cpu").bandwidth > 1e8 and cost.device("cpu") is cost.device("cpu")
    with pytest.raises(ValueError, match="unknown device 'TPU'"):
        cost.device("TPU")


@pytest.mark.parametrize(("fast", "wanted"), [(True, torch.bfloat16), (False, torch.float32)])
def test_a_slow_dtype_is_as_fast_as_float32(fast: bool, wanted: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    multiplied: list[torch.dtype] = []

    def once(run: Any, seconds: float) -> float:
        multiplied.append(run().dtype)
        return 2.0

    monkeypatch.setattr(_compat, "multiplies_fast", lambda dtype: fast or dtype.itemsize > 2)
    monkeypatch.setattr(cost, "_shortest", once)
    assert cost.product_rate(torch.bfloat16, 8, 1.0) == 8**3
    assert multiplied == [wanted]
