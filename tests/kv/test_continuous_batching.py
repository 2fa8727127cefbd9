"""graphopt as the compile backend under transformers' continuous batching: its paged cache, its scheduler, our graphs.

transformers writes and reads its cache outside of what is compiled (`PagedAttentionCache.update` is a graph break), so
a forward is a few graphs for each layer, and attention is compiled over gathered keys and values.
"""

from __future__ import annotations

from typing import Any

import pytest
from transformers import CompileConfig, ContinuousBatchingConfig, GenerationConfig

from graphopt import counters
from tests.kv import scenarios

LENGTHS = (5, 9, 17, 30)


def batched(config: CompileConfig | None) -> list[list[int]]:
    """The tokens that `generate_batch` makes for four prompts, more than its cache can hold at once."""
    how: dict[str, Any] = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0}
    generation = GenerationConfig(eos_token_id=scenarios.VOCABULARY - 1, **how)
    batching = ContinuousBatchingConfig(
        page_size=16, num_blocks=8, max_batch_tokens=32, varlen_compile_config=config, use_cuda_graph=False
    )
    inputs = [scenarios.prompt(length, seed=length)[0].tolist() for length in LENGTHS]
    outputs = scenarios.tiny_llama().generate_batch(
        inputs, generation_config=generation, continuous_batching_config=batching
    )
    assert [output.error for output in outputs.values()] == [None] * len(LENGTHS)
    return [output.generated_tokens for output in outputs.values()]


@pytest.mark.rotate(one_in=2)
@pytest.mark.parametrize("target", ["reference", pytest.param("cpu", marks=pytest.mark.slow)])
def test_tokens_are_those_of_eager(target: str) -> None:
    options = {"target": target, "strict": True}
    expected, before = batched(None), counters["graphs"]
    compiled = CompileConfig(backend="graphopt", mode=None, dynamic=True, options=options)
    assert batched(compiled) == expected
    assert counters["graphs"] > before and all(len(row) > 1 for row in expected)
    eager = scenarios.tiny_llama()
    for length, row in zip(LENGTHS, expected, strict=True):
        tokens = scenarios.prompt(length, seed=length)
        alone = eager.generate(tokens, max_new_tokens=10, do_sample=False, eos_token_id=99, pad_token_id=0)
        assert alone[0, length:].tolist() == row
