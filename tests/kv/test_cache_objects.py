"""Cache objects in everything people do with them, one after another on one compiled model: no state leaks over."""

from __future__ import annotations

import copy
import io
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from graphopt import counters
from tests.kv import scenarios

TARGETS = pytest.mark.parametrize("target", ["reference", pytest.param("cpu", marks=pytest.mark.slow)])


def compiled(model: Any, target: str, **options: Any) -> Any:
    chosen = {"target": target, "strict": True, **options}
    model.forward = torch.compile(model.forward, backend="graphopt", options=chosen)
    return model


def started(model: Any, length: int = 9) -> tuple[Tensor, DynamicCache]:
    return scenarios.step(model, scenarios.prompt(length), DynamicCache(config=model.config))


def tokens(model: Any, token: Tensor, cache: Any, count: int = 12) -> list[int]:
    return torch.cat(scenarios.follow(model, token, cache, count), 1).flatten().tolist()


@pytest.mark.rotate(one_in=2)
@TARGETS
def test_every_scenario_on_one_compiled_model(target: str) -> None:
    eager, model, before = scenarios.tiny_llama(), compiled(scenarios.tiny_llama(), target), counters["rewrites"]
    for scenario in (*scenarios.SCENARIOS, *reversed(scenarios.SCENARIOS)):
        assert torch.equal(scenario(model), scenario(eager)), scenario.__name__
    assert counters["rewrites"] > before


@TARGETS
def test_a_saved_cache_object_is_loaded_and_continued(target: str) -> None:
    eager, model = scenarios.tiny_llama(), compiled(scenarios.tiny_llama(), target)
    token, cache = started(model)
    scenarios.follow(model, token, cache, 5)
    file = io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    twin, held = started(eager)
    scenarios.follow(eager, twin, held, 5)
    assert tokens(model, token, loaded) == tokens(model, token, cache) == tokens(eager, twin, held)


@TARGETS
@pytest.mark.parametrize(
    ("first", "then"),
    [
        (torch.inference_mode, torch.no_grad),
        pytest.param(torch.no_grad, torch.inference_mode, marks=pytest.mark.slow),
        pytest.param(torch.inference_mode, torch.inference_mode, marks=pytest.mark.slow),
    ],
)
def test_started_in_one_mode_and_continued_in_another(
    target: str, first: Callable[[], AbstractContextManager[None]], then: Callable[[], AbstractContextManager[None]]
) -> None:
    eager, model = scenarios.tiny_llama(), compiled(scenarios.tiny_llama(), target)
    with torch.no_grad():
        expected = tokens(eager, *started(eager))
    with first():
        token, cache = started(model)
        scenarios.follow(model, token, copy.deepcopy(cache), 2)
    with then():
        assert tokens(model, token, cache) == expected


@pytest.mark.slow
def test_with_gradients_nothing_is_rewritten_and_the_numbers_are_eagers() -> None:
    eager, model = scenarios.tiny_llama(), compiled(scenarios.tiny_llama(), "cpu")
    results = []
    for one in (eager, model):
        cache = DynamicCache(config=one.config)
        one(scenarios.prompt(9), past_key_values=cache)
        loss = one(scenarios.prompt(1), past_key_values=cache).logits.sum()
        loss.backward()
        results.append([loss.detach(), *(parameter.grad for parameter in one.parameters())])
    for got, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@TARGETS
def test_two_threads_on_one_model_and_one_cache(target: str) -> None:
    eager, model = scenarios.tiny_llama(), compiled(scenarios.tiny_llama(), target)
    token, cache = started(model)
    scenarios.follow(model, token, copy.deepcopy(cache), 3)
    first, own = started(eager)
    expected = [tokens(eager, first + number, copy.deepcopy(own), 30) for number in range(2)]
    found: dict[int, list[int]] = {}

    def follow(number: int) -> None:
        found[number] = tokens(model, token + number, scenarios.shallow(cache), 30)

    threads = [threading.Thread(target=follow, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[number] for number in range(2)] == expected


def test_a_write_into_an_old_cache_is_never_lost_silently() -> None:
    """Caches that share memory show the same change, and a warning names it; the continuation is right for it."""
    model = compiled(scenarios.tiny_llama(), "cpu")
    token, cache = started(model)
    old = scenarios.shallow(cache)
    scenarios.follow(model, token, cache, 4)
    old.layers[0].keys.mul_(2.0)
    with pytest.warns(UserWarning, match="written in place"):
        scenarios.follow(model, token, cache, 1)
