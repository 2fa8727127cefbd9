"""What `generate` compiles by itself for fixed caches (`CompileConfig`), with graphopt as its backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import CompileConfig

from graphopt import counters
from tests.kv import scenarios, seq2seq


def config(target: str) -> CompileConfig:
    chosen = CompileConfig(backend="graphopt", mode=None, options={"target": target, "strict": True})
    chosen._compile_all_devices = True  # transformers compiles by itself on accelerators only
    return chosen


def generated(model: Any, inputs: torch.Tensor, compile_config: CompileConfig | None) -> list[list[int]]:
    how: dict[str, Any] = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    return model.generate(inputs, cache_implementation="static", compile_config=compile_config, **how).tolist()


TARGETS = pytest.mark.parametrize("target", ["reference", pytest.param("cpu", marks=pytest.mark.slow)])


@TARGETS
def test_decoder(target: str) -> None:
    model, before = scenarios.tiny_llama(), counters["graphs"]
    for length in (7, 11):
        inputs = scenarios.prompt(length)
        expected = generated(model, inputs, None)
        assert generated(model, inputs, config(target)) == expected
    assert 0 < counters["graphs"] - before <= 2


@TARGETS
@pytest.mark.parametrize("name", seq2seq.MODELS)
def test_encoder_and_decoder(target: str, name: str) -> None:
    model, inputs, before = seq2seq.MODELS[name](), seq2seq.inputs(name), counters["graphs"]
    expected = generated(model, inputs, None)
    assert generated(model, inputs, config(target)) == expected
    assert counters["graphs"] > before
