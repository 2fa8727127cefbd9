"""append_in_place and start_with_room: what they rewrite, what they refuse and why."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._pytree import tree_leaves

from graphopt import report
from graphopt.edit import Refusal

B, H, D = 2, 3, 4


def cache(length: int = 5, dim: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    size = [B, H, D]
    size.insert(dim, length)
    return torch.randn(size).to(dtype)


def attended(function: Callable[..., Any]) -> Callable[..., tuple[Any, list[Tensor]]]:
    """The function, and a product that reads each of the caches it returns, whatever their strides."""

    def read(cache: Tensor) -> Tensor:
        while cache.dim() > 2:
            cache = cache[0]
        return cache @ cache.t()

    def with_readers(*inputs: Tensor) -> tuple[Any, list[Tensor]]:
        result = function(*inputs)
        caches = [leaf for leaf in tree_leaves(result) if leaf.dim() > 2 and leaf.dtype.is_floating_point]
        return result, [read(leaf) for leaf in caches]

    return with_readers


def run(
    function: Callable[..., Any], *inputs: Tensor, training: bool = False, dynamic: bool | None = None
) -> tuple[Any, dict[str, int], list[Refusal]]:
    """The compiled function's result, the number of rewrites and the refusals of the KV passes."""
    compiled = torch.compile(
        attended(function), backend="graphopt", dynamic=dynamic, options={"target": "reference", "strict": True}
    )
    with report.collecting() as collected, torch.set_grad_enabled(training):
        result, _ = compiled(*inputs)
    passes = [entry for graph in collected.graphs for entry in graph.passes]
    rewrites = {entry.name: entry.rewrites for entry in passes if entry.stage == "kv_cache"}
    refusals = [refusal for entry in passes if entry.name == "append_in_place" for refusal in entry.refusals]
    return result, rewrites, refusals


def check(function: Callable[..., Any], *inputs: Tensor, appends: int, reason: str = "") -> None:
    expected = function(*(value.clone() for value in inputs))
    result, rewrites, refusals = run(function, *inputs)
    torch.testing.assert_close(result, expected)
    assert rewrites["append_in_place"] == appends
    assert [refusal.reason for refusal in refusals if reason not in refusal.reason] == []
    assert bool(reason) == bool(refusals)


