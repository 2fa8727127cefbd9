"""Region forming: what is joined, what is refused, and that the graph means the same afterwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.fx import GraphModule

from graphopt.backends.triton import expressions, structures
from graphopt.index_map import VIEWS
from graphopt.passes.fuse.form_regions import form_regions
from graphopt.row_ops import CONSTANTS, ELEMENTWISE, SCATTERS, STRUCTURES
from tests.backends.graphs import run
from tests.backends.test_triton_rows import rms_norm


def assert_formed(function: Callable[..., Any], *inputs: torch.Tensor, dynamic: bool | None = None) -> GraphModule:
    """The graph of a function in regions, which must mean the same and be left alone a second time."""
    kept: list[GraphModule] = []

    def prepare(graph_module: GraphModule) -> None:
        count = form_regions(graph_module)
        graph_module.graph.lint()
        modules = [n for n in graph_module.graph.nodes if n.op == "call_module"]
        assert len(modules) == count
        assert form_regions(graph_module) == 0, "a second run forms regions again"
        kept.append(graph_module)

    want = function(*[i.clone() for i in inputs])
    got, _ = run(function, *inputs, prepare=prepare, dynamic=dynamic)
    torch.testing.assert_close(got, want, rtol=2e-3, atol=2e-3)
    return kept[0]


def regions(function: Callable[..., Any], *inputs: torch.Tensor, dynamic: bool | None = None) -> list[list[str]]:
    """The operators of each region of a function's graph."""
    graph_module = assert_formed(function, *inputs, dynamic=dynamic)
    found = []
    for node in graph_module.graph.nodes:
        if node.op == "call_module":
            module = graph_module.get_submodule(str(node.target))
            assert isinstance(module, GraphModule)
            found.append([str(n.target).removeprefix("aten.").split(".")[0] for n in module.graph.nodes
                          if n.op == "call_function"])
    return found


