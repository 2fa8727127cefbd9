"""Products and look-ups of quantised weights in generated kernels, under the interpreter, against their meaning."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx import GraphModule

from graphopt.backends.triton.compile import CompiledGraph
from graphopt.passes.fuse.form_regions import form_regions
from graphopt.quantization import elementwise, operations, schemes
from tests.backends.graphs import run
from tests.backends.test_triton_rows import rms_norm

bf16 = torch.bfloat16
DTYPES = (torch.float32, bf16, torch.float16)
WEIGHT_ONLY = ("int8", "int8-g64", "int4-g32", "int4-g64-sym", "nf4-g64", "mxfp4", "q4_k", "fp8")
MAIN = (*WEIGHT_ONLY, "int8-dynamic", "fp8-dynamic")
OTHERS = tuple(name for name in schemes._by_name() if name not in MAIN)
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, bf16: 2e-2}


def packed(scheme: str, rows: int, columns: int) -> list[Tensor]:
    """A packed weight whose products with rows of unit variance have unit variance."""
    return schemes.named(scheme).pack(torch.randn(rows, columns) / columns**0.5)


def through_kernels(function: Callable[..., Any], *inputs: Any) -> tuple[Any, CompiledGraph]:
    got, (compiled,) = run(function, *inputs, prepare=form_regions)
    assert compiled.fallbacks == []
    return got, compiled


def assert_near(got: Tensor, want: Tensor, exact: Tensor) -> None:
    """As near to the exact answer as the meaning's own, but for a little."""
    tolerance = TOLERANCE[got.dtype] * exact.abs().max().clamp(min=1)
    assert (got.double() - exact).abs().max() <= (want.double() - exact).abs().max() + tolerance
    torch.testing.assert_close(got, want, rtol=2 * TOLERANCE[got.dtype], atol=2 * float(tolerance))


def check_product(scheme: str, dtype: torch.dtype, rows: int, columns: int, depth: int) -> CompiledGraph:
    """A product with bias, activation and residual: one kernel, with more rows of a dynamic scheme two."""
    parts = packed(scheme, columns, depth)
    x, bias, more = (torch.randn(size).to(dtype) for size in ((rows, depth), (columns,), (rows, columns)))

    def function(x: Tensor, bias: Tensor, more: Tensor, *parts: Tensor) -> Tensor:
        return F.silu(operations.quantized_linear(x, list(parts), bias, scheme)) + more

    got, compiled = through_kernels(function, x, bias, more, *parts)
    if sum(part.nbytes for part in parts) < columns * depth * dtype.itemsize:  # else it is unpacked once
        assert compiled.launches == (2 if rows > 16 and "dynamic" in scheme else 1)
    want = function(x, bias, more, *parts)
    weight = schemes.named(scheme).unpack(parts, depth).double()
    if "dynamic" in scheme:
        assert_near(got, want, want.double())
    else:
        assert_near(got, want, F.silu(F.linear(x.double(), weight, bias.double())) + more.double())
    return compiled


@pytest.mark.rotate(one_in=4)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 3, 16, 40])
@pytest.mark.parametrize("scheme", MAIN)
def test_a_product_is_one_kernel(scheme: str, rows: int, dtype: torch.dtype) -> None:
    check_product(scheme, dtype, rows, columns=21, depth=300)


@pytest.mark.rotate(one_in=4)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 3, 16, 40])
@pytest.mark.parametrize("scheme", OTHERS)
def test_a_product_in_any_group_size_is_one_kernel(scheme: str, rows: int, dtype: torch.dtype) -> None:
    check_product(scheme, dtype, rows, columns=21, depth=300)


@settings(max_examples=12, deadline=None)
@given(st.sampled_from(list(schemes._by_name())), st.integers(1, 20), st.integers(1, 70), st.integers(1, 530))
def test_any_sizes_agree(scheme: str, rows: int, columns: int, depth: int) -> None:
    check_product(scheme, torch.float32, rows, columns, depth)


