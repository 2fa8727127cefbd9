"""Rotary embedding, and other joins of a product's columns, in the product's own kernel, under the interpreter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from graphopt import ops
from graphopt.backends.triton.compile import CompiledGraph
from graphopt.quantization import operations, schemes
from tests.backends.graphs import run
from tests.backends.test_triton_matmul import fuse
from tests.backends.test_triton_resources import assert_fit, written
from tests.backends.test_triton_rows import rms_norm

bf16 = torch.bfloat16
Rotate = Callable[[Tensor, Tensor, Tensor], Tensor]


def leading(size: int, interleaved: bool) -> Rotate:
    """A rotation of the first `size` numbers of each head; the others stay."""

    def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return torch.cat([ops.rope(x[..., :size], cos, sin, interleaved), x[..., size:]], -1)

    return rotate


ROTATIONS: dict[str, tuple[Rotate, int]] = {
    "halves": (lambda x, cos, sin: ops.rope(x, cos, sin), 8),
    "pairs": (lambda x, cos, sin: ops.rope(x, cos, sin, True), 8),
    "pairs of a part": (leading(6, True), 6),
    "halves of a part": (leading(4, False), 4),
}


def whole(low: int, high: int, *size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Whole numbers, whose products and sums are exact in any order."""
    return torch.randint(low, high, size).to(dtype)


