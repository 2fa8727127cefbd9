"""Long rows and long products shared out among programs, under the interpreter against eager."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.backends.triton import matmul_split
from graphopt.backends.triton.check import TARGETS, resources
from graphopt.backends.triton.compile import CompiledGraph
from graphopt.backends.triton.program import write
from graphopt.backends.triton.source import Kernel
from graphopt.passes.fuse.form_regions import form_regions
from graphopt.testing.traced import trace
from tests.backends.graphs import run
from tests.backends.test_triton_matmul import fuse
from tests.backends.test_triton_rows import rms_norm

LONG = 80_003
bf16 = torch.bfloat16


def assert_agrees(
    function: Callable[..., Any], *inputs: torch.Tensor, launches: int, tolerance: float = 1e-4, **options: Any
) -> CompiledGraph:
    want = function(*inputs)
    got, compiled = run(function, *inputs, prepare=form_regions, **options)
    assert compiled[0].fallbacks == []
    assert compiled[0].launches == launches
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance, equal_nan=True)
    return compiled[0]


def with_sizes(compiled: CompiledGraph, *tensors: torch.Tensor) -> list[Any]:
    """The inputs of a graph with symbolic sizes: the tensors, and the sizes that its placeholders ask for."""
    placeholders = compiled._graph_module.graph.find_nodes(op="placeholder")
    wanted = [node.meta["val"] for node in placeholders]
    fakes = [value for value in wanted if isinstance(value, torch.Tensor)]
    sizes = {
        str(s): n
        for fake, real in zip(fakes, tensors, strict=True)
        for s, n in zip(fake.shape, real.shape, strict=True)
    }
    left = iter(tensors)
    return [next(left) if isinstance(value, torch.Tensor) else sizes[str(value)] for value in wanted]


def kernels_of(function: Callable[..., Any], *inputs: torch.Tensor) -> list[Kernel]:
    """The kernels that would be launched for inputs too large for the interpreter."""
    traced = trace(function, [])
    with torch.no_grad():
        traced(*inputs)
    fuse(traced.graphs[0].before)
    return list(write(traced.graphs[0].before).kernels.values())


REDUCTIONS: dict[str, Callable[[torch.Tensor], Any]] = {
    "sum": lambda x: x.sum(),
    "mean": lambda x: x.mean(-1, keepdim=True),
    "prod": lambda x: (1 + x / 1e4).prod(-1),
    "amax": lambda x: (x.amax(-1), x.amin(-1)),
    "argmax": lambda x: (x.argmax(-1), x.argmin(-1)),
    "max": lambda x: x.max(-1),
    "variance": lambda x: torch.var_mean(x, -1, correction=0),
    "any": lambda x: ((x > 4).any(-1), (x > -9).all(-1)),
    "norm": lambda x: (x * x).sum(-1).sqrt(),
}


@pytest.mark.rotate(one_in=3)
@pytest.mark.parametrize(
    ("rows", "name"), [(rows, name) for rows in (1, 3) for name in REDUCTIONS if (rows, name) != (3, "prod")]
)  # slow under the interpreter
def test_a_long_row_is_shared_out_and_merged(rows: int, name: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(rows, LONG) + 3
    compiled = assert_agrees(REDUCTIONS[name], x, launches=2, tolerance=1e-3 if name == "norm" else 1e-4)
    assert [k.kind for k in compiled.kernels.values()] == ["rows_parts", "rows_merge"]


@pytest.mark.parametrize("dtype", [bf16, torch.float16, torch.int32, torch.bool])
def test_accumulators_are_as_wide_as_eagers(dtype: torch.dtype) -> None:
    x = (torch.randn(4 * LONG) * 3).to(dtype)
    want = x.float().sum().to(dtype) if dtype.is_floating_point else x.sum()
    got, compiled = run(lambda x: (x.sum(), x.amax()), x, prepare=form_regions)
    torch.testing.assert_close(got, (want, x.amax()), rtol=1e-2, atol=1)
    assert compiled[0].launches == 2


def test_the_first_of_equal_extremes_and_of_nans_counts() -> None:
    equal, nan, low = torch.zeros(LONG), torch.randn(LONG), torch.full((LONG,), float("-inf"))
    equal[70_000] = equal[75_000] = 1
    nan[60_000] = nan[79_999] = float("nan")
    for x in (equal, nan, low, torch.stack([nan, low])):
        assert_agrees(lambda x: (x.argmax(-1), x.argmin(-1), *x.max(-1)), x, launches=2)


def test_a_variance_far_from_zero_keeps_its_digits() -> None:
    x = torch.randn(2, LONG) + 1e4
    got, _ = run(lambda x: x.var(-1), x, prepare=form_regions)
    torch.testing.assert_close(got.double(), x.double().var(-1), rtol=1e-4, atol=0)


def test_infinities_make_eagers_nans() -> None:
    x = torch.randn(2, LONG)
    x[0, 5], x[1, 7], x[1, 70_000] = float("inf"), float("inf"), float("-inf")
    assert_agrees(lambda x: (x.sum(-1), x.var(-1, correction=0)), x, launches=2)


def test_a_softmax_takes_three_launches_and_writes_from_all_programs() -> None:
    x = torch.randn(1, LONG)
    compiled = assert_agrees(lambda x: x.softmax(-1), x, launches=3)
    assert [k.kind for k in compiled.kernels.values()] == ["rows_parts", "rows_parts", "rows_merge"]


def test_what_is_known_before_a_reduction_is_written_with_it() -> None:
    x, y = torch.randn(LONG), torch.randn(LONG)

    def function(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        total = x + y
        return total, total.sum(), total / total.abs().amax()

    compiled = assert_agrees(function, x, y, launches=2, tolerance=1e-3)
    first, last = compiled.kernels.values()
    assert "out0" in first.parameters and "out0" not in last.parameters


def test_columns_of_a_tall_matrix() -> None:
    assert_agrees(lambda x: (x.sum(0), x.amax(0)), torch.randn(20_011, 40), launches=2, tolerance=1e-3)
    assert_agrees(lambda x: x.mean((0, 2)), torch.randn(301, 3, 333), launches=2)


@pytest.mark.parametrize(("rows", "columns"), [(300, 9000), (1, 9000), (40, 2000), (0, LONG), (3, 0)])
def test_enough_rows_or_short_ones_are_not_cut(rows: int, columns: int) -> None:
    x = torch.randn(rows, columns)
    got, compiled = run(lambda x: x.sum(-1), x, prepare=form_regions)
    torch.testing.assert_close(got, x.sum(-1), rtol=1e-4, atol=1e-3)
    assert compiled[0].launches == 1


def test_a_scan_is_not_cut() -> None:
    assert_agrees(lambda x: x.cumsum(-1), torch.ones(1, LONG), launches=1)


def test_symbolic_sizes_are_cut_by_those_of_the_first_call() -> None:
    function = lambda x: (x.sum(), x.argmax())  # noqa: E731
    compiled = assert_agrees(function, torch.randn(LONG), launches=2, tolerance=1e-3, dynamic=True)
    for size in (2, 1500, LONG + 7, 3 * LONG):
        x = torch.randn(size)
        got = compiled(*with_sizes(compiled, x))
        torch.testing.assert_close(tuple(got), function(x), rtol=1e-3, atol=1e-3)
    assert_agrees(function, torch.randn(50), launches=1, dynamic=True)


@settings(max_examples=5, deadline=None)
@given(rows=st.integers(1, 4), columns=st.integers(60_000, 100_000), seed=st.integers(0, 99))
def test_any_length_of_row(rows: int, columns: int, seed: int) -> None:
    torch.manual_seed(seed)
    x = torch.randn(rows, columns)
    assert_agrees(lambda x: (x.sum(-1), *x.min(-1), x.var(-1)), x, launches=2, tolerance=1e-3)


@pytest.mark.rotate(one_in=4)
@pytest.mark.parametrize("target", TARGETS)
def test_the_kernels_fit(target: str) -> None:
    _, compiled = run(lambda x: (x.softmax(-1), x.argmax(-1), x.var(-1)), torch.randn(2, LONG), prepare=form_regions)
    _, tall = run(lambda x: (x.sum(0), x.argmax(0)), torch.randn(20_011, 64), prepare=form_regions)
    for kernel in (*compiled[0].kernels.values(), *tall[0].kernels.values()):
        assert resources(kernel, target).fits, (kernel.kind, resources(kernel, target))


def assert_product_agrees(
    function: Callable[..., Any], *inputs: torch.Tensor, launches: int, tolerance: float = 1e-3, **options: Any
) -> CompiledGraph:
    want = function(*inputs)
    got, compiled = run(function, *inputs, prepare=fuse, **options)
    assert compiled[0].fallbacks == []
    assert compiled[0].launches == launches
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
    return compiled[0]


def gelu_of(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    return F.gelu(F.linear(x, w, b)) + r


@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize(("columns", "depth"), [(8, 16_384), (33, 17_001)])
def test_a_long_product_is_dealt_out_and_its_epilogue_runs_in_the_merge(rows: int, columns: int, depth: int) -> None:
    x, w = torch.randn(rows, depth) / 100, torch.randn(columns, depth) / 10
    compiled = assert_product_agrees(gelu_of, x, w, torch.randn(columns), torch.randn(rows, columns), launches=2)
    assert [k.kind for k in compiled.kernels.values()] == ["linear_parts", "linear_merge"]


def test_sixteen_bit_sums_are_rounded_once() -> None:
    x, w = (torch.randn(16, 16_384) / 100).to(bf16), (torch.randn(24, 16_384) / 10).to(bf16)
    got, compiled = run(lambda x, w: F.linear(x, w), x, w, prepare=fuse)
    assert compiled[0].launches == 2
    torch.testing.assert_close(got, F.linear(x.double(), w.double()).to(bf16), rtol=4e-3, atol=2e-3)


@pytest.mark.parametrize("rows", [1, 4])
def test_joined_products_and_sections_are_dealt_out_together(rows: int) -> None:
    x, g, u = torch.randn(rows, 20_000) / 100, torch.randn(20, 20_000) / 10, torch.randn(20, 20_000) / 10
    assert_product_agrees(lambda x, g, u: F.silu(F.linear(x, g)) * F.linear(x, u), x, g, u, launches=2)
    assert_product_agrees(lambda x, g, u: (F.linear(x, g), F.linear(x, u[:9])), x, g, u, launches=2)


def test_a_product_whose_rows_are_reduced_first_is_not_dealt_out() -> None:
    """Every program would walk its rows from end to end for the norm."""
    x, n, w = torch.randn(2, 40_000), torch.randn(40_000), torch.randn(24, 40_000)
    assert [k.kind for k in kernels_of(lambda x, n, w: F.linear(rms_norm(x, n), w), x, n, w)] == ["linear"]


def test_batched_products_and_plain_ones() -> None:
    assert_product_agrees(
        lambda a, b: torch.bmm(a, b).relu(),
        torch.randn(3, 5, 9000) / 50,
        torch.randn(3, 9000, 17),
        launches=2,
        tolerance=1e-2,
    )
    assert_product_agrees(
        lambda a, b: a @ b, torch.randn(5, 9_000) / 100, torch.randn(9_000, 17), launches=2, tolerance=1e-2
    )


def test_symbolic_rows_are_dealt_out_by_those_of_the_first_call() -> None:
    w = torch.randn(24, 9_000) / 100
    compiled = assert_product_agrees(
        lambda x, w: F.linear(x, w).relu(), torch.randn(21, 9_000), w, launches=2, dynamic=True
    )
    for rows in (2, 130):
        x = torch.randn(rows, 9_000)
        (got,) = compiled(*with_sizes(compiled, x, w))
        torch.testing.assert_close(got, F.linear(x, w).relu(), rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize(
    ("rows", "columns", "depth"), [(1, 64, 512), (512, 512, 256), (4, 20_000, 512), (16, 768, 3072)]
)
def test_short_products_and_those_of_many_tiles_are_not_dealt_out(rows: int, columns: int, depth: int) -> None:
    x, w = torch.empty(rows, depth, dtype=bf16), torch.empty(columns, depth, dtype=bf16)
    assert [k.kind for k in kernels_of(lambda x, w: F.linear(x, w), x, w)] == ["linear"]


def test_a_last_wave_of_few_tiles_is_dealt_out() -> None:
    """144 tiles of a bfloat16 product on 132 processors: two waves of one, or one of equal runs."""
    x, w = torch.empty(1536, 16_384, dtype=bf16), torch.empty(1536, 16_384, dtype=bf16)
    parts, merge = kernels_of(lambda x, w: F.linear(x, w), x, w)
    assert (parts.kind, merge.kind) == ("linear_parts", "linear_merge")
    assert parts.constants["PROGRAMS_0"] == 132


@settings(max_examples=6, deadline=None)
@given(
    rows=st.integers(1, 70),
    columns=st.integers(1, 90),
    depth=st.integers(0, 700),
    share=st.integers(1, 12),
    seed=st.integers(0, 99),
)
def test_any_dealing_adds_up(rows: int, columns: int, depth: int, share: int, seed: int) -> None:
    torch.manual_seed(seed)
    x, w = torch.randn(rows, depth), torch.randn(columns, depth)
    with mock.patch.object(matmul_split, "_programs", lambda region, sections: [share] * len(sections)):
        assert_product_agrees(lambda x, w: F.linear(x, w) + 1, x, w, launches=2)


@pytest.mark.rotate(one_in=4)
@pytest.mark.parametrize("target", TARGETS)
def test_the_kernels_of_dealt_out_products_fit(target: str) -> None:
    for rows, columns, depth in ((1, 64, 65_536), (8, 64, 65_536), (64, 64, 65_536), (1536, 1536, 16_384)):
        x, w = torch.empty(rows, depth, dtype=bf16), torch.empty(columns, depth, dtype=bf16)
        found = kernels_of(lambda x, w: F.silu(F.linear(x, w)), x, w)
        assert len(found) == 2
        for kernel in found:
            assert resources(kernel, target).fits, (kernel.kind, resources(kernel, target))
