"""What people do with KV caches, written once: each scenario runs a model and returns the tokens it made."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

VOCABULARY = 100


def tiny_llama(layers: int = 1, **changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=VOCABULARY, num_hidden_layers=layers, **{**sizes, **changes})
    return LlamaForCausalLM(config).eval()


def prompt(length: int = 7, batch: int = 1, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def greedy(model: Any, tokens: int = 40) -> Tensor:
    return model.generate(prompt(), max_new_tokens=tokens, do_sample=False)


def sampled(model: Any) -> Tensor:
    torch.manual_seed(1)
    return model.generate(prompt(), max_new_tokens=30, do_sample=True, top_k=20)


def beams(model: Any) -> Tensor:
    return model.generate(prompt(), max_new_tokens=12, num_beams=3, do_sample=False)


def several_sequences(model: Any) -> Tensor:
    torch.manual_seed(1)
    return model.generate(prompt(), max_new_tokens=12, do_sample=True, num_return_sequences=3)


def left_padded(model: Any) -> Tensor:
    tokens, mask = prompt(9, batch=3), torch.ones(3, 9, dtype=torch.long)
    mask[0, :4] = mask[1, :1] = 0
    return model.generate(tokens, attention_mask=mask, max_new_tokens=20, do_sample=False, pad_token_id=0)


def chunked_prefill(model: Any) -> Tensor:
    return model.generate(prompt(21), max_new_tokens=12, do_sample=False, prefill_chunk_size=6)


def assisted(model: Any) -> Tensor:
    return model.generate(prompt(12), max_new_tokens=20, do_sample=False, prompt_lookup_num_tokens=3)


def step(model: Any, tokens: Tensor, cache: Any) -> tuple[Tensor, Any]:
    """The most likely next token [B, 1], and the cache."""
    with torch.no_grad():
        output = model(tokens, past_key_values=cache, use_cache=True)
    return output.logits[:, -1:].argmax(-1), output.past_key_values


def follow(model: Any, token: Tensor, cache: Any, count: int) -> list[Tensor]:
    """`count` greedy tokens after `token`."""
    tokens = []
    for _ in range(count):
        token, cache = step(model, token, cache)
        tokens.append(token)
    return tokens


def shallow(cache: DynamicCache) -> DynamicCache:
    """Another cache object that holds the same tensors."""
    other = copy.copy(cache)
    other.layers = [copy.copy(layer) for layer in cache.layers]
    return other


def two_continuations(model: Any) -> Tensor:
    token, cache = step(model, prompt(), DynamicCache(config=model.config))
    follow(model, token, cache, 3)
    other = shallow(cache)
    first = follow(model, token, cache, 8)
    second = follow(model, (token + 1) % VOCABULARY, other, 8)
    again = follow(model, token, cache, 4)
    return torch.cat(first + second + again, 1)


def crop_then_continue(model: Any) -> Tensor:
    token, cache = step(model, prompt(), DynamicCache(config=model.config))
    first = follow(model, token, cache, 10)
    cache.crop(-6)
    return torch.cat(first + follow(model, token, cache, 10), 1)


def copied_and_saved(model: Any) -> Tensor:
    token, cache = step(model, prompt(), DynamicCache(config=model.config))
    first = follow(model, token, cache, 5)
    twin, file = copy.deepcopy(cache), io.BytesIO()
    torch.save([(layer.keys, layer.values) for layer in cache.layers], file)
    second = follow(model, token, twin, 5)
    third = follow(model, token, cache, 5)
    file.seek(0)
    for layer, (keys, values) in zip(cache.layers, torch.load(file), strict=True):
        layer.keys, layer.values = keys, values
    return torch.cat(first + second + third + follow(model, token, cache, 5), 1)


def repeated_and_selected(model: Any) -> Tensor:
    token, cache = step(model, prompt(), DynamicCache(config=model.config))
    cache.batch_repeat_interleave(3)
    tokens = follow(model, token.repeat(3, 1) + torch.arange(3)[:, None], cache, 4)
    cache.reorder_cache(torch.tensor([2, 0, 2]))
    tokens += follow(model, tokens[-1][[2, 0, 2]], cache, 3)
    cache.batch_select_indices(torch.tensor([1]))
    return torch.cat([row.flatten() for row in tokens + follow(model, tokens[-1][[1]], cache, 3)])


SCENARIOS: tuple[Callable[[Any], Tensor], ...] = (
    greedy,
    sampled,
    beams,
    several_sequences,
    left_padded,
    chunked_prefill,
    assisted,
    two_continuations,
    crop_then_continue,
    copied_and_saved,
    repeated_and_selected,
)
