"""Whole tiny models through generated kernels under the interpreter: the answers of eager, few kernels a layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx import GraphModule

from graphopt.passes import PIPELINE
from graphopt.passes.fuse.form_regions import form_regions
from tests.backends.graphs import run

transformers = pytest.importorskip("transformers")

SMALL = dict(hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, vocab_size=99)


def optimize(graph_module: GraphModule) -> None:
    for each in PIPELINE:
        if each is not form_regions:
            each(graph_module)
    form_regions(graph_module)


def decoder(name: str, **settings: Any) -> Callable[[int], nn.Module]:
    def build(layers: int) -> nn.Module:
        config = getattr(transformers, f"{name}Config")(**{**SMALL, **settings}, num_hidden_layers=layers)
        model: nn.Module = getattr(transformers, f"{name}ForCausalLM")(config)
        return model.eval()

    return build


def gpt2(layers: int) -> nn.Module:
    config = transformers.GPT2Config(n_embd=32, n_layer=layers, n_head=4, vocab_size=99, n_positions=64,
                                     bos_token_id=0, eos_token_id=0)
    model: nn.Module = transformers.GPT2LMHeadModel(config).eval()
    return model


def gptj(layers: int) -> nn.Module:
    config = transformers.GPTJConfig(n_embd=32, n_layer=layers, n_head=4, rotary_dim=4, vocab_size=99, n_positions=64,
                                     bos_token_id=0, eos_token_id=0)
    model: nn.Module = transformers.GPTJForCausalLM(config).eval()
    return model


def bert(layers: int) -> nn.Module:
    config = transformers.BertConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=layers,
                                     num_attention_heads=4, vocab_size=99)
    model: nn.Module = transformers.BertModel(config).eval()
    return model


DECODERS = {
    "Llama": decoder("Llama"),
    "Qwen3": decoder("Qwen3", head_dim=16),
    "Gemma2": decoder("Gemma2", head_dim=16, sliding_window=4),
    "Mixtral": decoder("Mixtral", num_local_experts=4),
    "GPTJ": gptj,
    "GPT2": gpt2,
}


def logits(model: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda ids: model(ids, use_cache=False).logits


@pytest.mark.rotate(one_in=2)
@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_answers_as_eager(name: str) -> None:
    torch.manual_seed(0)
    model = DECODERS[name](2)
    ids = torch.randint(0, 99, (2, 7))
    with torch.no_grad():
        want = logits(model)(ids)
    got, _ = run(logits(model), ids, prepare=optimize)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
    assert got.argmax(-1).equal(want.argmax(-1))


def test_bert_answers_as_eager() -> None:
    torch.manual_seed(0)
    model, ids, mask = bert(2), torch.randint(0, 99, (2, 7)), torch.ones(2, 7, dtype=torch.long)
    mask[0, 5:] = 0

    def function(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        state: torch.Tensor = model(ids, attention_mask=mask).last_hidden_state
        return state

    with torch.no_grad():
        want = function(ids, mask)
    got, compiled = run(function, ids, mask, prepare=optimize)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
    assert compiled[0].fallbacks == []


def test_t5_and_vit_answer_as_eager() -> None:
    torch.manual_seed(0)
    t5 = transformers.T5ForConditionalGeneration(transformers.T5Config(
        d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=99)).eval()
    vit = transformers.ViTModel(transformers.ViTConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8,
    )).eval()
    ids, image = torch.randint(0, 99, (2, 7)), torch.randn(2, 3, 32, 32)
    functions: list[tuple[Callable[[torch.Tensor], torch.Tensor], torch.Tensor]] = [
        (lambda x: t5(input_ids=x, decoder_input_ids=x, use_cache=False).logits, ids),
        (lambda x: vit(x).last_hidden_state, image),
    ]
    for function, given in functions:
        with torch.no_grad():
            want = function(given)
        got, _ = run(function, given, prepare=optimize)
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


def launches(build: Callable[[int], nn.Module], layers: int, ids: torch.Tensor) -> int:
    model = build(layers)
    call = logits(model) if build is not bert else lambda x: model(x).last_hidden_state
    _, compiled = run(call, ids, prepare=optimize)
    assert compiled[0].fallbacks == []
    return compiled[0].launches


def test_a_llama_layer_of_a_decode_step_is_five_kernels() -> None:
    ids = torch.randint(0, 99, (1, 1))
    assert launches(DECODERS["Llama"], 3, ids) - launches(DECODERS["Llama"], 2, ids) <= 5


def test_a_llama_layer_of_a_decode_step_is_six_kernels_with_many_keys_that_are_joined() -> None:
    """The keys of a head are shared out among programs, and merged by the last of them: one launch all the same.

    The cache is not returned: that of keys and values joined anew is one kernel more than in place.
    """
    counts = []
    for layers in (1, 2):
        torch.manual_seed(0)
        model = DECODERS["Llama"](layers)
        past = [torch.randn(1, 2, 4095, 8) for _ in range(2 * layers)]

        def step(ids: torch.Tensor, *rows: torch.Tensor, model: nn.Module = model) -> torch.Tensor:
            cache = transformers.DynamicCache(config=model.config)
            for layer in range(len(rows) // 2):
                cache.update(*rows[2 * layer : 2 * layer + 2], layer)
            result: torch.Tensor = model(input_ids=ids, past_key_values=cache, use_cache=True).logits
            return result

        ids = torch.randint(0, 99, (1, 1))
        with torch.no_grad():
            want = step(ids, *past)
        got, (compiled,) = run(step, ids, *past, prepare=optimize)
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
        assert compiled.fallbacks == []
        assert sum(len(k.scratch) == 2 for k in compiled.kernels.values()) == 1
        counts.append(compiled.launches)
    assert counts[1] - counts[0] <= 6


def test_new_rows_of_a_cache_that_grows_take_no_further_kernel() -> None:
    from tests.benchmarks import kernels_per_layer

    found = kernels_per_layer.per_layer(kernels_per_layer.ours, kernels_per_layer.llama, 512, (1, 1))
    assert (found["kernels"], found["calls"]) == (5, 0)


def test_a_bert_layer_is_seven_kernels() -> None:
    ids = torch.randint(0, 99, (4, 9))
    assert launches(bert, 3, ids) - launches(bert, 2, ids) <= 7


def test_equal_layers_share_their_kernels() -> None:
    ids = torch.randint(0, 99, (1, 5))
    counts = []
    for layers in (2, 3):
        _, compiled = run(logits(DECODERS["Llama"](layers)), ids, prepare=optimize)
        counts.append(len(compiled[0].kernels))
    assert counts[0] == counts[1]


def test_decode_with_a_growing_cache_gives_eagers_tokens() -> None:
    torch.manual_seed(0)
    model = DECODERS["Llama"](2)
    past = transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.randint(0, 99, (1, 6)), past_key_values=past)
    keys = [(layer.keys, layer.values) for layer in past.layers]
    token = torch.randint(0, 99, (1, 1))

    def step(token: torch.Tensor, *states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        cache = transformers.DynamicCache(list(zip(states[::2], states[1::2], strict=True)), config=model.config)
        result = model(token, past_key_values=cache).logits
        return (result, *(t for layer in cache.layers for t in (layer.keys, layer.values)))

    states = [t for pair in keys for t in pair]
    with torch.no_grad():
        want = step(token, *states)
    got, compiled = run(step, token, *states, prepare=form_regions)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
    assert compiled[0].fallbacks == []