@pytest.mark.parametrize("scheme", schemes._by_name())
def test_weights_in_elementwise_operators_are_those_of_their_packs(scheme: str) -> None:
    how = schemes.named(scheme)
    for depth in (31, 32, 100, 256, 300):
        weight = torch.randn(7, depth)
        weight[0], weight[1], weight[2, -1] = 0, weight[1] * 1e-30, float("nan")
        parts = how.pack(weight)
        want = how.unpack(parts, depth)
        if how.group:
            got = elementwise.weight(how, parts, depth)
        else:
            got = elementwise.codes(elementwise.whole_bytes(parts[0]), torch.float32) * parts[1][:, None]
        assert torch.equal(got.nan_to_num(nan=7e7), want.nan_to_num(nan=7e7))


def test_every_code_and_scale_of_a_byte_is_taken_apart_rightly() -> None:
    every = torch.arange(256, dtype=torch.uint8)
    fp8 = every.view(torch.float8_e4m3fn)
    for dtype in DTYPES:
        torch.testing.assert_close(elementwise.codes(every, dtype), fp8.to(dtype), rtol=0, atol=0, equal_nan=True)
    mxfp4 = schemes.named("mxfp4")
    parts = [(every[:16] * 17).repeat(256, 1), every[:, None]]
    torch.testing.assert_close(elementwise.weight(mxfp4, parts, 32), mxfp4.unpack(parts, 32), rtol=0, atol=0,
                               equal_nan=True)
    finite = fp8.float().nan_to_num()
    halfway = torch.cat([(finite[:126] + finite[1:127]) / 2, finite, torch.randn(10_000), torch.randn(10_000) * 0.01])
    assert elementwise._to_e4m3(halfway).equal(halfway.to(torch.float8_e4m3fn).float())


@pytest.mark.rotate(one_in=3)
@pytest.mark.parametrize("dtype", [torch.float32, bf16], ids=str)
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("scheme", ["int8", "int8-g64", "int4-g32", "q4_k", "int8-dynamic", "fp8-dynamic"])
def test_with_few_rows_a_norm_is_the_prologue(scheme: str, rows: int, dtype: torch.dtype) -> None:
    x, scale = torch.randn(rows, 300).to(dtype), torch.randn(300).to(dtype)

    def function(x: Tensor, scale: Tensor, *parts: Tensor) -> Tensor:
        return operations.quantized_linear(rms_norm(x, scale), list(parts), None, scheme)

    parts = packed(scheme, 24, 300)
    got, compiled = through_kernels(function, x, scale, *parts)
    want = function(x, scale, *parts)
    # A norm that rounds another way may round to another code.
    step = 0.02 if "dynamic" in scheme else 2 * TOLERANCE[dtype]
    torch.testing.assert_close(got, want, rtol=step, atol=step * 4)
    assert compiled.launches == 1


@pytest.mark.parametrize("scheme", ["int8-dynamic", "fp8-dynamic"])
def test_with_many_rows_the_kernel_of_a_norm_rounds_them(scheme: str) -> None:
    """What it stores are codes and a scale for each row; the norm's own result is not stored, nor read again."""
    x, scale, parts = torch.randn(40, 300), torch.randn(300), packed(scheme, 24, 300)

    def function(x: Tensor, scale: Tensor, *parts: Tensor) -> Tensor:
        return operations.quantized_linear(rms_norm(x, scale), list(parts), None, scheme)

    got, compiled = through_kernels(function, x, scale, *parts)
    torch.testing.assert_close(got, function(x, scale, *parts), rtol=0.02, atol=0.08)
    assert [kernel.kind for kernel in compiled.kernels.values()] == ["rows", "linear"]


