"""Reserved room for KV caches: whatever a caller does with the caches, each keeps the rows it should have."""

from __future__ import annotations

import copy
import gc
import io
import threading
import warnings
import weakref
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter

import graphopt.errors
from graphopt import counters, ops
from graphopt.runtime import kv

B, H, D = 2, 3, 4


@pytest.fixture(params=["python", "compiled"], autouse=True)
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    """Everything by Python alone, and with the commonest case in C++."""
    if request.param == "compiled":
        request.getfixturevalue("cpp_library")
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "python":
            patch.setattr(kv, "_compiled", [])
        yield request.param


def rows(count: int, dim: int = 2) -> torch.Tensor:
    size = [B, H, D]
    size.insert(dim, count)
    return torch.randn(size)


def append(past: torch.Tensor, new: torch.Tensor, dim: int = 2) -> torch.Tensor:
    """What a compiled graph does: it writes the new rows where torch's version counters do not see it."""
    length, count = past.shape[dim], new.shape[dim]
    grown = kv.reserve(past, count, dim)
    grown.data.narrow(dim, length, count).copy_(new)
    return grown


def start(count: int = 5, dim: int = 2) -> torch.Tensor:
    return append(rows(count, dim), rows(1, dim), dim)


def shares_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


@pytest.mark.parametrize("dim", [0, 1, 2, 3])
def test_reserve_lies_in_memory_as_its_meaning_says(dim: int) -> None:
    past = rows(5, dim)
    meaning, grown = ops.meaning(ops.kv_reserve)(past, 2, dim), kv.reserve(past, 2, dim)
    assert grown.shape == meaning.shape and grown.stride() == meaning.stride()
    assert torch.equal(grown.narrow(dim, 0, 5), past)


def test_allocate_lies_in_memory_as_its_meaning_says() -> None:
    size, kind = [B, H, 7, D], {"dtype": torch.bfloat16, "device": torch.device("cpu")}
    meaning, made = ops.meaning(ops.kv_allocate)(size, 2, **kind), kv.allocate(size, 2, **kind)
    assert (made.shape, made.stride(), made.dtype) == (meaning.shape, meaning.stride(), meaning.dtype)


def test_append_copies_nothing_while_there_is_room() -> None:
    cache = start()
    before = counters["kv_copies"]
    longer = append(cache, rows(1))
    assert shares_memory(cache, longer) and counters["kv_copies"] == before
    assert torch.equal(longer[:, :, :-1], cache)


def test_strides_do_not_change_when_memory_is_exchanged() -> None:
    cache = start()
    strides = cache.stride()
    for _ in range(200):
        cache = append(cache, rows(1))
        assert cache.stride() == strides


def test_copied_bytes_per_row_are_bounded() -> None:
    cache, before = start(1), counters["kv_bytes_copied"]
    for _ in range(3000):
        cache = append(cache, rows(1))
    assert counters["kv_bytes_copied"] - before < 4 * cache.numel() * cache.element_size()


@pytest.mark.parametrize("length", [1, 100, 5000])
def test_room_is_at_most_half_as_much_again(length: int) -> None:
    for _ in range(10):
        cache = kv.reserve(rows(length), 1, 2)
        held = cache.untyped_storage().nbytes() / (B * H * D * 4)
        assert held <= max(1.5 * (length + 1), length + 33)


def test_second_fork_copies() -> None:
    cache = start()
    a, b = rows(1), rows(1)
    first, second = append(cache, a), append(cache, b)
    assert shares_memory(first, cache) and not shares_memory(second, cache)
    assert torch.equal(first, torch.cat([cache, a], 2)) and torch.equal(second, torch.cat([cache, b], 2))


def test_crop_of_the_only_cache_grows_in_place() -> None:
    cache = start()
    cache = append(cache, rows(3))
    kept, address = cache[:, :, :-2].clone(), cache.data_ptr()
    cache = cache[:, :, :-2]
    new = rows(1)
    cache = append(cache, new)
    assert cache.data_ptr() == address and torch.equal(cache, torch.cat([kept, new], 2))