def test_a_residual_and_its_norm_are_one_region() -> None:
    def function(x: torch.Tensor, y: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = x + y
        return h, rms_norm(h, w)

    assert len(regions(function, torch.randn(20, 8), torch.randn(20, 8), torch.randn(8))) == 1


def test_a_cycle_is_refused() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        start = x + 1
        return start * torch.sort(start, -1)[0]

    found = regions(function, torch.randn(4, 5))
    assert ["add"] in found and ["mul"] in found


def test_reductions_over_other_rows_are_refused() -> None:
    assert len(regions(lambda x: x.softmax(-1).softmax(0), torch.randn(6, 5))) == 2


def test_columns_in_the_middle() -> None:
    assert len(regions(lambda x: x.softmax(1) * 2, torch.randn(3, 5, 4))) == 1
    assert len(regions(lambda x: (x.softmax(1).view(15, 4) * 2, x.sum(0)), torch.randn(3, 5, 4))) == 3


def test_a_row_value_read_across_rows_is_refused() -> None:
    found = regions(lambda x: x.mean(-1).view(2, 3).t().reshape(6, 1) + x, torch.randn(6, 6))
    assert len(found) == 2


def test_a_view_between_two_nodes_is_nobodys_launch() -> None:
    def function(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (x.relu().view(6, 4) * 2).t() + y

    assert len(regions(function, torch.randn(4, 6), torch.randn(4, 6))) == 1
    x, w = torch.randn(5, 6), torch.randn(8, 6)
    assert len(regions(lambda x, w: (x @ w.t()).view(5, 2, 4).relu(), x, w)) == 1


def test_a_cycle_behind_a_view_is_refused() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        start = x + 1
        return start.view(5, 4) * torch.sort(start.view(5, 4), -1)[0]

    found = regions(function, torch.randn(4, 5))
    assert ["add"] in found and ["view", "mul"] in found


def test_a_smaller_producer_is_not_computed_again_and_again() -> None:
    assert len(regions(lambda m, x: torch.exp(m) * x, torch.randn(8), torch.randn(30, 8))) == 2


def test_a_join_computes_its_pieces_where_it_reads_them() -> None:
    assert len(regions(lambda a, b: torch.cat([a * 2, b + 1], 0) * 3, torch.randn(2, 8), torch.randn(3, 8))) == 1


def test_a_widening_cast_is_left_to_its_reader() -> None:
    x, w, n = (torch.randn(size).bfloat16() for size in ((40, 144), (144, 144), (144,)))

    def function(x: torch.Tensor, w: torch.Tensor, n: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = x @ w + x
        return h, rms_norm(h, n)

    found = regions(function, x, w, n)
    assert len(found) == 2 and "prims" not in found[0]


def test_views_of_inputs_that_are_outputs_stay_outside() -> None:
    assert regions(lambda x: (x.t(), x[1:]), torch.randn(4, 5)) == []


def test_operators_without_a_kernel_stay_outside() -> None:
    assert regions(lambda x: torch.sort(x, -1)[0], torch.randn(4, 5)) == []


def test_complex_numbers_stay_outside() -> None:
    x = torch.randn(4, dtype=torch.complex64)
    kept: list[int] = []
    run(lambda a: a + 1, x, prepare=lambda graph: kept.append(form_regions(graph)))
    assert kept == [0]


def test_an_update_of_an_input_keeps_its_place() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        before = x.sum(-1)
        x.mul_(2)
        return before + x.sum(-1)

    x = torch.randn(3, 4)
    mine = x.clone()
    want = function(x)
    got, _ = run(function, mine, prepare=form_regions)
    torch.testing.assert_close((got, mine), (want, x))


def test_random_numbers_are_drawn_in_order() -> None:
    def function(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.rand(3) + x, torch.randn(3) * x

    x = torch.ones(3)
    torch.manual_seed(1)
    want = function(x)
    torch.manual_seed(1)
    got, _ = run(function, x, prepare=form_regions)
    assert got[0].shape == want[0].shape and got[1].shape == want[1].shape


def test_independent_elementwise_regions_of_one_source_share_a_launch() -> None:
    def function(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = torch.sort(x @ w, -1)[0]
        return y[:, :3] * 2, y[:, 3:].exp()

    assert [sorted(set(r) - {"slice"}) for r in regions(function, torch.randn(4, 5), torch.randn(5, 8))][-1] == [
        "exp", "mul"]


def test_reductions_over_the_same_rows_of_one_tensor_are_one_region() -> None:
    x = torch.randn(4, 6)
    assert len(regions(lambda x: (x.amax(-1), x.argmax(-1), (x * x).sum(-1)), x)) == 1
    assert len(regions(lambda x: (x.amax(-1), x.amax(0)), x)) == 2
    assert len(regions(lambda x, y: (x.amax(-1), y.amax(-1)), x, torch.randn(4, 6))) == 2


def test_symbolic_sizes_are_not_specialised() -> None:
    kept: list[GraphModule] = []

    def prepare(graph_module: GraphModule) -> None:
        form_regions(graph_module)
        kept.append(graph_module)

    x, y = torch.randn(4, 7), torch.randn(3, 7)
    run(lambda x, y: torch.cat([x, y], 0).softmax(-1), x, y, prepare=prepare, dynamic=True)
    sizes = [s for n in kept[0].graph.nodes if isinstance(n.meta.get("val"), torch.Tensor) for s in n.meta["val"].shape]
    assert any(isinstance(s, torch.SymInt) for s in sizes)


def test_the_generator_has_a_rule_for_everything_that_is_fused() -> None:
    known = set(expressions.TABLE) | set(structures.STRUCTURES) | VIEWS
    missing = [str(op) for op in ELEMENTWISE | STRUCTURES | SCATTERS | CONSTANTS if op not in known]
    assert missing == []


OPERATIONS: list[Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = [
    lambda a, b: a + b, lambda a, b: a * b.sigmoid(), lambda a, b: (a - b).abs(), lambda a, b: a.softmax(-1) + b,
    lambda a, b: a - b.mean(-1, keepdim=True), lambda a, b: torch.cat([a, b], 0)[: a.shape[0]],
    lambda a, b: F.layer_norm(a, a.shape[-1:]) * b, lambda a, b: (a.t() + 1).t() * b, lambda a, b: a.cumsum(-1) - b,
]


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(steps=st.lists(st.tuples(st.integers(0, len(OPERATIONS) - 1), st.integers(0, 5), st.integers(0, 5)),
                      min_size=1, max_size=7), rows=st.integers(1, 5), columns=st.integers(1, 9))
def test_random_programs_mean_the_same(steps: list[tuple[int, int, int]], rows: int, columns: int) -> None:
    def function(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, ...]:
        values = [a, b]
        for operation, first, second in steps:
            values.append(OPERATIONS[operation](values[first % len(values)], values[second % len(values)]))
        return values[-1], values[len(values) // 2] + 0

    assert_formed(function, torch.randn(rows, columns), torch.randn(rows, columns))
