"""Which readers of a product that join or reduce its columns are taken into its kernel, which are not, and why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import sympy
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule, Node

from graphopt import cost, edit, ops
from graphopt.passes.fuse.epilogues import LONGEST_EPILOGUE
from graphopt.passes.fuse.form_regions import form_regions
from graphopt.passes.recognize.recognize_linear import recognize_linear
from tests.backends.graphs import run
from tests.backends.test_triton_rows import rms_norm

HEADS, D = 3, 8


def formed(function: Callable[..., Any], *inputs: Tensor, **options: Any) -> tuple[list[list[str]], list[str]]:
    """The operators of each region, and the reasons to refuse; the answers must be eager's."""
    found: list[list[str]] = []
    dynamic = options.pop("dynamic", None)
    session = edit.Session()

    def prepare(graph_module: GraphModule) -> None:
        recognize_linear(graph_module)
        with edit.session(session):
            form_regions(graph_module, **options)
        modules = [module for module in graph_module.children() if isinstance(module, GraphModule)]
        found.extend([_name(n) for n in module.graph.nodes if n.op == "call_function"] for module in modules)

    got, (compiled,) = run(function, *inputs, prepare=prepare, dynamic=dynamic)
    torch.testing.assert_close(got, function(*inputs), rtol=1e-3, atol=1e-3)
    assert {fallback.target for fallback in compiled.fallbacks} <= {"aten.sort.default"}
    return found, [refusal.reason for refusal in session.refusals]


def _name(node: Node) -> str:
    return str(getattr(node.target, "overloadpacket", "getitem")).split(".")[-1]


def heads(x: Tensor, w: Tensor) -> Tensor:
    return F.linear(x, w).unflatten(-1, (HEADS, D)).transpose(1, 2)


