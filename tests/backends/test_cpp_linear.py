"""The compiled linears against their meaning in float64: every instruction set, dtype, odd size and fallback."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from graphopt import _compat
from graphopt.backends.cpp import linear as lowering

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
pytestmark = pytest.mark.usefixtures("cpp_library")
kernels = torch.ops.graphopt_cpp


def check(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Within rounding: one step of the output's dtype, and float32 sums of the products' magnitudes."""
    wide = None if bias is None else bias.double()
    expected = F.linear(x.double(), weight.double(), wide)
    magnitude = F.linear(x.double().abs(), weight.double().abs(), None if wide is None else wide.abs())
    allowed = torch.finfo(x.dtype).eps * expected.abs() + 2e-6 * magnitude + torch.finfo(x.dtype).smallest_normal
    assert out.dtype == x.dtype and out.shape == expected.shape and out.is_contiguous()
    assert ((out.double() - expected).abs() <= allowed).all(), (out.double() - expected).abs().max()


def operands(m: int, n: int, k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype), torch.randn(n).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", (1, 3, 17, 31, 32, 33, 100, 576))
def test_every_size_of_a_row(isa: str, dtype: torch.dtype, k: int) -> None:
    for m in (1, 2, 3, 5, 16):
        for n in (1, 2, 5, 16, 33):
            x, weight, bias = operands(m, n, k, dtype)
            check(kernels.linear(x, weight, bias), x, weight, bias)
            check(kernels.linear(x, weight, None), x, weight, None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", (1, 4, 16, 17, 33, 100))
def test_shared_out_among_threads(isa: str, threads: int, dtype: torch.dtype, m: int) -> None:
    x, weight, bias = operands(m, 531, 300, dtype)
    check(kernels.linear(x, weight, bias), x, weight, bias)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "sizes", ((1, 1, 1), (17, 100, 33), (3, 70, 70000), (70000, 5, 3), (40, 531, 4000), (0, 4, 5), (4, 0, 5))
)
def test_by_way_of_float32(dtype: torch.dtype, sizes: tuple[int, int, int]) -> None:
    """What many rows take where torch multiplies two-byte numbers slowly: in parts, the last of which is short."""
    x, weight, bias = operands(*sizes, dtype)
    check(kernels.wide_linear(x, weight, bias), x, weight, bias)
    check(kernels.wide_linear(x[:, ::2], weight[:, ::2], None), x[:, ::2], weight[:, ::2], None)


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_rows_go_by_way_of_float32_where_torch_is_slow(dtype: torch.dtype) -> None:
    x, weight, bias = operands(200, 40, 64, dtype)
    with torch.profiler.profile() as profile:
        out = kernels.linear(x, weight, bias)
    check(out, x, weight, bias)
    called = {event.name for event in profile.events()}
    if not _compat.multiplies_fast(dtype):
        assert "aten::linear" not in called and "aten::mm" in called
    elif torch.ops.graphopt_cpp.isa() != "amx":
        assert "aten::linear" in called


@pytest.mark.parametrize("count", (3, 5))
def test_pieces_taken_from_other_threads_change_nothing(isa: str, count: int) -> None:
    """More threads than processors: some come late, and others do their work."""
    before = torch.get_num_threads()
    x, weights = torch.randn(1, 300), [torch.randn(n, 300) for n in (16, 1, 2007, 531)]
    try:
        torch.set_num_threads(1)
        alone = kernels.parallel_linear(x, weights, [None] * 4)
        torch.set_num_threads(count)
        for _ in range(20):
            together = kernels.parallel_linear(x, weights, [None] * 4)
            assert all(map(torch.equal, alone, together))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("rows", (17, 32, 48, 200))
@pytest.mark.parametrize("k", (31, 64, 577))
def test_prefill_in_bfloat16(isa: str, rows: int, k: int) -> None:
    for n in (1, 16, 31, 33, 100):
        x, weight, bias = operands(rows, n, k, torch.bfloat16)
        check(kernels.linear(x, weight, bias), x, weight, bias)


def test_prefill_of_more_rows_than_one_panel_holds(isa: str) -> None:
    x, weight, bias = operands(300, 40, 4100, torch.bfloat16)
    check(kernels.linear(x, weight, bias), x, weight, bias)
    x, weight, bias = operands(700, 40, 4100, torch.bfloat16)  # so many that torch does it
    check(kernels.linear(x, weight, bias), x, weight, bias)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", (1, 3, 40))
def test_parallel_linear_equals_its_parts(isa: str, threads: int, dtype: torch.dtype, m: int) -> None:
    x = torch.randn(m, 96).to(dtype)
    weights = [torch.randn(n, 96).to(dtype) for n in (576, 192, 7)]
    biases = [None, torch.randn(192).to(dtype), None]
    outs = kernels.parallel_linear(x, weights, biases)
    assert len(outs) == 3
    for out, weight, bias in zip(outs, weights, biases, strict=True):
        check(out, x, weight, bias)
        assert torch.equal(out, kernels.linear(x, weight, bias))
    assert kernels.parallel_linear(x, [], []) == []


