"""Writes at loaded indices in generated kernels, under the interpreter against eager on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from graphopt.backends.triton.check import TARGETS, resources
from graphopt.passes.fuse.form_regions import form_regions
from tests.backends.graphs import run

aten, bf16 = torch.ops.aten, torch.bfloat16


def assert_agrees(
    function: Callable[..., Any],
    *inputs: torch.Tensor,
    launches: int | None = None,
    tolerance: float = 0,
    **options: Any,
) -> list[Any]:
    want = function(*inputs)
    got, compiled = run(function, *inputs, prepare=form_regions, **options)
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance, equal_nan=True)
    assert compiled[0].fallbacks == []
    assert compiled[0].launches >= 1 if launches is None else compiled[0].launches == launches
    return compiled


def test_of_several_indices_of_one_place_the_last_counts() -> None:
    x, i = torch.zeros(7, 5), torch.tensor([3, 1, 3, 0, 3])
    source = torch.arange(25.0).view(5, 5)
    assert_agrees(lambda x, i, s: x.index_copy(0, i, s), x, i, source)
    assert_agrees(lambda x, i, s: x.index_copy(1, i % 5, s[:, :1].expand(7, 5).clone()), x, i, torch.randn(7, 5))
    assert_agrees(lambda x, i, s: x.scatter(0, i[:, None].expand(5, 5), s), x, i, source)


@pytest.mark.parametrize("dtype", [torch.float32, bf16, torch.float16, torch.int8, torch.bool])
def test_sums_take_the_indices_in_order(dtype: torch.dtype) -> None:
    """Rounded after each; eager's kernels on the CPU do so in some layouts and round once in others."""
    near = {torch.float16: 4e-3, bf16: 4e-2}.get(dtype, 0.0)
    i = torch.tensor([3, 1, 3, 0, 3])
    x, source = (torch.randn(7, 5) * 3).to(dtype), (torch.randn(5, 5) * 3).to(dtype)
    assert_agrees(lambda x, i, s: x.index_add(0, i, s), x, i, source, tolerance=near)
    if dtype != torch.bool:
        assert_agrees(lambda x, i, s: x.index_add(0, i, s, alpha=2), x, i, source, tolerance=near)
    assert_agrees(lambda x, i, s: x.scatter_add(0, i[:, None].expand(5, 3), s), x, i, source, tolerance=near)


def test_negative_indices_count_from_the_end_where_eager_lets_them() -> None:
    x, i, v = torch.randn(6, 4), torch.tensor([-1, 2, -6]), torch.randn(3, 4)

    def put(x: torch.Tensor, i: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        x[i] = v
        return x

    assert_agrees(put, x, i, v)
    assert_agrees(lambda x, i, v: x.index_put((i,), v, accumulate=True), x, i, v)


def test_several_index_tensors_broadcast() -> None:
    x, i, j = torch.randn(4, 5, 6), torch.tensor([[0], [3]]), torch.tensor([1, 5, 1])
    assert_agrees(lambda x, i, j, v: aten.index_put(x, [i, None, j], v), x, i, j, torch.randn(2, 3, 5))
    assert_agrees(lambda x, i, j, v: aten.index_put(x, [None, i, j], v), x, i, j, torch.randn(4, 2, 3))
    assert_agrees(lambda x, i, j, v: x.index_put((i, j % 5), v, accumulate=True), x, i, j, torch.randn(6))


def test_numbers_are_written_and_smaller_sources() -> None:
    x, i = torch.randn(5, 6), torch.tensor([[0, 2, 4], [1, 1, 0]])
    assert_agrees(lambda x, i: (x.index_fill(1, i[0], 2.5), x.scatter(0, i, -1.5), x.scatter(1, i, 7)), x, i)
    assert_agrees(lambda x, i: x.to(torch.int32).index_fill(1, i[0], -3), x, i)
    assert_agrees(lambda x, i, s: x.scatter(1, i, s), x, i, torch.randn(4, 5))


def test_single_numbers_and_nothing() -> None:
    x, i = torch.tensor(3.0), torch.tensor(0)
    assert_agrees(lambda x, i, s: x.scatter(0, i, s), x, i, torch.tensor(5.0))
    got, _ = run(
        lambda x, i, s: x.index_copy(0, i, s),
        torch.ones(3, 2),
        torch.ones(0, dtype=torch.long),
        torch.ones(0, 2),
        prepare=form_regions,
    )
    assert got.equal(torch.ones(3, 2))


def test_the_elementwise_nodes_around_share_the_launch_but_not_the_source() -> None:
    x, i, s = torch.randn(8, 6), torch.tensor([5, 2]), torch.randn(2, 6)
    assert_agrees(lambda x, i, s: (x * 2).index_copy(0, i, s) + 1, x, i, s, launches=1)
    assert_agrees(lambda x, i, s: x.index_copy(0, i[:1].expand(8) * 0, (s[:1] + x) * 3), x, i, s, launches=2)


@pytest.mark.parametrize("dynamic", [False, True])
def test_many_indices_or_a_symbolic_number_are_left_to_aten(dynamic: bool) -> None:
    count = 5 if dynamic else 17
    x, i = torch.randn(40, 3), torch.randperm(40)[:count]
    _, compiled = run(
        lambda x, i, s: x.index_copy(0, i, s), x, i, torch.randn(count, 3), prepare=form_regions, dynamic=dynamic
    )
    assert compiled[0].launches == 0
    assert "index_" in compiled[0].fallbacks[0].target


def test_a_gather_of_single_numbers() -> None:
    x = torch.randn(5)
    assert_agrees(lambda x, i: torch.gather(x, 0, i), x, torch.tensor(3))
    assert_agrees(lambda x, i: torch.gather(x, 0, i), torch.tensor(2.0), torch.tensor([0, 0]))


def test_another_naming_of_places() -> None:
    x = torch.randn(4, 6)
    assert_agrees(lambda x: (x * 2).as_strided((3, 4), (1, 6), 2) + 1, x)
    got, compiled = run(lambda x: x[:, 1:].as_strided((3, 2), (6, 1), 3) + 1, x, prepare=form_regions)
    assert got.equal(x[:, 1:].as_strided((3, 2), (6, 1), 3) + 1)
    assert [f.target for f in compiled[0].fallbacks] in (["aten.as_strided.default"], [])


@pytest.mark.parametrize("target", TARGETS)
def test_the_kernels_fit(target: str) -> None:
    _, compiled = run(
        lambda x, i, s: x.index_add(0, i, s),
        torch.randn(99, 128).to(bf16),
        torch.arange(16),
        torch.randn(16, 128).to(bf16),
        prepare=form_regions,
    )
    for kernel in compiled[0].kernels.values():
        assert resources(kernel, target).fits, resources(kernel, target)