def swapped(x: Tensor, at: int = D // 2) -> Tensor:
    return torch.cat([-x[..., at:], x[..., :at]], -1)


def inputs(rows: int = 2) -> tuple[Tensor, Tensor]:
    return torch.randn(1, rows, 20), torch.randn(HEADS * D, 20)


def test_a_rotation_is_one_region_with_the_product() -> None:
    cos, sin = torch.randn(2, D), torch.randn(2, D)
    found, reasons = formed(lambda x, w, c, s: ops.rope(heads(x, w), c, s), *inputs(), cos, sin)
    assert len(found) == 1 and "linear" in found[0] and "cat" in found[0] and reasons == []


def test_a_split_is_followed() -> None:
    def function(x: Tensor, w: Tensor) -> Tensor:
        y = heads(x, w)
        a, b = y.chunk(2, -1)
        return y + torch.cat([-b, a], -1)

    assert len(formed(function, *inputs())[0]) == 1


REFUSED: dict[str, tuple[Callable[..., Any], str]] = {
    "more columns at a time than accumulators": (
        lambda x, w: heads(x, w) + swapped(heads(x, w), 3),
        "it needs 8 columns of the product at a time, and 4 at most are held"),
    "another row": (
        lambda x, w: (lambda y: y + torch.cat([y[:, :, 1:], y[:, :, :1]], 2))(heads(x, w)),
        "it joins more than columns of one row that are evenly spaced"),
    "columns of two heads": (
        lambda x, w: (lambda y: y + torch.cat([y[:, 2:], y[:, :2]], 1))(heads(x, w)),
        "it joins more than columns of one row that are evenly spaced"),
    "columns in the order of another product": (
        lambda x, w: (lambda y: y + torch.cat([y[..., :4], y[..., 4:]], -1).view(1, 2, HEADS, D).transpose(1, 2))(
            heads(x, w)),
        "it joins more than columns of one row that are evenly spaced"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    function, reason = REFUSED[name]
    found, reasons = formed(function, *inputs())
    assert reason in reasons
    assert not any({"linear", "cat"} <= set(region) for region in found)


def test_a_symbolic_number_of_columns_is_refused() -> None:
    def function(x: Tensor, w: Tensor) -> Tensor:
        y = F.linear(x, w)
        return y + swapped(y, 4)

    found, reasons = formed(function, *inputs(), dynamic=True)
    assert "the number of columns is symbolic" in reasons and len(found) == 2


def test_a_long_epilogue_is_refused() -> None:
    def function(x: Tensor, w: Tensor) -> Tensor:
        y = swapped(heads(x, w))
        for _ in range(LONGEST_EPILOGUE):
            y = y.relu() + 1
        return y

    found, reasons = formed(function, *inputs())
    assert f"the product's kernel would have more than {LONGEST_EPILOGUE} nodes" in reasons and len(found) == 2


def test_a_part_that_is_read_besides_stays_outside() -> None:
    def function(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        y = heads(x, w)
        half = -y[..., D // 2 :]
        return torch.cat([half, y[..., : D // 2]], -1), half

    found, _ = formed(function, *inputs())
    assert not any({"linear", "neg"} <= set(region) or {"linear", "cat"} <= set(region) for region in found)


def test_only_what_shows_all_of_the_product_is_taken() -> None:
    """Half of what is rotated is computed on: that is behind the region, the rotation is in it."""
    found, _ = formed(lambda x, w: swapped(heads(x, w))[..., 2:6].exp(), *inputs())
    assert ["linear" in region for region in found] == [True, False] and "cat" in found[0] and "exp" in found[1]


def test_a_norm_of_each_head_comes_between() -> None:
    cos, sin, scale = torch.randn(2, D), torch.randn(2, D), torch.randn(D)
    found, _ = formed(lambda x, w, c, s, n: ops.rope(rms_norm(heads(x, w), n), c, s), *inputs(), cos, sin, scale)
    assert not any({"linear", "cat"} <= set(region) for region in found)


def test_an_angle_that_waits_for_the_product_is_a_cycle() -> None:
    def function(x: Tensor, w: Tensor) -> Tensor:
        y = heads(x, w)
        return y + swapped(y) * torch.sort(y, -1)[0]

    found, _ = formed(function, *inputs())
    assert not any({"linear", "mul"} <= set(region) for region in found)


def test_a_cost_model_may_say_no() -> None:
    def dear(region: GraphModule) -> cost.Cost:
        return cost.Cost(sympy.Integer(10 ** len(region.graph.nodes)))

    found, _ = formed(lambda x, w: swapped(heads(x, w)), *inputs(), cost_model=dear)
    assert not any({"linear", "cat"} <= set(region) for region in found)


def peaks(y: Tensor, size: int = D) -> Tensor:
    return y.unflatten(-1, (-1, size)).abs().amax(-1)


def test_a_reduction_over_groups_is_one_region_with_the_product() -> None:
    def function(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        y = F.linear(x, w)
        return y.unflatten(-1, (-1, D)) / peaks(y)[..., None], peaks(y)

    found, reasons = formed(function, *inputs(17))
    assert len(found) == 1 and {"linear", "amax", "div"} <= set(found[0]) and reasons == []


REDUCED: dict[str, tuple[Callable[[Tensor], Any], int, str]] = {
    "groups of several sizes": (
        lambda y: peaks(y, 4).repeat_interleave(2, -1) + peaks(y, 2).repeat_interleave(1, -1), 24,
        "it reduces columns by groups of several sizes"),
    "more columns than a tile has": (
        lambda y: peaks(y, 256), 512, "it reduces 256 columns, and 128 at most are computed together"),
    "columns that are no neighbours": (
        lambda y: y.unflatten(-1, (8, 3)).transpose(-1, -2).amax(-1), 24,
        "it reduces other than neighbouring columns of one row"),
    "groups of an odd size": (
        lambda y: peaks(y, 6), 24, "a program computes a power of two of neighbouring columns, and not 6"),
}  # fmt: skip


@pytest.mark.parametrize("name", REDUCED)
def test_a_reduction_is_refused(name: str) -> None:
    function, columns, reason = REDUCED[name]
    x, w = torch.randn(1, 17, 20), torch.randn(columns, 20)
    found, reasons = formed(lambda x, w: function(F.linear(x, w)), x, w)
    assert reason in reasons
    assert not any({"linear", "amax"} <= set(region) for region in found)


def test_few_programs_would_draw_too_little_bandwidth() -> None:
    found, reasons = formed(lambda x, w: peaks(F.linear(x, w), 128), torch.randn(17, 1024), torch.randn(128, 1024))
    assert reasons == ["programs that compute 128 columns each would be too few, 1, to draw the bandwidth"]
    assert len(found) == 2


def test_with_few_rows_a_norm_is_left_to_the_product_that_reads_it() -> None:
    def function(x: Tensor, w: Tensor, scale: Tensor) -> Tensor:
        y = F.linear(x, w)
        return F.linear(rms_norm(y, scale), w.t())

    x, w = inputs(3)
    found, reasons = formed(function, x, w, torch.randn(HEADS * D))
    assert [("linear" in region, "mean" in region) for region in found] == [(True, False), (True, True)]
    assert reasons == []


def test_a_refused_norm_leaves_the_join_before_it() -> None:
    """What is rotated first and then reduced by too many columns: the rotation stays in the kernel."""
    def function(x: Tensor, w: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        y = ops.rope(F.linear(x, w).unflatten(-1, (2, 256)), cos, sin)
        return y, y.amax(-1)

    given = torch.randn(1, 17, 20), torch.randn(512, 20), torch.randn(2, 256), torch.randn(2, 256)
    found, reasons = formed(function, *given)
    assert "it reduces 256 columns, and 128 at most are computed together" in reasons
    assert {"linear", "cat"} <= set(found[0]) and "amax" not in found[0]
