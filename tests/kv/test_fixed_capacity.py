"""A fixed capacity: memory for all rows at once, and an error that says what to do for one row more."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from graphopt import counters
from graphopt.errors import KVCapacityError, OptionError
from graphopt.options import Options
from graphopt.runtime import kv
from tests.kv import scenarios


def compiled(model: Any, **options: Any) -> Any:
    model.forward = torch.compile(model.forward, backend="graphopt", options={"target": "inductor", **options})
    return model


def capacity_of(cache: torch.Tensor) -> float:
    batch, heads, _, size = cache.shape
    return cache.untyped_storage().nbytes() / (batch * heads * size * cache.element_size())


def test_room_is_exactly_what_was_asked_for() -> None:
    cache = kv.reserve(torch.randn(2, 3, 5, 4), 1, 2, 12)
    before = counters["kv_copies"]
    for _ in range(6):
        cache = kv.reserve(cache, 1, 2, 12)
    assert cache.shape[2] == 12 and capacity_of(cache) == 12 and counters["kv_copies"] == before
    made = kv.allocate([2, 3, 7, 4], 2, dtype=torch.float32, device=torch.device("cpu"), capacity=12)
    assert capacity_of(made) == 12


@pytest.mark.parametrize("count", [8, 100])
def test_one_row_more_says_what_to_do(count: int) -> None:
    past = torch.randn(2, 3, 5, 4)
    with pytest.raises(KVCapacityError, match=rf"{5 + count} rows .* capacity of 12 .*kv_capacity.*crop"):
        kv.reserve(past, count, 2, 12)
    with pytest.raises(KVCapacityError, match="kv_capacity"):
        torch.ops.graphopt.kv_reserve(past, count, 2, 12)
    with pytest.raises(KVCapacityError, match="kv_capacity"):
        kv.allocate([2, 3, 5 + count, 4], 2, dtype=torch.float32, device=torch.device("cpu"), capacity=12)


def test_cropped_cache_fits_again() -> None:
    cache = kv.reserve(torch.randn(2, 3, 11, 4), 1, 2, 12)
    with pytest.raises(KVCapacityError):
        kv.reserve(cache, 1, 2, 12)
    assert kv.reserve(cache[:, :, :-1], 1, 2, 12).shape[2] == 12


def test_generation_within_the_capacity_and_beyond() -> None:
    expected, model = scenarios.greedy(scenarios.tiny_llama()), compiled(scenarios.tiny_llama(), kv_capacity=46)
    before = counters["kv_copies"]
    assert torch.equal(scenarios.greedy(model), expected)
    assert counters["kv_copies"] == before
    with pytest.raises(KVCapacityError, match="47 rows"):
        scenarios.greedy(model, tokens=41)


@pytest.mark.parametrize("wrong", [0, -3, 1.5, "many", True])
def test_wrong_capacities_are_refused(wrong: object) -> None:
    with pytest.raises(OptionError, match="kv_capacity"):
        Options.parse(None, {"kv_capacity": wrong})
