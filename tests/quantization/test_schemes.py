"""Every scheme: its layout, its error bound on random and awkward weights, and what kernels may rely on."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.quantization import codecs, schemes

NAMES = (
    "int8",
    "int8-g32",
    "int4-g32",
    "int4-g64",
    "int4-g128",
    "int4-g32-sym",
    "int4-g128-sym",
    "q4_k",
    "fp8",
    "nf4-g32",
    "nf4-g64",
    "mxfp4",
    "int8-dynamic",
    "fp8-dynamic",
)


def assert_within_bound(scheme: schemes.Scheme, weight: torch.Tensor) -> None:
    if not scheme.can_pack(weight):
        assert torch.float16 in scheme.parameter_dtypes and weight.abs().max() > 5e4
        return
    packed = scheme.pack(weight)
    error = (scheme.unpack(packed, weight.shape[1]) - weight.float()).abs()
    bound = scheme.bound(packed, weight.shape[1])
    # Choosing a code is itself rounded in float32.
    slack = 1e-6 * weight.float().abs() + 1e-37
    assert (error <= bound * (1 + 1e-5) + slack).all(), (scheme.name, (error - bound).max())


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 150),
    seed=st.integers(0, 10_000),
    exponent=st.integers(-20, 20),
    shift=st.sampled_from([0.0, 1.0, -30.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_error_is_within_the_schemes_own_bound(
    name: str, rows: int, columns: int, seed: int, exponent: int, shift: float, dtype: torch.dtype
) -> None:
    if dtype == torch.float16:
        exponent //= 4
    generator = torch.Generator().manual_seed(seed)
    weight = ((torch.randn(rows, columns, generator=generator) + shift) * 2.0**exponent).to(dtype)
    assert_within_bound(schemes.named(name), weight)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("columns", [1, 31, 32, 33, 129])
def test_the_layout_is_what_kernels_are_told(name: str, columns: int) -> None:
    scheme = schemes.named(name)
    packed = scheme.pack(torch.randn(3, columns))
    assert [(tuple(part.shape), part.dtype) for part in packed] == scheme.layout(3, columns)
    assert all(part.is_contiguous() for part in packed)
    assert scheme.nbytes(3, columns) == sum(part.numel() * part.element_size() for part in packed)
    assert scheme.parts == len(packed)


@pytest.mark.parametrize("name", NAMES)
def test_zero_rows_stay_zero(name: str) -> None:
    weight = torch.randn(4, 70)
    weight[2] = 0
    scheme = schemes.named(name)
    assert torch.equal(scheme.unpack(scheme.pack(weight), 70)[2], torch.zeros(70))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [1.0, -1.0, 1e-30, 3e30, -0.3])
def test_constant_rows_are_within_the_bound(name: str, value: float) -> None:
    assert_within_bound(schemes.named(name), torch.full((2, 40), value))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite_never_becomes_a_number(name: str, bad: float) -> None:
    weight = torch.randn(3, 64)
    weight[1, 5] = bad
    scheme = schemes.named(name)
    assert not scheme.can_pack(weight)
    unpacked = scheme.unpack(scheme.pack(weight), 64)
    assert not torch.isfinite(unpacked[1, 5])
    assert torch.isfinite(unpacked[[0, 2]]).all()


def test_what_can_be_packed() -> None:
    assert schemes.named("int4-g32").can_pack(torch.tensor([[-59000.0, 59000.0]]))
    assert not schemes.named("int4-g32").can_pack(torch.tensor([[0.0, 61000.0]]))
    assert schemes.named("int8").can_pack(torch.tensor([[1e36]]))
    assert not schemes.named("int8").can_pack(torch.tensor([[2e37]]))


def test_four_bit_codes_lie_as_documented() -> None:
    codes = torch.arange(64, dtype=torch.uint8).remainder(16).reshape(1, 64)
    codes[0, 32:] = codes[0, 32:].flip(0)
    data = codecs.nibbles(codes)
    assert data.shape == (1, 32)
    for j in range(16):
        assert data[0, j] == codes[0, j] | codes[0, 16 + j] << 4
        assert data[0, 16 + j] == codes[0, 32 + j] | codes[0, 48 + j] << 4
    assert torch.equal(codecs.from_nibbles(data), codes)


@settings(max_examples=50, deadline=None)
@given(value=st.floats(-(2.0**15), 2.0**15, width=32))
def test_float16_is_rounded_to_the_named_side(value: float) -> None:
    given_ = torch.tensor([value], dtype=torch.float32)
    near = given_.half().float()
    below = codecs.half_down(given_)
    assert below.float() <= given_
    assert torch.isfinite(below) and (below.float() == near or near > given_)
    above = codecs.half_up(given_.abs())
    assert above.float() >= given_.abs() and torch.isfinite(above)


def test_e2m1_is_the_table_of_the_standard() -> None:
    values = torch.tensor([0.0, 0.5, -1.0, 1.5, 2.0, -3.0, 4.0, 6.0]).repeat(4)[None]
    scheme = schemes.named("mxfp4")
    packed = scheme.pack(values)
    assert packed[1].item() == 127
    assert torch.equal(scheme.unpack(packed, 32), values)


def test_groups_of_q4_k_share_units() -> None:
    weight = torch.randn(2, 600)
    weight[:, 256:512] *= 1e3
    packed = schemes.named("q4_k").pack(weight)
    assert [tuple(part.shape) for part in packed] == [(2, 304), (2, 19), (2, 19), (2, 3), (2, 3)]
    _, scale, minimum, unit, unit_of_minimums = packed
    assert scale.max() == 63 and minimum.max() == 63
    for units in (unit, unit_of_minimums):
        assert (units[:, 1] > 300 * units[:, ::2].T).all()
    assert schemes.named("q4_k").nbytes(1, 4096) * 8 / 4096 == 4.625


@pytest.mark.parametrize("name", ["int3", "int4", "int4-g16", "int8-g16", "INT8", "", "nf4-g32-sym"])
def test_unknown_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="no quantisation scheme"):
        schemes.named(name)


def test_users_names_get_their_default_group() -> None:
    assert schemes.canonical("int4") == "int4-g32"
    assert schemes.canonical("nf4") == "nf4-g64"
    assert schemes.canonical("int4", 128, True) == "int4-g128-sym"
    assert schemes.canonical("int8-dynamic") == "int8-dynamic"
