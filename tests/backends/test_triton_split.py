"""Long rows and long products shared out among programs, under the interpreter against eager."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.backends.triton.check import TARGETS, resources
from graphopt.backends.triton.compile import CompiledGraph
from graphopt.passes.fuse.form_regions import form_regions
from tests.backends.graphs import run

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
        got = compiled(size, x) if compiled.source.count("arg1") else compiled(x)
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