def test_crop_copies_while_the_whole_cache_is_alive() -> None:
    whole = append(start(), rows(3))
    kept = whole.clone()
    cropped = append(whole[:, :, :-2], rows(1))
    assert not shares_memory(cropped, whole) and torch.equal(whole, kept)


def test_view_of_the_cropped_rows_is_respected() -> None:
    cache = append(start(), rows(3))
    tail, kept = cache[:, :, -2:], cache[:, :, -2:].clone()
    cache = append(cache[:, :, :-2], rows(2))
    assert torch.equal(tail, kept)


def test_window_moves_through_the_memory() -> None:
    cache = start(8)
    expected, before = cache.clone(), counters["kv_copies"]
    for _ in range(10):
        new = rows(1)
        cache = append(cache[:, :, 1:], new)
        expected = torch.cat([expected[:, :, 1:], new], 2)
    assert torch.equal(cache, expected) and counters["kv_copies"] == before


def test_write_into_the_only_cache_is_kept() -> None:
    cache = start()
    cache.mul_(2)
    kept = cache.clone()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        grown = append(cache, rows(1))
    assert torch.equal(grown[:, :, :-1], kept)


def test_write_into_a_cache_that_shares_memory_warns_and_parts_them() -> None:
    cache = start()
    longer = append(cache, rows(1))
    cache.zero_()
    with pytest.warns(UserWarning, match="written in place"):
        grown = append(longer, rows(1))
    assert not shares_memory(grown, cache)


@pytest.mark.parametrize(
    "other",
    [
        copy.deepcopy,
        lambda cache: cache.index_select(0, torch.tensor([1, 0])),
        lambda cache: cache.repeat_interleave(2, dim=0),
        lambda cache: cache[torch.tensor([1]), ...],
        lambda cache: cache.flip(0),
        lambda cache: cache[:, :, ::2],
        lambda cache: cache[:, :1],
        lambda cache: cache[:1].expand(B, H, -1, D),
        lambda cache: cache.transpose(0, 1),
        lambda cache: cache.view(torch.int32),
        lambda cache: cache.detach(),
    ],
    ids="deepcopy reorder repeat select flip step heads expand transpose bits detach".split(),
)
def test_cache_of_other_form_is_copied(other: object) -> None:
    cache = start()
    kept, form = cache.clone(), other(cache)
    grown = append(form, torch.ones_like(form[:, :, :1]))
    assert not shares_memory(grown, cache)
    assert torch.equal(grown[:, :, :-1], form) and torch.equal(cache, kept)


def test_saved_cache_loads_and_grows() -> None:
    cache, file = start(), io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    loaded = torch.load(file)
    assert torch.equal(loaded, cache)
    assert torch.equal(append(loaded, rows(1))[:, :, :-1], cache)


def test_memory_is_freed_with_the_last_cache() -> None:
    cache = append(start(), rows(1))
    buffer = weakref.ref(cache._base)
    del cache
    gc.collect()
    assert buffer() is None


def test_modes_mix() -> None:
    with torch.inference_mode():
        cache = start()
    expected = cache.clone()
    for mode in (torch.no_grad, torch.inference_mode, torch.no_grad):
        with mode():
            new = rows(1)
            before = counters["kv_copies"]
            cache = append(cache, new)
            expected = torch.cat([expected, new], 2)
            assert counters["kv_copies"] == before
    assert torch.equal(cache, expected)


def test_inference_tensor_is_copied() -> None:
    with torch.inference_mode():
        past = rows(4)
    with torch.no_grad():
        assert torch.equal(append(past, rows(1))[:, :, :-1], past)


@pytest.mark.parametrize("size", [(0, H, 5, D), (B, H, 0, D), (B, H, 5, 0)])
def test_empty_cache_grows(size: tuple[int, ...]) -> None:
    past = torch.randn(size)
    new = torch.randn(size[0], H, 2, size[3])
    cache = append(append(past, new), new)
    assert torch.equal(cache, torch.cat([past, new, new], 2))


def test_only_one_of_many_threads_gets_the_room() -> None:
    cache, news = start(), [rows(1) for _ in range(8)]
    results: list[torch.Tensor | None] = [None] * len(news)
    ready = threading.Barrier(len(news))

    def run(number: int) -> None:
        ready.wait()
        results[number] = append(cache, news[number])

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(news))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for new, result in zip(news, results, strict=True):
        assert result is not None and torch.equal(result, torch.cat([cache, new], 2))
    assert sum(shares_memory(result, cache) for result in results) == 1