@pytest.mark.parametrize("dim", [0, 1, 2, 3, -1, -2])
def test_returned_cache_is_appended_to(dim: int) -> None:
    def grow(past: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
        grown = torch.cat([past, new.sin()], dim)
        return grown, grown.sum()

    check(grow, cache(5, dim % 4), cache(2, dim % 4), appends=1)


def test_second_batch_size_and_symbolic_length() -> None:
    def grow(past: Tensor, new: Tensor) -> Tensor:
        return torch.cat([past, new], -2)

    options = {"target": "reference", "strict": True}
    compiled = torch.compile(attended(grow), backend="graphopt", options=options, dynamic=True)
    with torch.no_grad():
        for batch, length, count in ((2, 5, 1), (3, 9, 2), (4, 2, 7)):
            past, new = torch.randn(batch, H, length, D), torch.randn(batch, H, count, D)
            assert torch.equal(compiled(past, new)[0], grow(past, new))


def test_several_new_parts_are_joined_first() -> None:
    check(lambda past, a, b: torch.cat([past, a, b], 2), cache(), cache(1), cache(2), appends=1)


def test_past_may_be_read_anywhere() -> None:
    def grow(past: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
        grown = torch.cat([past, new + past.mean(2, keepdim=True)], 2)
        return grown, past.sum() + grown.sum()

    check(grow, cache(), cache(1), appends=1)


def test_past_may_be_returned_as_well() -> None:
    check(lambda past, new: (past, torch.cat([past, new], 2)), cache(), cache(1), appends=1)


def test_window_of_the_cache_is_returned() -> None:
    check(lambda past, new: torch.cat([past, new], 2)[:, :, 1:].clone(), cache(), cache(1), appends=0)
    check(lambda past, new: torch.cat([past, new], 2)[:, :, 1:], cache(), cache(1), appends=1)


def test_cache_that_is_not_returned_is_left_alone() -> None:
    check(lambda past, new: torch.cat([past, new], 2).sum(), cache(), cache(1), appends=0)


def test_mask_is_left_alone() -> None:
    check(lambda past, new: torch.cat([past, new], 1), torch.ones(B, 5), torch.ones(B, 1), appends=0)


def test_integers_are_left_alone() -> None:
    check(lambda past, new: torch.cat([past, new], 1), cache().long(), cache().long(), appends=0)


def test_refuses_weight() -> None:
    weight = torch.nn.Parameter(cache())
    reason = "the first part of the concatenation is not the cache that was passed in"
    check(lambda new: torch.cat([weight, new], 2), cache(1), appends=0, reason=reason)


def test_training_graph_is_left_alone() -> None:
    past, new = cache().requires_grad_(), cache(1)
    _, rewrites, _ = run(lambda a, b: torch.cat([a, b], 2), past, new, training=True)
    assert rewrites == {}


def test_refuses_prepended_rows() -> None:
    reason = "the first part of the concatenation is not the cache that was passed in"
    check(lambda past, new: torch.cat([new.sin(), past], 2), cache(), cache(1), appends=0, reason=reason)


def test_refuses_mixed_types() -> None:
    reason = "the cache and the new rows have different types"
    past, new = cache(dtype=torch.bfloat16), cache(1)
    check(lambda past, new: torch.cat([past, new], 2), past, new, appends=0, reason=reason)


def test_refuses_cache_that_the_graph_writes() -> None:
    def grow(past: Tensor, new: Tensor) -> Tensor:
        grown = torch.cat([past, new], 2)
        past.mul_(2)
        return grown

    past, new = cache(), cache(1)
    expected = torch.cat([past, new], 2)
    result, rewrites, refusals = run(grow, past, new)
    assert torch.equal(result, expected) and rewrites["append_in_place"] == 0
    assert [refusal.reason for refusal in refusals] == ["the graph writes into the cache that was passed in"]


def test_refuses_second_append_to_one_cache() -> None:
    def fork(past: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return torch.cat([past, a], 2), torch.cat([past, b], 2)

    check(fork, cache(), cache(1), cache(1), appends=1, reason="the cache grows twice in one graph")


def test_refuses_view_that_needs_the_strides_of_the_concatenation() -> None:
    def grow(past: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
        grown = torch.cat([past, new], 2)
        return grown, grown.view(B * H * 6, D).sin()

    check(grow, cache(), cache(1), appends=0, reason="aten.view.default needs the cache's own strides")


def test_refuses_what_no_attention_reads() -> None:
    past, new = cache(), cache(1)
    options = {"target": "reference", "strict": True}
    compiled = torch.compile(lambda a, b: torch.cat([a, b], 2), backend="graphopt", options=options)
    with report.collecting() as collected, torch.no_grad():
        result = compiled(past, new)
    expected = torch.cat([past, new], 2)
    assert torch.equal(result, expected) and result.stride() == expected.stride()
    refusals = [refusal.reason for entry in collected.graphs[0].passes for refusal in entry.refusals]
    assert refusals == [
        "no attention and no product reads it here: it may be no cache, and its strides are the caller's"
    ]


def test_new_cache_gets_room() -> None:
    def start(empty: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
        made = torch.cat([torch.tensor([]), new.sin()], 2)
        return made, made @ made.transpose(2, 3)

    inputs = torch.tensor([]), cache()
    expected = start(*inputs)
    result, rewrites, _ = run(start, *inputs)
    assert rewrites["start_with_room"] == 1
    torch.testing.assert_close(result, expected)
    assert result[0].stride() == cache().permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3).stride()


def test_result_that_is_no_concatenation_gets_no_room() -> None:
    _, rewrites, _ = run(lambda new: new.sin().clone(), cache())
    assert rewrites["start_with_room"] == 0


def test_limit_leaves_the_graph_as_it_was() -> None:
    compiled = torch.compile(
        attended(lambda past, new: torch.cat([past, new], 2)),
        backend="graphopt",
        options={"target": "reference", "strict": True, "limit": 0},
    )
    past, new = cache(), cache(1)
    with torch.no_grad():
        assert torch.equal(compiled(past, new)[0], torch.cat([past, new], 2))


@settings(max_examples=15, deadline=None)
@given(
    # A product over a dimension of size 1 is captured as a multiplication: no reader that could be told from others.
    shape=st.lists(st.integers(2, 4), min_size=3, max_size=5),
    counts=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    place=st.integers(0, 4),
    permute=st.booleans(),
)
def test_any_shape(shape: Sequence[int], counts: Sequence[int], place: int, permute: bool) -> None:
    dim = place % len(shape)
    torch._dynamo.reset()
    sizes = [[count if index == dim else size for index, size in enumerate(shape)] for count in counts]
    past, news = torch.randn(*shape), [torch.randn(size) for size in sizes]
    if permute:
        past = past.transpose(0, 1).contiguous().transpose(0, 1)
    result, rewrites, _ = run(lambda *parts: torch.cat(parts, dim), past, *news)
    assert torch.equal(result, torch.cat([past, *news], dim)) and rewrites["append_in_place"] == 1
