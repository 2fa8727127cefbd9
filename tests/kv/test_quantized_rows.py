"""Rows of quantised KV caches: their error, their memory, and that a cache reads as the rows it stands for."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from graphopt import ops, options
from graphopt.errors import OptionError
from graphopt.options import Options
from graphopt.quantization import cache_operations as layout
from graphopt.runtime import kv_quantized
from graphopt.runtime.kv_quantized import QuantizedCache, part_of
from tests.kv.forms import quantized, rows

ERRORS = {"int8": 0.5 / 127, "fp8": 2**-4, "int4": 0.5 / 15}
KINDS = pytest.mark.parametrize("kind", layout.KINDS)
PARTS = pytest.mark.parametrize("keys", [True, False], ids=["keys", "values"])


def cache_of(given: Tensor, kind: str, keys: bool) -> QuantizedCache:
    return QuantizedCache.of(part_of(given, kind, keys))


def test_options_and_layout_name_the_same_kinds() -> None:
    assert options.KV_DTYPES == layout.KINDS


@KINDS
@PARTS
def test_error_is_half_a_step_of_the_group(kind: str, keys: bool) -> None:
    given = rows(layout.GROUP * 3)
    read = layout.dequantize_rows(*layout.quantize_rows(given, kind, keys), kind, keys, given.dtype)
    over = given.unflatten(2, (-1, layout.GROUP)) if keys else given.unsqueeze(3)
    errors = (read - given).reshape(over.shape).abs()
    dims = 3 if keys else 4
    span = over.amax(dims, keepdim=True) - over.amin(dims, keepdim=True)
    largest = span if kind == "int4" else over.abs().amax(dims, keepdim=True)
    assert (errors <= largest * ERRORS[kind] * 1.01 + 1e-6).all()


@PARTS
def test_constant_and_zero_rows(keys: bool) -> None:
    for kind in layout.KINDS:
        for value in (0.0, 3.0):
            given = torch.full((1, 1, layout.GROUP, 8), value)
            read = layout.dequantize_rows(*layout.quantize_rows(given, kind, keys), kind, keys, given.dtype)
            torch.testing.assert_close(read, given, rtol=1e-3, atol=0)


@KINDS
@PARTS
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_becomes_nan_and_stays_in_its_group(kind: str, keys: bool, value: float) -> None:
    given = rows(layout.GROUP * 2)
    given[0, 0, 3, 5] = value
    read = layout.dequantize_rows(*layout.quantize_rows(given, kind, keys), kind, keys, given.dtype)
    assert read[0, 0, 3, 5].isnan()
    assert read[1].isfinite().all() and read[0, :, layout.GROUP :].isfinite().all()


@pytest.mark.parametrize("length", [0, 1, 15, 16, 47, 48, 79, 80, 1000])
def test_recent_rows_are_exact(length: int) -> None:
    given = rows(length)
    packed = layout.packed_rows(length)
    assert packed % layout.GROUP == 0 and length - packed <= layout.TAIL
    assert length - packed >= min(length, layout.RECENT)
    assert torch.equal(cache_of(given, "int4", True).plain()[:, :, packed:], given[:, :, packed:])


@KINDS
@PARTS
@settings(max_examples=15, deadline=None)
@given(
    start=st.integers(1, 100),
    counts=st.lists(st.integers(1, 70), max_size=8),
    dtype=st.sampled_from((torch.float32, torch.bfloat16)),
)
def test_grown_cache_reads_as_one_quantised_at_once(
    kind: str, keys: bool, start: int, counts: list[int], dtype: torch.dtype
) -> None:
    given = rows(start + sum(counts)).to(dtype)
    cache: Tensor = given[:, :, :start]
    for count in counts:
        done = cache.shape[2]
        meant = ops.meaning(layout.kv_quantized_reserve)(cache[:, :, :], count, kind, keys)
        made = kv_quantized.reserve(cache, count, kind, keys)
        assert [(part.shape, part.stride()) for part in made] == [(part.shape, part.stride()) for part in meant]
        cache = quantized(kind, keys).append(cache, given[:, :, done : done + count])
    if counts:
        assert torch.equal(cache.plain(), cache_of(given, kind, keys).plain())
        assert torch.equal(cache.plain(), torch.ops.graphopt.kv_quantize(given, kind, keys))


def test_forks_share_codes_and_stay_apart() -> None:
    cache = cache_of(rows(200), "int8", True)
    kept, twins = cache.plain(), []
    for _ in range(2):
        new, twin = rows(60), cache
        for index in range(60):
            twin = quantized("int8", True).append(twin, new[:, :, index : index + 1])
        twins.append((twin, torch.cat([kept, new], 2)))
    assert torch.equal(cache.plain(), kept)
    for twin, expected in twins:
        assert torch.equal(twin.plain()[:, :, :160], expected[:, :, :160])
        torch.testing.assert_close(twin.plain(), expected, rtol=0.02, atol=0.5)


@pytest.mark.parametrize(("kind", "share"), [("int8", 0.55), ("fp8", 0.55), ("int4", 0.35)])
def test_memory(kind: str, share: float) -> None:
    """Against a bfloat16 cache of just its rows, after growing token by token."""
    length = 4096
    for keys in (True, False):
        given = torch.randn(1, 1, length, 64, dtype=torch.bfloat16)
        cache: Tensor = given[:, :, :3000]
        for index in range(3000, length):
            cache = quantized(kind, keys).append(cache, given[:, :, index : index + 1])
        assert cache.nbytes <= share * given.nbytes


@pytest.mark.parametrize("wrong", ["int3", "INT8", 8, True])
def test_wrong_kinds_are_refused(wrong: object) -> None:
    with pytest.raises(OptionError, match="kv_dtype.*'int8', 'fp8', 'int4'"):
        Options.parse(None, {"kv_dtype": wrong})


def test_fixed_capacity_is_refused() -> None:
    with pytest.raises(OptionError, match="kv_capacity.*kv_dtype"):
        Options.parse(None, {"kv_dtype": "int8", "kv_capacity": 100})
