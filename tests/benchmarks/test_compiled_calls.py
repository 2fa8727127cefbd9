"""What a compiled call and a compilation cost: `pytest tests/benchmarks --benchmark-enable`.

Without that option each function runs once and only its result is checked; no test asserts a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

BACKENDS = ("eager", "inductor", "graphopt")

Benchmark = Callable[..., Any]


def small_llama() -> Any:
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("backend", BACKENDS)
def test_overhead_of_one_call(benchmark: Benchmark, backend: str) -> None:
    """A function so small that only guards, wrapper and dispatch are left."""
    compiled = torch.compile(lambda x: x + 1, backend=backend)
    x = torch.zeros(8)
    with torch.no_grad():
        compiled(x)
        assert benchmark(compiled, x).tolist() == [1.0] * 8


@pytest.mark.rotate(one_in=3)
@pytest.mark.parametrize("backend", BACKENDS)
def test_decode_step(benchmark: Benchmark, backend: str) -> None:
    """One token of a two-layer Llama with a growing cache."""
    model = small_llama()
    token = torch.ones(1, 1, dtype=torch.long)
    compiled = torch.compile(model, backend=backend)
    cache = DynamicCache(config=model.config)

    def step() -> torch.Tensor:
        logits: torch.Tensor = compiled(input_ids=token, past_key_values=cache, use_cache=True).logits
        return logits

    with torch.no_grad():
        model(input_ids=torch.arange(1, 17)[None], past_key_values=cache, use_cache=True)
        for _ in range(3):
            step()
        assert benchmark(step).shape == (1, 1, 256)


def test_time_of_the_passes(benchmark: Benchmark) -> None:
    """Capture, all passes and the reference target, without any code generation."""
    model = small_llama()
    ids = torch.arange(1, 17)[None]

    def compile_afresh() -> torch.Tensor:
        torch.compiler.reset()
        logits: torch.Tensor = torch.compile(model, backend="graphopt", options={"target": "reference"})(
            ids
        ).logits
        return logits

    with torch.no_grad():
        torch.testing.assert_close(benchmark(compile_afresh), model(ids).logits)
