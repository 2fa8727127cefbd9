"""The compiled linears and look-ups on packed weights against their meaning: every scheme and instruction set."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from graphopt import _compat
from graphopt.backends.cpp import quantized as lowering
from graphopt.quantization import codecs, operations, schemes

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SCHEMES = (
    "int8",
    "int8-g32",
    "int8-g64",
    "int8-g128",
    "int4-g32",
    "int4-g64-sym",
    "int4-g128",
    "q4_k",
    "fp8",
    "nf4-g64",
    "mxfp4",
    "int8-dynamic",
    "fp8-dynamic",
)
pytestmark = pytest.mark.usefixtures("cpp_library")
kernels = torch.ops.graphopt_cpp


def check(
    out: Tensor, x: Tensor, packed: Sequence[Tensor], bias: Tensor | None, scheme: str, *, slack: float = 0.0
) -> None:
    """Within rounding of the product with the very numbers that the codes stand for.

    Of up to 4 rows only the output is rounded to the dtype of x, of more also the weight of schemes with groups.
    """
    how = schemes.named(scheme)
    rows, weight = x.double(), how.unpack(packed, x.shape[-1]).double()
    if how.activations:
        codec = codecs.INT8 if how.activations == "int8" else codecs.FP8
        groups = x.float()[..., None, :]
        parameters = codec[0](groups)
        rows = codec[2](codec[1](groups, parameters), parameters)[..., 0, :].double()
    wide = None if bias is None else bias.double()
    expected = F.linear(rows, weight, wide)
    magnitude = F.linear(rows.abs(), weight.abs(), None if wide is None else wide.abs())
    if scheme.startswith(("int4", "q4_k")):  # offsets meet sums of x: sums of larger numbers than the products
        magnitude = magnitude + rows.abs().sum(-1, keepdim=True) * weight.abs().amax()
    eps = torch.finfo(x.dtype).eps
    many = x.numel() // x.shape[-1] > 4 and x.dtype == torch.bfloat16
    allowed = eps * expected.abs() + (4e-6 + eps * many + slack) * magnitude + torch.finfo(x.dtype).tiny
    assert out.dtype == x.dtype and out.shape == expected.shape and out.is_contiguous()
    error = (out.double() - expected).abs()
    assert (error <= allowed).all(), error.max()


def operands(m: int, n: int, k: int, dtype: torch.dtype, scheme: str) -> tuple[Tensor, list[Tensor], Tensor]:
    packed = schemes.named(scheme).pack(torch.randn(n, k) * 0.1)
    return torch.randn(m, k).to(dtype), packed, torch.randn(n).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_size(isa: str, scheme: str, dtype: torch.dtype) -> None:
    for n, k in ((1, 1), (5, 33), (67, 100), (70, 160), (33, 576)):
        for m in (1, 2, 3, 5, 16, 17, 64):
            x, packed, bias = operands(m, n, k, dtype, scheme)
            check(kernels.quantized_linear(x, packed, bias, scheme), x, packed, bias, scheme)
    check(kernels.quantized_linear(x, packed, None, scheme), x, packed, None, scheme)


@pytest.mark.parametrize("scheme", ("int8", "int4-g32"))
@pytest.mark.parametrize("m", (1, 4, 40))
def test_shared_out_among_threads_and_weights(isa: str, scheme: str, m: int) -> None:
    x = torch.randn(m, 576).bfloat16()
    parts = [operands(1, n, 576, torch.bfloat16, scheme)[1:] for n in (576, 7, 192)]
    packed, biases = [part for pack, _ in parts for part in pack], [parts[0][1], None, parts[2][1]]
    outs = kernels.parallel_quantized_linear(x, packed, biases, scheme)
    for out, (pack, _), bias in zip(outs, parts, biases, strict=True):
        check(out, x, pack, bias, scheme)
        assert torch.equal(out, kernels.quantized_linear(x, pack, bias, scheme))
    assert kernels.parallel_quantized_linear(x, [], [], scheme) == []


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_rows_become_float32_where_torch_is_slow(dtype: torch.dtype) -> None:
    """Those of float16 always: sums of codes exceed it."""
    x, packed, bias = operands(40, 32, 64, dtype, "int8-g64")
    with torch.profiler.profile() as profile:
        out = kernels.quantized_linear(x, packed, bias, "int8-g64")
    check(out, x, packed, bias, "int8-g64")
    widened = dtype == torch.float16 or not _compat.multiplies_fast(dtype)
    assert ("aten::_to_copy" in {event.name for event in profile.events()}) == widened


def test_more_rows_of_weight_than_are_written_out_at_a_time() -> None:
    for scheme in ("int8", "int4-g32", "int8-dynamic"):
        x, packed, bias = operands(40, 6000, 400, torch.bfloat16, scheme)
        check(kernels.quantized_linear(x, packed, bias, scheme), x, packed, bias, scheme)


@settings(max_examples=60, deadline=None)
@given(
    m=st.integers(0, 40),
    n=st.integers(1, 70),
    k=st.integers(1, 300),
    dtype=st.sampled_from(DTYPES),
    scheme=st.sampled_from(SCHEMES),
    biased=st.booleans(),
)
def test_any_shape(m: int, n: int, k: int, dtype: torch.dtype, scheme: str, biased: bool) -> None:
    x, packed, bias = operands(m, n, k, dtype, scheme)
    given_bias = bias if biased else None
    check(kernels.quantized_linear(x, packed, given_bias, scheme), x, packed, given_bias, scheme)


@pytest.mark.parametrize("scheme", ("int8", "int8-g32", "int8-g64", "int8-g128"))
@pytest.mark.parametrize("columns", (40, 96, 576))
def test_rows_of_every_range(isa: str, scheme: str, columns: int) -> None:
    # Where elements differ by many powers of two fixed point is not for them: half a unit of bf16 may be lost, no more.
    spread = torch.randn(1, columns) * 10.0 ** torch.linspace(-30, 30, columns)
    plain = torch.randn(1, columns)
    hill, alone, lowest = plain.clone(), torch.zeros(1, columns), plain * 1e-38
    hill[0, 3], alone[0, -1] = 2e3, 7
    packed = schemes.named(scheme).pack(torch.randn(70, columns) * 0.1)
    packed[0][:, 3] = 0  # the hill meets nothing: all else must be there still
    for row in (hill, hill * 1e6, spread, alone, lowest, plain * 1e30, torch.zeros(1, columns), torch.ones(1, columns)):
        x = torch.cat([plain, row]).bfloat16()
        slack = torch.finfo(torch.bfloat16).eps / 4
        out = kernels.quantized_linear(x, packed, None, scheme)
        check(out[:1], x[:1], packed, None, scheme)
        check(out[1:], x[1:], packed, None, scheme, slack=slack)
        check(kernels.quantized_linear(x[1:], packed, None, scheme), x[1:], packed, None, scheme, slack=slack)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("m", (1, 3, 40))
def test_what_is_not_finite_reaches_what_it_touches_and_nothing_else(isa: str, scheme: str, m: int) -> None:
    weight = torch.randn(40, 200)
    weight[7, 0], weight[11, 199] = torch.nan, torch.inf
    packed = schemes.named(scheme).pack(weight)
    x = torch.randn(m, 200).bfloat16()
    bad = torch.zeros(m, 40, dtype=torch.bool)
    bad[:, [7, 11]] = True
    out = kernels.quantized_linear(x, packed, None, scheme)
    assert torch.equal(~out.isfinite(), bad) and torch.equal(out.isnan(), bad)
    x[m - 1, 3] = -torch.inf
    bad[m - 1] = True
    assert torch.equal(~kernels.quantized_linear(x, packed, None, scheme).isfinite(), bad)
    x[m - 1, 3] = torch.nan
    assert torch.equal(kernels.quantized_linear(x, packed, None, scheme).isnan(), bad)


def test_zeros_and_the_ends_of_the_scale(isa: str) -> None:
    for scheme in SCHEMES:
        for weight in (torch.zeros(3, 70), torch.full((3, 70), -7.0), torch.full((3, 70), 1e-30)):
            packed = schemes.named(scheme).pack(weight)
            for x in (torch.zeros(2, 70), torch.ones(2, 70)):
                check(kernels.quantized_linear(x, packed, None, scheme), x, packed, None, scheme)


def test_every_code(isa: str) -> None:
    for scheme in SCHEMES:
        how = schemes.named(scheme)
        (_, dtype), *rest = how.layout(32, 256)
        codes = torch.arange(256, dtype=torch.uint8).repeat(32 * how.bits // 8 + 1)[: 32 * 256 * how.bits // 8]
        if dtype == torch.int8:
            codes = codes.clamp(max=254) - 127
        elif dtype == torch.float8_e4m3fn:
            codes = torch.where(codes & 127 == 127, 0, codes)
        packed = [codes.view(dtype).reshape(32, -1)]
        packed += [torch.full(shape, 127 if kind == torch.uint8 else 0.5, dtype=kind) for shape, kind in rest]
        for dtype_of_x in (torch.float32, torch.bfloat16):
            x = torch.eye(256).to(dtype_of_x)
            for rows in (x[:1], x[5:7], x[:16], x):
                if how.activations != "fp8":
                    check(kernels.quantized_linear(rows, packed, None, scheme), rows, packed, None, scheme)


def test_leading_dimensions_and_strides_of_x(isa: str) -> None:
    _, packed, bias = operands(1, 50, 24, torch.float32, "int8-g32")
    base = torch.randn(4, 6, 24)
    for x in (
        base[:2, :3],
        base[0, 0],
        base[:, 0],
        base[::2, ::3],
        base[:, :1].expand(4, 3, 24),
        base.mT[:2, :, :6].mT,
    ):
        check(kernels.quantized_linear(x, packed, bias, "int8-g32"), x, packed, bias, "int8-g32")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_look_ups(isa: str, scheme: str) -> None:
    for columns in (1, 40, 96, 200):
        packed = schemes.named(scheme).pack(torch.randn(20, columns))
        for indices in (
            torch.tensor([[3, 0], [19, 3]]),
            torch.tensor(7, dtype=torch.int32),
            torch.zeros(0, dtype=torch.long),
        ):
            for dtype in DTYPES:
                out = kernels.quantized_embedding(indices, packed, columns, dtype, scheme)
                expected = operations.quantized_embedding(indices, packed, columns, dtype, scheme)
                torch.testing.assert_close(out, expected, rtol=1e-6 if dtype == torch.float32 else 8e-3, atol=1e-6)


def test_look_ups_out_of_range_are_index_errors() -> None:
    packed = schemes.named("int8").pack(torch.randn(20, 8))
    for index in (20, -1):
        with pytest.raises(IndexError, match=f"index {index} is out of range of a table of 20 rows"):
            kernels.quantized_embedding(torch.tensor([1, index]), packed, 8, torch.float32, "int8")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scheme": "int3"}, "no quantisation scheme 'int3'"),
        ({"scheme": "int4"}, "no quantisation scheme 'int4'"),
        ({"scheme": "int8-g32-dynamic"}, "no quantisation scheme"),
        ({"scheme": "q4_k-g32"}, "no quantisation scheme"),
        ({"scheme": "mxfp4-g32"}, "no quantisation scheme"),
        ({"x": torch.ones(2, 65)}, "packed codes of 65 columns must have 96 bytes in each row"),
        ({"x": torch.ones(2, 64).double()}, "dense floating-point tensor"),
        ({"bias": torch.ones(4)}, "the bias must be 3 contiguous values"),
        ({"bias": torch.ones(3).double()}, "the bias must be 3 contiguous values"),
        ({"packed": [torch.zeros(3, 64, dtype=torch.int8)]}, "has 2 packed tensors to a weight, got 1"),
        ({"packed": [torch.zeros(3, 64, dtype=torch.int8), torch.zeros(3, 2)]}, "scales and offsets must be"),
        ({"packed": [torch.zeros(3, 64, dtype=torch.int8), torch.zeros(3, 1).half()]}, "scales and offsets must be"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(change: dict[str, object], message: str) -> None:
    given = {"x": torch.ones(2, 64), "packed": schemes.named("int8-g32").pack(torch.ones(3, 64)), "bias": None}
    arguments = given | {"scheme": "int8-g32"} | change
    with pytest.raises(RuntimeError, match=re.escape(message)):
        kernels.quantized_linear(*arguments.values())


def test_units_that_do_not_fit_are_refused() -> None:
    codes, scale, minimum, unit, unit_of_minimums = schemes.named("q4_k").pack(torch.randn(3, 300))
    assert unit.shape == (3, 2)
    for unfit in (unit[:, :1], unit.float(), scale.half()):
        packed = [codes, scale, minimum, unfit.contiguous(), unit_of_minimums]
        with pytest.raises(RuntimeError, match="units must be Half with 2 numbers for each row"):
            kernels.quantized_linear(torch.ones(2, 300), packed, None, "q4_k")


def test_fake_tensors_have_the_shapes_of_real_ones() -> None:
    packed = schemes.named("int4-g32").pack(torch.randn(6, 40))
    for shape in ((5, 40), (2, 3, 40), (40,)):
        with FakeTensorMode(allow_non_fake_inputs=True):
            fake = kernels.quantized_linear(torch.empty(shape), packed, None, "int4-g32")
            rows = kernels.quantized_embedding(torch.zeros(2, 3).long(), packed, 40, torch.bfloat16, "int4-g32")
        real = kernels.quantized_linear(torch.randn(shape), packed, None, "int4-g32")
        assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)
        assert rows.shape == (2, 3, 40) and rows.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"x": torch.ones(2, 64).double()}, "dtype float64 is none of float32, bfloat16, float16"),
        ({"biases": [torch.ones(3).half()]}, "operands of several dtypes: float32, float16"),
        ({"biases": [torch.ones(6)[::2]]}, "a bias is not contiguous"),
        ({"x": torch.ones(())}, "x is a scalar"),
        ({"x": torch.ones(2, 64, device="meta")}, "not on the CPU"),
        ({"packed": [torch.ones(64, 3, dtype=torch.int8).t(), torch.ones(3)]}, "a packed tensor is not contiguous"),
        (
            {"packed": [torch.ones(3, 64, dtype=torch.int8), torch.ones(3).half()]},
            "the packed tensors have other dtypes",
        ),
    ],
)
def test_declined(change: dict[str, object], reason: str) -> None:
    given = {"x": torch.ones(2, 64), "packed": schemes.named("int8").pack(torch.ones(3, 64)), "biases": [None]}
    assert lowering.unsupported_reason(**given, scheme="int8") is None
    said = lowering.unsupported_reason(**(given | change), scheme="int8")
    assert said is not None and re.match(reason, said)