@settings(max_examples=60, deadline=None)
@given(
    m=st.integers(0, 20),
    n=st.integers(0, 70),
    k=st.integers(0, 140),
    dtype=st.sampled_from(DTYPES),
    biased=st.booleans(),
)
def test_any_shape_is_what_torch_gives(m: int, n: int, k: int, dtype: torch.dtype, biased: bool) -> None:
    x, weight, bias = operands(m, n, k, dtype)
    check(kernels.linear(x, weight, bias if biased else None), x, weight, bias if biased else None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", (1, 3, 20))
def test_nan_and_infinity_reach_what_they_touch_and_nothing_else(isa: str, dtype: torch.dtype, m: int) -> None:
    x, weight, _ = operands(m, 40, 45, dtype)
    weight[7, 0] = torch.nan  # lies right behind the odd end of row 6
    weight[11, 44] = torch.inf
    x[m - 1, 3] = -torch.inf
    out, expected = kernels.linear(x, weight, None), F.linear(x.double(), weight.double())
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out.isposinf(), expected.isposinf())
    assert torch.equal(out.isneginf(), expected.isneginf())


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_results_round_to_nearest_even_and_overflow_to_infinity(isa: str, dtype: torch.dtype) -> None:
    values = torch.tensor(
        [1.0, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, 1 + 3 * 2**-11, 3e38, -65519.0, 65520.0, 1e-6, -0.0]
    )
    sums = torch.stack([values.to(dtype), (values - values.to(dtype).float()).to(dtype)], 1)
    weight = torch.ones(1, 2, dtype=dtype)
    out = kernels.linear(sums[:1], sums, None), kernels.linear(sums, weight, None)
    assert torch.equal(out[1].squeeze(1).nan_to_num(), sums.float().sum(1).to(dtype).nan_to_num())
    assert out[0].shape == (1, len(values))


def test_leading_dimensions_and_strides_of_x(isa: str) -> None:
    weight, bias = torch.randn(50, 24), torch.randn(50)
    base = torch.randn(4, 6, 24)
    for x in (
        base[:2, :3],
        base[0, 0],
        base[:, 0],
        base[::2, ::3],
        base[:, :1].expand(4, 3, 24),
        base.mT[:2, :, :6].mT,
    ):
        check(kernels.linear(x, weight, bias), x, weight, bias)
    transposed = torch.randn(24, 5).t()
    check(kernels.linear(transposed, weight, bias), transposed, weight, bias)


def test_rows_of_the_weight_may_be_strided(isa: str) -> None:
    base = torch.randn(64, 48)
    for weight in (base[::2], base[:, 8:40], base[10:11], base[:, :1], base.t(), base[:1].expand(20, 48)):
        x = torch.randn(3, weight.shape[1])
        check(kernels.linear(x, weight, None), x, weight, None)


@pytest.mark.parametrize("dtype", (torch.float64, torch.int64, torch.complex64))
def test_other_dtypes_are_left_to_torch(dtype: torch.dtype) -> None:
    x, weight = torch.ones(2, 3, dtype=dtype), torch.ones(4, 3, dtype=dtype)
    assert torch.equal(kernels.linear(x, weight, None), F.linear(x, weight))


def test_a_wrong_shape_is_torchs_own_error() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        kernels.linear(torch.ones(2, 3), torch.ones(4, 5), None)
    with pytest.raises(RuntimeError, match="2 weights but 1 biases"):
        kernels.parallel_linear(torch.ones(2, 3), [torch.ones(4, 3)] * 2, [None])


def test_autocast_does_not_change_a_fallback() -> None:
    x, weight = torch.randn(40, 8), torch.randn(4, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert kernels.linear(x, weight, None).dtype == torch.float32


def test_fake_tensors_have_the_shapes_of_real_ones() -> None:
    for shape in ((5, 8), (2, 3, 8), (8,)):
        with FakeTensorMode():
            fake = kernels.linear(torch.empty(shape), torch.empty(6, 8), torch.empty(6))
            parts = kernels.parallel_linear(torch.empty(shape), [torch.empty(6, 8), torch.empty(3, 8)], [None, None])
        real = kernels.linear(torch.randn(shape), torch.randn(6, 8), torch.randn(6))
        assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)
        assert [part.shape[-1] for part in parts] == [6, 3]


def test_compiles_with_symbolic_rows() -> None:
    weight = torch.randn(6, 8)
    compiled = torch.compile(lambda x: kernels.linear(x * 2, weight, None) + 1, backend="aot_eager", dynamic=True)
    for rows in (3, 5, 30):
        x = torch.randn(rows, 8)
        torch.testing.assert_close(compiled(x), F.linear(x * 2, weight) + 1)


def test_unknown_instruction_set_is_refused() -> None:
    best = kernels.isa()
    with pytest.raises(RuntimeError, match=f"'sse9' is not one of those loaded: .*{best}"):
        kernels.set_isa("sse9")
    assert kernels.isa() == best


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"x": torch.ones(2, 4).double()}, "dtype float64 is none of float32, bfloat16, float16"),
        ({"weight": torch.ones(3, 4).bfloat16()}, "operands of several dtypes: float32, bfloat16, float32"),
        ({"weight": torch.ones(4, 3).t()}, "the rows of the weight are not contiguous"),
        ({"weight": torch.ones(4)}, "needs x .* got 2 and 1 dimensions"),
        ({"weight": torch.ones(3, 4).to_sparse()}, "a sparse operand"),
        ({"x": torch.ones(2, 4, device="meta")}, "not on the CPU"),
        ({"bias": torch.ones(2)}, "the bias is not one value for each row"),
    ],
)
def test_declined(change: dict[str, Tensor], reason: str) -> None:
    given = {"x": torch.ones(2, 4), "weight": torch.ones(3, 4), "bias": torch.ones(3)}
    assert lowering.unsupported_reason(**given) is None
    said = lowering.unsupported_reason(**(given | change))
    assert said is not None and re.match(reason, said)
