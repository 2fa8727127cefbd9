"""Blocks of paged caches: who shares which, when they are free again, and that a cache reads as its rows."""

from __future__ import annotations

import copy
import gc
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from graphopt import ops
from graphopt.errors import OptionError
from graphopt.options import Options
from graphopt.runtime import kv_paged
from graphopt.runtime.kv_blocks import BLOCK
from graphopt.runtime.kv_paged import PagedCache, pages_of
from tests.kv.forms import PAGED, rows
from tests.kv.test_cache_tensors import CHANGES


def cache_of(given: Tensor) -> PagedCache:
    return PagedCache.of(pages_of(given))


def held(cache: PagedCache) -> int:
    gc.collect()
    return cache.part.pool.blocks_held


@pytest.mark.parametrize("length", [0, 1, 15, 16, 17, 48, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_reads_as_its_rows(length: int, dtype: torch.dtype) -> None:
    given = rows(length, dtype=dtype)
    assert torch.equal(cache_of(given).plain(), given)


@settings(max_examples=25, deadline=None)
@given(start=st.integers(1, 50), counts=st.lists(st.integers(1, 40), max_size=8), batch=st.integers(1, 3))
def test_grown_cache_reads_as_its_rows_and_parts_lie_as_the_meaning_says(
    start: int, counts: list[int], batch: int
) -> None:
    given = rows(start + sum(counts), batch)
    cache: Tensor = given[:, :, :start]
    for count in counts:
        done = cache.shape[2]
        meant = ops.meaning(kv_paged.kv_paged_reserve)(cache[:, :, :], count)
        made = kv_paged.reserve(cache, count)
        shown = torch.ops.graphopt.kv_paged_cache(*meant, done + count)
        assert torch.equal(shown[:, :, :done], given[:, :, :done])
        for part, expected in zip(made, meant, strict=True):
            assert part.shape == expected.shape and part.dtype == expected.dtype
            # The stride of a dimension of size 1 means nothing.
            sizes = zip(part.shape, part.stride(), expected.stride(), strict=True)
            assert all(size < 2 or one == other for size, one, other in sizes) or part.numel() == 0
        cache = PAGED.append(cache, given[:, :, done : done + count])
    if counts:
        assert isinstance(cache, PagedCache) and torch.equal(cache.plain(), given)


def test_equal_sequences_of_a_batch_are_held_once() -> None:
    one = rows(100, batch=1)
    batch = torch.cat([one, one, rows(100, batch=1), one])
    cache = cache_of(batch)
    assert held(cache) == 3 * (100 // BLOCK)  # the last is no neighbour of its copies
    assert torch.equal(cache.plain(), batch)


@pytest.mark.parametrize("value", [0.0, math.nan])
def test_only_equal_bits_are_equal(value: float) -> None:
    batch = torch.zeros(2, 3, BLOCK, 8)
    batch[0, 0, 0, 0], batch[1, 0, 0, 0] = -value, value
    signs = cache_of(batch).plain().signbit()
    assert torch.equal(signs, batch.signbit())


def test_copies_share_blocks_until_they_grow_apart() -> None:
    cache = cache_of(rows(100, batch=1))
    before = held(cache)
    twins = [copy.deepcopy(cache) for _ in range(5)]
    assert held(cache) == before == 6
    news = [rows(20, batch=1) for _ in twins]
    grown = [PAGED.append(twin, new) for twin, new in zip(twins, news, strict=True)]
    assert held(cache) == before + len(twins)
    for twin, new in zip(grown, news, strict=True):
        assert torch.equal(twin.plain(), torch.cat([cache.plain(), new], 2))


def test_blocks_are_free_when_the_last_cache_dies() -> None:
    cache = cache_of(rows(64, batch=1))
    pool = cache.part.pool
    twin = copy.deepcopy(cache)
    del cache
    assert held(twin) == 4
    shorter = twin[..., :32, :]
    del twin
    assert held(shorter) == 2
    capacity = pool.memory.shape[0]
    grown = PAGED.append(shorter, rows(2 * BLOCK, batch=1))  # takes the blocks that are free
    assert pool.memory.shape[0] == capacity and held(grown) == 4


def test_what_happens_along_the_batch_copies_no_block() -> None:
    cache = cache_of(rows(130))
    before = held(cache)
    changed = [change(cache) for change in CHANGES.values()]
    assert held(cache) == before == 2 * (130 // BLOCK) and all(isinstance(one, PagedCache) for one in changed)


def test_sixteen_continuations_hold_one_prompt() -> None:
    """Bytes of keys and values, counted: 16 continuations of 1000 tokens by 32 tokens each."""
    prompt = torch.randn(1, 3, 1000, 64)
    cache: Tensor = cache_of(prompt).repeat_interleave(16, dim=0)
    for _ in range(32):
        cache = PAGED.append(cache, torch.randn(16, 3, 1, 64))
    exact = 16 * (prompt.nbytes // 1000) * 1032  # what DynamicCache holds
    needed = (prompt.nbytes // 1000) * (1000 + 16 * 32)
    gc.collect()
    assert isinstance(cache, PagedCache)
    assert cache.nbytes < 0.16 * exact and cache.nbytes < 1.5 * needed


@pytest.mark.parametrize("wrong", ["pages", "PAGED", 1, True])
def test_wrong_values_are_refused(wrong: object) -> None:
    with pytest.raises(OptionError, match="kv_cache.*'paged'"):
        Options.parse(None, {"kv_cache": wrong})


@pytest.mark.parametrize(("other", "value"), [("kv_dtype", "int8"), ("kv_capacity", 100)])
def test_what_does_not_go_together_is_refused(other: str, value: object) -> None:
    with pytest.raises(OptionError, match=f"{other}.*kv_cache"):
        Options.parse(None, {"kv_cache": "paged", other: value})
