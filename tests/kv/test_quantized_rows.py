"""Rows of quantised KV caches: their error, their memory, and that a cache reads as the rows it stands for."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable

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

ERRORS = {"int8": 0.5 / 127, "fp8": 2**-4, "int4": 0.5 / 15}
KINDS = pytest.mark.parametrize("kind", layout.KINDS)
PARTS = pytest.mark.parametrize("keys", [True, False], ids=["keys", "values"])


def rows(length: int, size: int = 16, batch: int = 2) -> Tensor:
    made = torch.randn(batch, 3, length, size)
    made[..., 1] *= 20  # a channel that is large for all tokens
    return made


def append(cache: Tensor, new: Tensor, kind: str, keys: bool) -> Tensor:
    """What a compiled graph does: it writes the new rows where torch's version counters do not see it."""
    codes, params, room = kv_quantized.reserve(cache, new.shape[2], kind, keys)
    room.data[:, :, layout.TAIL :] = new
    return kv_quantized.returned(codes, params, room, cache.shape[2] + new.shape[2], kind, keys)


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
        cache = append(cache, given[:, :, done : done + count], kind, keys)
    if counts:
        assert torch.equal(cache.plain(), cache_of(given, kind, keys).plain())
        assert torch.equal(cache.plain(), torch.ops.graphopt.kv_quantize(given, kind, keys))


@KINDS
@PARTS
@pytest.mark.parametrize("length", [150, 145, 120, 30, 1])
def test_cropped_cache_reads_as_before_and_grows(kind: str, keys: bool, length: int) -> None:
    given = rows(160)
    cache = cache_of(given, kind, keys)
    kept = cache.plain()
    cropped = cache[..., :length, :]
    assert isinstance(cropped, QuantizedCache) and torch.equal(cropped.plain(), kept[:, :, :length])
    new = rows(1)
    grown = append(cropped, new, kind, keys)
    assert torch.equal(grown.plain()[:, :, :length], kept[:, :, :length])
    assert torch.equal(grown.plain()[:, :, length:], new)
    assert torch.equal(cache.plain(), kept)


def test_forks_share_codes_and_stay_apart() -> None:
    cache = cache_of(rows(200), "int8", True)
    kept, twins = cache.plain(), []
    for _ in range(2):
        new, twin = rows(60), cache
        for index in range(60):
            twin = append(twin, new[:, :, index : index + 1], "int8", True)
        twins.append((twin, torch.cat([kept, new], 2)))
    assert torch.equal(cache.plain(), kept)
    for twin, expected in twins:
        assert torch.equal(twin.plain()[:, :, :160], expected[:, :, :160])
        torch.testing.assert_close(twin.plain(), expected, rtol=0.02, atol=0.5)


@pytest.mark.parametrize(
    "change",
    [
        lambda cache: cache.index_select(0, torch.tensor([1, 0, 1])),
        lambda cache: cache.repeat_interleave(2, dim=0),
        lambda cache: cache[torch.tensor([1]), ...],
        lambda cache: cache.clone(),
        copy.deepcopy,
    ],
    ids="reorder repeat select clone deepcopy".split(),
)
def test_what_caches_do_keeps_them_quantised(change: Callable[[Tensor], Tensor]) -> None:
    cache = cache_of(rows(130), "int4", False)
    changed = change(cache)
    assert isinstance(changed, QuantizedCache) and torch.equal(changed.plain(), change(cache.plain()))
    new = rows(1, batch=changed.shape[0])
    assert torch.equal(append(changed, new, "int4", False).plain()[:, :, 130:], new)


def test_other_operations_see_a_plain_tensor() -> None:
    cache = cache_of(rows(100), "int8", True)
    plain = cache.plain()
    for operation in (
        lambda x: x * 2,
        lambda x: x[0],
        lambda x: torch.cat([x, x], 2),
        lambda x: x[:, :, -3:],
        torch.sum,
    ):
        assert type(operation(cache)) is Tensor and torch.equal(operation(cache), operation(plain))
    assert cache.shape == plain.shape and cache.dtype == plain.dtype and len(cache) == len(plain)
    assert (
        repr(plain)[7:40] in repr(cache) and cache.tolist() == plain.tolist() and (cache.numpy() == plain.numpy()).all()
    )


def test_saved_as_a_plain_tensor() -> None:
    cache, file = cache_of(rows(100), "int8", True), io.BytesIO()
    torch.save({"keys": cache}, file)
    file.seek(0)
    loaded = torch.load(file)["keys"]
    assert type(loaded) is Tensor and torch.equal(loaded, cache.plain())


@pytest.mark.parametrize(
    "write",
    [
        lambda cache: cache.zero_(),
        lambda cache: cache.__setitem__(0, 1.0),
        lambda cache: torch.add(cache.plain(), 1, out=cache),
        lambda cache: cache.data.mul_(2),
        lambda cache: cache.detach().copy_(cache),
    ],
    ids="zero setitem out data detach".split(),
)
def test_writes_are_refused(write: Callable[[Tensor], object]) -> None:
    cache = cache_of(rows(100), "int8", True)
    with pytest.raises(TypeError, match="quantised KV cache.*plain"):
        write(cache)


@pytest.mark.parametrize(("kind", "share"), [("int8", 0.55), ("fp8", 0.55), ("int4", 0.35)])
def test_memory(kind: str, share: float) -> None:
    """Against a bfloat16 cache of just its rows, after growing token by token."""
    length = 4096
    for keys in (True, False):
        given = torch.randn(1, 1, length, 64, dtype=torch.bfloat16)
        cache: Tensor = given[:, :, :3000]
        for index in range(3000, length):
            cache = append(cache, given[:, :, index : index + 1], kind, keys)
        assert cache.nbytes <= share * given.nbytes


@pytest.mark.parametrize("wrong", ["int3", "INT8", 8, True])
def test_wrong_kinds_are_refused(wrong: object) -> None:
    with pytest.raises(OptionError, match="kv_dtype.*'int8', 'fp8', 'int4'"):
        Options.parse(None, {"kv_dtype": wrong})


def test_fixed_capacity_is_refused() -> None:
    with pytest.raises(OptionError, match="kv_capacity.*kv_dtype"):
        Options.parse(None, {"kv_dtype": "int8", "kv_capacity": 100})