ACTIONS = ("append", "crop", "window", "fork", "drop", "clone", "reorder")
steps = st.lists(st.tuples(st.sampled_from(ACTIONS), st.integers(0, 9)), max_size=40)


@settings(max_examples=60, deadline=None)
@given(steps)
def test_caches_always_hold_what_concatenation_would(steps: list[tuple[str, int]]) -> None:
    first = start()
    caches = [(first, first.clone())]
    for action, number in steps:
        place = number % len(caches)
        cache, expected = caches[place]
        length = expected.shape[2]
        if action == "append":
            new = rows(1 + number % 3)
            caches[place] = append(cache, new), torch.cat([expected, new], 2)
        elif action == "crop" and length > 3:
            caches[place] = cache[:, :, :-3], expected[:, :, :-3]
        elif action == "window" and length > 3:
            caches[place] = cache[:, :, 2:], expected[:, :, 2:]
        elif action == "fork":
            caches.append((cache, expected))
        elif action == "drop" and len(caches) > 1:
            del caches[place]
        elif action == "clone":
            caches[place] = copy.deepcopy(cache), expected
        elif action == "reorder":
            order = torch.arange(B).flip(0)
            caches[place] = cache.index_select(0, order), expected.index_select(0, order)
        del cache, expected
        assert all(torch.equal(held, should) for held, should in caches)


def test_many_caches_at_once() -> None:
    """One with room, one that is full, one held by an older fork, one that is nobody's view, one with little room."""
    full = start(1)
    while shares_memory(full, append(full, rows(0))) and full._base is not None and full.shape[2] < full._base.shape[0]:
        full = append(full, rows(1))
    forked = start()
    taken = append(forked, rows(1))
    pasts = [start(), full, forked, rows(4), start()]
    grown = kv.reserve_many([(past, 1, 2) for past in pasts])
    assert [shares_memory(a, b) for a, b in zip(grown, pasts, strict=True)] == [True, False, False, False, True]
    for past, longer in zip(pasts, grown, strict=True):
        assert longer.shape[2] == past.shape[2] + 1 and torch.equal(longer[:, :, :-1], past)
    assert torch.equal(taken[:, :, :-1], forked)


def test_a_cache_is_compiled_for_any_length_at_first_sight() -> None:
    counter = CompileCounter()
    total = torch.compile(lambda cache: cache.sum(2), backend=counter)
    cache = start()
    for _ in range(3):
        cache = append(cache, rows(1))
        assert torch.equal(total(cache), cache.sum(2))
    assert counter.frame_count == 1


@pytest.mark.parametrize("dim", [0, 1, 2, 3])
def test_the_commonest_case_needs_no_python(dim: int, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless there is no compiled function."""
    pasts = [start(dim=dim), start(dim=dim)]
    calls = []
    real = kv._reserve
    monkeypatch.setattr(kv, "_reserve", lambda *call: calls.append(call) or real(*call))
    first = kv.reserve_many([(pasts[0], 1, dim), (pasts[1], 2, dim, 64)])
    kv.reserve_many([(first[0], 3, dim)])
    assert len(calls) == (0 if way == "compiled" else 3)


def test_a_capacity_that_is_no_number_is_an_error() -> None:
    with pytest.raises(TypeError):
        kv.reserve(start(), 1, 2, "many")  # type: ignore[arg-type]


def test_one_cache_twice_is_parted() -> None:
    cache = start()
    one, other = kv.reserve_many([(cache, 1, 2), (cache, 2, 2, 64)])
    assert shares_memory(one, cache) and not shares_memory(other, cache)
    assert other._base is not None and other._base.shape[0] == 64 and torch.equal(other[:, :, :-2], cache)


def test_more_than_the_capacity_is_refused_among_others() -> None:
    with pytest.raises(graphopt.errors.KVCapacityError):
        kv.reserve_many([(start(), 1, 2), (start(), 100, 2, 20)])
