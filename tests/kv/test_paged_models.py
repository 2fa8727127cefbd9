"""Paged caches in whole models: tokens are eager's, and continuations hold what they have in common once."""

from __future__ import annotations

import copy
import gc
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from graphopt import counters
from graphopt.runtime.kv_tensor import held_bytes
from tests.kv import scenarios


def compiled(model: Any, target: str = "cpu", **options: Any) -> Any:
    chosen = {"target": target, "kv_cache": "paged", **options}
    model.forward = torch.compile(model.forward, backend="graphopt", options=chosen)
    return model


def tensors(*caches: DynamicCache) -> list[Tensor]:
    return [tensor for cache in caches for layer in cache.layers for tensor in (layer.keys, layer.values)]


FEW = (scenarios.greedy, scenarios.repeated_and_selected)


@pytest.mark.rotate(one_in=2)
@pytest.mark.parametrize("target", ["cpu", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "scenario",
    [pytest.param(one, id=one.__name__, marks=() if one in FEW else pytest.mark.slow) for one in scenarios.SCENARIOS],
)
def test_tokens_are_those_of_eager(scenario: Callable[[Any], Tensor], target: str) -> None:
    expected, before = scenario(scenarios.tiny_llama()), counters["rewrites"]
    assert torch.equal(scenario(compiled(scenarios.tiny_llama(), target, strict=True)), expected)
    assert counters["rewrites"] > before


def test_two_graphs_for_a_generation() -> None:
    model, before = compiled(scenarios.tiny_llama()), counters["graphs"]
    scenarios.greedy(model)
    assert counters["graphs"] - before == 2


def test_continuations_of_one_prompt_hold_it_once() -> None:
    def continued(model: Any) -> tuple[list[Tensor], int]:
        token, cache = scenarios.step(model, scenarios.prompt(500), DynamicCache(config=model.config))
        caches = [copy.deepcopy(cache) for _ in range(16)]
        tokens = [
            torch.cat(scenarios.follow(model, (token + number) % scenarios.VOCABULARY, twin, 20))
            for number, twin in enumerate(caches)
        ]
        gc.collect()
        return tokens, held_bytes(tensors(*caches))

    expected, exact = continued(scenarios.tiny_llama())
    tokens, held = continued(compiled(scenarios.tiny_llama()))
    assert [row.tolist() for row in tokens] == [row.tolist() for row in expected]
    assert held < 0.2 * exact


@pytest.mark.slow
def test_several_sequences_of_one_prompt_hold_it_once() -> None:
    """`num_return_sequences` prefills the prompt once for each sequence: equal blocks are found."""
    model = compiled(scenarios.tiny_llama())
    torch.manual_seed(1)
    output = model.generate(
        scenarios.prompt(200),
        max_new_tokens=8,
        do_sample=True,
        num_return_sequences=8,
        return_dict_in_generate=True,
        pad_token_id=0,
    )
    exact = 8 * 207 * 2 * 2 * 16 * 4  # sequences, rows, keys and values, heads, head size, bytes
    gc.collect()
    assert output.past_key_values.layers[0].keys.shape[:3] == (8, 2, 207)
    assert held_bytes(tensors(output.past_key_values)) < 0.3 * exact


@pytest.mark.slow
def test_threads_continue_one_cache() -> None:
    model = compiled(scenarios.tiny_llama())
    token, cache = scenarios.step(model, scenarios.prompt(40), DynamicCache(config=model.config))
    scenarios.follow(model, token, copy.deepcopy(cache), 2)
    expected = [scenarios.follow(model, token + number, copy.deepcopy(cache), 24) for number in range(3)]
    found: dict[int, list[Tensor]] = {}

    def follow(number: int) -> None:
        found[number] = scenarios.follow(model, token + number, scenarios.shallow(cache), 24)

    threads = [threading.Thread(target=follow, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [torch.cat(found[number]).tolist() for number in range(3)] == [torch.cat(one).tolist() for one in expected]
