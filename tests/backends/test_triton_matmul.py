"""Matrix products with prologues and epilogues under the interpreter against eager."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.fx import GraphModule

from graphopt.passes.fuse.form_regions import form_regions
from graphopt.passes.fuse.merge_parallel_linears import merge_parallel_linears
from graphopt.passes.recognize.recognize_linear import recognize_linear
from tests.backends.graphs import run
from tests.backends.test_triton_rows import rms_norm

bf16 = torch.bfloat16


def fuse(graph_module: GraphModule) -> None:
    recognize_linear(graph_module)
    merge_parallel_linears(graph_module)
    form_regions(graph_module)


def assert_agrees(
    function: Any, *inputs: torch.Tensor, launches: int = 1, tolerance: float = 1e-4, **options: Any
) -> str:
    want = function(*inputs)
    got, compiled = run(function, *inputs, prepare=fuse, **options)
    assert compiled[0].fallbacks == []
    assert compiled[0].launches == launches
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
    return compiled[0].source


@pytest.mark.parametrize("rows", [1, 2, 17, 70])
@pytest.mark.parametrize(("columns", "depth"), [(1, 1), (40, 72), (16, 256), (33, 31)])
def test_bias_and_activation_are_the_epilogue(rows: int, columns: int, depth: int) -> None:
    x, w, b = torch.randn(rows, depth), torch.randn(columns, depth), torch.randn(columns)
    assert_agrees(lambda x, w, b: F.gelu(F.linear(x, w, b)) + 1, x, w, b)


@pytest.mark.parametrize("dtype", [bf16, torch.float16])
@pytest.mark.parametrize("rows", [1, 5, 40])
def test_sixteen_bit_products_accumulate_in_float32(rows: int, dtype: torch.dtype) -> None:
    x, w, r = torch.randn(rows, 96).to(dtype), torch.randn(24, 96).to(dtype), torch.randn(rows, 24).to(dtype)
    source = assert_agrees(lambda x, w, r: F.linear(x, w) + r, x, w, r, tolerance=3e-2)
    assert "tl.float32" in source


def test_gate_and_partner_share_one_walk() -> None:
    x, g, u = torch.randn(3, 64), torch.randn(48, 64), torch.randn(48, 64)
    source = assert_agrees(lambda x, g, u: F.silu(F.linear(x, g)) * F.linear(x, u), x, g, u)
    assert source.count("tl.dot(") == 2 and source.count("for start") == 1


def test_query_key_value_are_sections_of_one_launch() -> None:
    x, q, k, v = torch.randn(2, 5, 32), torch.randn(48, 32), torch.randn(16, 32), torch.randn(16, 32)
    assert_agrees(lambda x, q, k, v: (F.linear(x, q), F.linear(x, k), F.linear(x, v)), x, q, k, v)


@pytest.mark.parametrize("rows", [1, 4])
def test_with_few_rows_a_norm_is_the_prologue(rows: int) -> None:
    x, n, w = torch.randn(rows, 300), torch.randn(300), torch.randn(24, 300)
    assert_agrees(lambda x, n, w: F.linear(rms_norm(x, n), w), x, n, w)


def test_with_many_rows_a_norm_keeps_its_own_kernel() -> None:
    x, n, w = torch.randn(40, 30), torch.randn(30), torch.randn(24, 30)
    assert_agrees(lambda x, n, w: F.linear(rms_norm(x, n), w), x, n, w, launches=2)


def test_batched_and_plain_products() -> None:
    assert_agrees(lambda a, b: torch.bmm(a, b).relu(), torch.randn(3, 33, 20), torch.randn(3, 20, 17))
    assert_agrees(lambda a, b: (a @ b) * 2, torch.randn(33, 20), torch.randn(20, 17))
    assert_agrees(lambda a, b, c: torch.addmm(c, a, b.t()), torch.randn(9, 20), torch.randn(17, 20), torch.randn(17))


def test_a_transposed_operand_is_an_index_map() -> None:
    assert_agrees(lambda a, b: a.transpose(0, 1).reshape(6, 20) @ b, torch.randn(5, 6, 4), torch.randn(20, 17))


def test_symbolic_rows() -> None:
    assert_agrees(lambda x, w: F.linear(x, w).relu(), torch.randn(21, 30), torch.randn(24, 30), dynamic=True)


@pytest.mark.parametrize(("columns", "depth"), [(40, 72), (33, 300), (70, 4096)])
def test_one_row_for_each_of_a_batch(columns: int, depth: int) -> None:
    _, compiled = run(torch.bmm, torch.randn(3, 1, depth), torch.randn(3, depth, columns), prepare=fuse)
    assert compiled[0].launches in (1, 2)
    x, w = torch.randn(3, 1, depth), torch.randn(3, depth, columns)
    torch.testing.assert_close(compiled[0](x, w)[0], x @ w, rtol=1e-3, atol=1e-3)
    assert compiled[0].fallbacks == []
