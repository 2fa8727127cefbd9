"""What a user is told whose caches, or whose machine, cannot do what an option for KV caches asks for."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM, StaticCache

from graphopt import options
from graphopt.errors import KVCapacityError, OptionError
from graphopt.quantization import cache_operations
from tests.kv import scenarios

ASKED = pytest.mark.parametrize(
    ("option", "value"), [("kv_dtype", "int8"), ("kv_cache", "paged")], ids=["kv_dtype", "kv_cache"]
)


def compiled(model: Any, **chosen: Any) -> Any:
    model.forward = torch.compile(model.forward, backend="graphopt", options={"target": "reference", **chosen})
    return model


@ASKED
def test_a_cache_class_of_fixed_size_is_named(option: str, value: str) -> None:
    expected = scenarios.follow(*start(scenarios.tiny_llama()), 3)
    model = compiled(scenarios.tiny_llama(), **{option: value})
    with pytest.warns(UserWarning, match=f"{option}.*fixed size.*growing caches, such as DynamicCache"):
        assert scenarios.follow(*start(model), 3) == expected


def start(model: Any) -> tuple[Any, torch.Tensor, StaticCache]:
    cache = StaticCache(config=model.config, max_cache_len=32)
    return model, *scenarios.step(model, scenarios.prompt(), cache)


@ASKED
def test_a_sliding_window_is_named(option: str, value: str) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = MistralConfig(vocab_size=scenarios.VOCABULARY, num_hidden_layers=1, sliding_window=6, **sizes)
    eager = MistralForCausalLM(config).eval()
    expected = scenarios.greedy(eager, tokens=8)
    with pytest.warns(UserWarning, match=f"{option}.*sliding-window"):
        assert torch.equal(scenarios.greedy(compiled(eager, **{option: value}), tokens=8), expected)


def test_a_cache_that_is_rewritten_warns_of_nothing(recwarn: pytest.WarningsRecorder) -> None:
    scenarios.greedy(compiled(scenarios.tiny_llama(), kv_cache="paged"), tokens=4)
    assert not [one for one in recwarn if "KV caches stay" in str(one.message)]


def test_one_row_too_many_says_how_many_fit() -> None:
    model = compiled(scenarios.tiny_llama(), kv_capacity=10)
    with pytest.raises(KVCapacityError, match=r"11 rows .* capacity of 10 .*kv_capacity.*crop.*larger"):
        scenarios.greedy(model, tokens=6)


@pytest.mark.parametrize(("capability", "refused"), [((8, 0), True), ((8, 9), False), ((9, 0), False)])
def test_fp8_needs_hardware(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], refused: bool) -> None:
    class OnDevice(torch.Tensor):
        device = torch.device("cuda", 0)  # type: ignore[assignment]

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch, "version", types.SimpleNamespace(hip=None))
    inputs = [torch.zeros(1).as_subclass(OnDevice), 3]
    for kind in (None, *options.KV_DTYPES):
        if kind == "fp8" and refused:
            with pytest.raises(OptionError, match="'fp8'.*8.9; cuda:0 has 8.0: use 'int8'"):
                cache_operations.check_devices(kind, inputs)
        else:
            cache_operations.check_devices(kind, inputs)
    cache_operations.check_devices("fp8", [torch.zeros(1)])