@pytest.mark.rotate(one_in=3)
@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize("scheme", ["int8", "int4-g32", "nf4-g64", "int8-dynamic"])
def test_parallel_weights_are_one_launch(scheme: str, rows: int) -> None:
    """Query, key and value are sections; a gate and its partner are summed side by side."""
    x, sizes = torch.randn(rows, 100), (40, 16, 16)
    parts = [part for size in sizes for part in packed(scheme, size, 100)]

    def apart(x: Tensor, *parts: Tensor) -> list[Tensor]:
        made: list[Tensor] = operations.parallel_quantized_linear(x, list(parts), [None] * 3, scheme)
        return made

    def gated(x: Tensor, *parts: Tensor) -> Tensor:
        gate, up = operations.parallel_quantized_linear(x, list(parts), [None] * 2, scheme)
        return F.silu(gate) * up

    more = int(rows > 16 and "dynamic" in scheme)
    for function, own in ((apart, parts), (gated, parts[-2 * schemes.named(scheme).parts :])):
        got, compiled = through_kernels(function, x, *own)
        torch.testing.assert_close(got, function(x, *own), rtol=1e-4, atol=1e-4)
        assert compiled.launches == 1 + more


@pytest.mark.rotate(one_in=2)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scheme", MAIN)
def test_a_look_up_is_one_kernel(scheme: str, dtype: torch.dtype) -> None:
    parts, indices = packed(scheme, 30, 100), torch.randint(0, 30, (2, 5))

    def function(indices: Tensor, *parts: Tensor) -> Tensor:
        found: Tensor = operations.quantized_embedding(indices, list(parts), 100, dtype, scheme)
        return found

    got, compiled = through_kernels(function, indices, *parts)
    assert got.equal(function(indices, *parts)) and compiled.launches == 1


def test_a_byte_is_loaded_once_and_a_scale_once_for_a_run() -> None:
    source = check_product("int4-g32", bf16, 1, 64, 4096).source
    assert source.count("tl.load(in0") == source.count("tl.load(in1") == source.count("tl.load(in2") == 1
    codes, scale = (next(line for line in source.splitlines() if f"tl.load({name}" in line) for name in ("in0", "in1"))
    assert "k_0_within" in codes and "k_0_within" not in scale


def test_a_weight_that_is_cast_or_unpacked_is_never_stored() -> None:
    """Not of quantised weights alone: whatever takes fewer bytes than the operand that is made of it."""
    x, w = torch.randn(3, 64), torch.randn(48, 64).to(bf16)
    got, compiled = through_kernels(lambda x, w: torch.ops.graphopt.linear(x, w.float()), x, w)
    torch.testing.assert_close(got, F.linear(x, w.float()), rtol=1e-4, atol=1e-4)
    assert compiled.launches == 1


def test_an_operand_that_takes_no_more_bytes_is_stored_once() -> None:
    x, w = torch.randn(40, 64), torch.randn(48, 64)
    _, compiled = through_kernels(lambda x, w: torch.ops.graphopt.linear(x, w * 2), x, w)
    assert compiled.launches == 2


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("scheme", ["fp8", "int8-g64", "int4-g32"])
def test_a_weight_row_is_not_read_beyond_its_end(scheme: str, rows: int) -> None:
    weight = torch.randn(5, 300)
    weight[1::2] = float("nan")
    parts, x = schemes.named(scheme).pack(weight), torch.randn(rows, 300)
    if scheme == "fp8":
        parts[0].view(torch.uint8)[1::2] = 127

    def function(x: Tensor, *parts: Tensor) -> Tensor:
        found: Tensor = operations.quantized_linear(x, list(parts), None, scheme)
        return found

    got, _ = through_kernels(function, x, *parts)
    assert got.isfinite().all(0).tolist() == [True, False, True, False, True]


def test_the_cost_of_a_region_counts_packed_bytes() -> None:
    from graphopt import cost

    counted = []

    def prepare(graph_module: GraphModule) -> None:
        form_regions(graph_module)
        counted.append(int(cost.graph_cost(graph_module).bytes))

    x, parts = torch.randn(1, 1024).to(bf16), packed("int4-g32", 512, 1024)
    run(lambda x, *parts: operations.quantized_linear(x, list(parts), None, "int4-g32"), x, *parts, prepare=prepare)
    assert counted == [sum(part.nbytes for part in parts) + x.nbytes + 512 * 2]