def rotated(rotate: Rotate, size: int, rows: tuple[int, int], dtype: torch.dtype, depth: int = 20) -> tuple[Any, ...]:
    """Queries of four heads, keys of two and values, for [B, S] rows, with the tensors that they are made of."""
    x, cos, sin = whole(-9, 9, *rows, depth), torch.randn(rows[1], size), torch.randn(rows[1], size)
    weights = [whole(-9, 9, heads * 8, depth) for heads in (4, 2, 2)]

    def function(x: Tensor, cos: Tensor, sin: Tensor, bias: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        biases = (bias, None, None)
        q, k, v = (F.linear(x, w, b).unflatten(-1, (-1, 8)).transpose(1, 2)
                   for w, b in zip(weights, biases, strict=True))
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    return function, *(t.to(dtype) for t in (x, cos, sin, whole(-9, 9, 32), *weights))


def launched(function: Any, *inputs: Tensor, prepare: Any = fuse, **options: Any) -> tuple[Any, CompiledGraph]:
    got, (compiled,) = run(function, *inputs, prepare=prepare, **options)
    assert compiled.fallbacks == []
    return got, compiled


@pytest.mark.rotate(one_in=3)
@pytest.mark.parametrize("dtype", [torch.float32, bf16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [(1, 1), (1, 5), (2, 3), (2, 40)], ids=str)
@pytest.mark.parametrize("name", ROTATIONS)
def test_queries_and_keys_are_rotated_by_the_kernel_that_makes_them(
    name: str, rows: tuple[int, int], dtype: torch.dtype
) -> None:
    """The very bits of eager: the product is rounded before it is rotated, with grouped heads and a bias."""
    function, *inputs = rotated(*ROTATIONS[name], rows, dtype)
    got, compiled = launched(function, *inputs)
    assert compiled.launches == 1
    for mine, want in zip(got, function(*inputs), strict=True):
        assert mine.equal(want) and mine.stride() == want.stride()


@pytest.mark.parametrize("rows", [(1, 1), (1, 33)], ids=str)
def test_no_column_of_a_weight_is_read_twice(rows: tuple[int, int]) -> None:
    function, *inputs = rotated(*ROTATIONS["halves"], rows, bf16)
    _, compiled = launched(function, *inputs)
    weights = [f"in{place}" for place, text in enumerate(compiled.source.split("# in")[1:]) if ", 20]" in text[:40]]
    read = [line for line in compiled.source.splitlines() if any(f"tl.load({name} +" in line for name in weights[1:])]
    programs = next(iter(compiled.kernels.values())).grid
    assert len(read) == 2 + 2 + 1  # of queries and keys two folds, each of half of the columns
    assert "cdiv(16, " in programs and "cdiv(8, " in programs and "cdiv(32, " not in programs


def test_a_norm_is_the_prologue_of_rotated_products() -> None:
    function, x, *others = rotated(*ROTATIONS["halves"], (1, 3), torch.float32)
    scale = torch.randn(20)

    def normed(x: Tensor, scale: Tensor, *others: Tensor) -> Any:
        return function(rms_norm(x, scale), *others)

    got, compiled = launched(normed, x, scale, *others)
    torch.testing.assert_close(got, normed(x, scale, *others), rtol=1e-4, atol=1e-3)
    assert compiled.launches == 1


def test_what_is_computed_after_the_rotation_is_in_the_kernel_too() -> None:
    rotate = ROTATIONS["halves"][0]
    function, *inputs = rotated(lambda x, cos, sin: rotate(x, cos, sin).relu() * 2, 8, (2, 3), torch.float32)
    got, compiled = launched(function, *inputs)
    torch.testing.assert_close(got, function(*inputs), rtol=1e-5, atol=1e-4)
    assert compiled.launches == 1


def test_a_product_may_be_read_besides() -> None:
    def function(x: Tensor, w: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        y = F.linear(x, w)
        return ops.rope(y.unflatten(-1, (-1, 8)).transpose(1, 2), cos, sin), y

    inputs = torch.randn(2, 3, 20), torch.randn(32, 20), torch.randn(3, 8), torch.randn(3, 8)
    got, compiled = launched(function, *inputs)
    torch.testing.assert_close(got, function(*inputs), rtol=1e-4, atol=1e-4)
    assert compiled.launches == 1


@pytest.mark.parametrize(("rows", "depth"), [(1, 65536), (40, 8192)])
def test_steps_along_k_are_dealt_out_with_folds(rows: int, depth: int) -> None:
    """Few tiles and a long walk: a second kernel adds the sums of each fold up and rotates them."""
    def function(x: Tensor, w: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return ops.rope(F.linear(x, w).unflatten(-1, (-1, 16)).transpose(1, 2), cos, sin)

    inputs = whole(-3, 3, 1, rows, depth), whole(-3, 3, 32, depth), torch.randn(rows, 16), torch.randn(rows, 16)
    got, compiled = launched(function, *inputs)
    assert [kernel.kind for kernel in compiled.kernels.values()] == ["linear_parts", "linear_merge"]
    assert got.equal(function(*inputs))


@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("scheme", ["int8", "int4-g32"])
def test_products_of_quantised_weights_are_rotated(scheme: str, rows: int) -> None:
    parts = [part for heads in (4, 2, 2) for part in schemes.named(scheme).pack(torch.randn(heads * 8, 64) / 8)]

    def function(x: Tensor, cos: Tensor, sin: Tensor, *parts: Tensor) -> Any:
        made = operations.parallel_quantized_linear(x, list(parts), [None] * 3, scheme)
        q, k, v = (y.unflatten(-1, (-1, 8)).transpose(1, 2) for y in made)
        return ops.rope(q, cos, sin), ops.rope(k, cos, sin), v

    inputs = torch.randn(1, rows, 64), torch.randn(rows, 8), torch.randn(rows, 8), *parts
    got, compiled = launched(function, *inputs)
    torch.testing.assert_close(got, function(*inputs), rtol=1e-4, atol=1e-4)
    assert compiled.launches == 1


def test_the_number_of_rows_is_not_specialised() -> None:
    function, *inputs = rotated(*ROTATIONS["pairs"], (2, 7), torch.float32)
    got, compiled = launched(function, *inputs, dynamic=True)
    assert "n0" in compiled.source.split("def kernel_0")[1][:400]
    for mine, want in zip(got, function(*inputs), strict=True):
        assert mine.equal(want)


@settings(max_examples=12, deadline=None)
@given(st.integers(1, 5), st.sampled_from([2, 4, 6, 16, 20]), st.booleans(), st.integers(1, 2), st.integers(1, 18))
def test_any_rotation_gives_eagers_bits(heads: int, size: int, interleaved: bool, batch: int, rows: int) -> None:
    x, w = whole(-9, 9, batch, rows, 12).to(bf16), whole(-9, 9, heads * size, 12).to(bf16)
    cos, sin = torch.randn(rows, size).to(bf16), torch.randn(rows, size).to(bf16)

    def function(x: Tensor, w: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        heads_first = F.linear(x, w).unflatten(-1, (heads, size)).transpose(1, 2)
        return ops.rope(heads_first, cos, sin, interleaved)

    got, compiled = launched(function, x, w, cos, sin)
    assert compiled.launches == 1 and got.equal(function(x, w, cos, sin))


def prefilled(function: Any, sizes: Any, dtype: torch.dtype) -> None:
    assert_fit(written(function, *(torch.empty(size, dtype=dtype) for size in sizes)))


def attention_inputs(rotate: Rotate) -> Any:
    def function(x: Tensor, cos: Tensor, sin: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        q, k, v = (F.linear(x, w).unflatten(-1, (-1, 64)).transpose(1, 2) for w in weights)
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    return function


def sizes_of(rows: int, rotated: int) -> list[tuple[int, ...]]:
    return [(1, rows, 1024), (rows, rotated), (rows, rotated), (1024, 1024), (256, 1024), (256, 1024)]


@pytest.mark.parametrize(("name", "rows"), [("halves", 1), ("halves", 256), ("pairs", 256)])
def test_rotated_products_fit(name: str, rows: int) -> None:
    prefilled(attention_inputs(ROTATIONS[name][0]), sizes_of(rows, 64), bf16)


@pytest.mark.rotate(one_in=30)
@pytest.mark.parametrize("dtype", [bf16, torch.float32], ids=str)
@pytest.mark.parametrize("rows", [1, 2, 16, 17, 64, 140, 1000])
@pytest.mark.parametrize(("rotate", "size"), [
    (ROTATIONS["halves"][0], 64), (ROTATIONS["pairs"][0], 64), (leading(32, False), 32), (leading(16, True), 16),
], ids=["halves", "pairs", "halves of a half", "pairs of a part"])  # fmt: skip
def test_all_rotated_products_fit(rotate: Rotate, size: int, rows: int, dtype: torch.dtype) -> None:
    prefilled(attention_inputs(rotate), sizes_of(rows, size), dtype)


