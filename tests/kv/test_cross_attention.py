"""Models with an encoder: the decoder's own cache grows in place, that of cross-attention is left as it is, by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from graphopt import counters, report
from tests.kv import seq2seq

MODELS = pytest.mark.parametrize(
    "name", ["t5", *(pytest.param(one, marks=pytest.mark.slow) for one in ("bart", "whisper"))]
)


def generated(model: Any, name: str, beams: int = 1) -> Any:
    torch.manual_seed(0)
    return model.generate(
        seq2seq.inputs(name),
        max_new_tokens=14,
        min_new_tokens=14,
        do_sample=False,
        num_beams=beams,
        return_dict_in_generate=True,
    )


def compiled(name: str, **options: Any) -> Any:
    model = seq2seq.MODELS[name]()
    model.forward = torch.compile(model.forward, backend="graphopt", options={"strict": True, **options})
    return model


def room(cache: Tensor) -> float:
    """The memory behind a cache, in times of what its rows need."""
    return cache.untyped_storage().nbytes() / cache.nbytes


@pytest.mark.rotate(one_in=2)
@MODELS
def test_own_cache_grows_in_place_and_the_other_is_left_alone(name: str) -> None:
    expected, before = generated(seq2seq.MODELS[name](), name), counters["kv_bytes_copied"]
    with report.collecting() as collected:
        result = generated(compiled(name, target="inductor"), name)
    assert torch.equal(result.sequences, expected.sequences)
    starts = [entry for graph in collected.graphs for entry in graph.passes if entry.name == "start_with_room"]
    assert [entry.rewrites for entry in starts][0] == 2
    assert {refusal.reason for entry in starts for refusal in entry.refusals} == {
        "cross-attention reads it: such a cache does not grow"
    }
    cross = result.past_key_values.cross_attention_cache.layers[0]
    assert room(cross.keys) == room(cross.values) == 1.0
    # Of 14 rows no more than the first is ever copied.
    row = result.past_key_values.self_attention_cache.layers[0].keys[:, :, :1].nbytes
    assert counters["kv_bytes_copied"] - before <= 2 * row


@MODELS
@pytest.mark.parametrize("beams", [1, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kv_cache", [None, "paged"])
def test_tokens_are_those_of_eager(name: str, beams: int, kv_cache: str | None) -> None:
    expected = generated(seq2seq.MODELS[name](), name, beams)
    result = generated(compiled(name, target="reference", kv_cache=kv_cache), name, beams)
    assert torch.equal(result.sequences, expected.sequences)


def test_a_prompt_as_long_as_the_input_is_told_apart_by_nothing_and_stays_right() -> None:
    """The decoder starts with as many rows as the encoder has: room is taken that is never used."""
    tokens = seq2seq.inputs("t5")
    model, eager = compiled("t5", target="reference"), seq2seq.MODELS["t5"]()
    how = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    expected = eager.generate(tokens, decoder_input_ids=tokens.clone(), **how)
    assert torch.equal(model.generate(tokens, decoder_input_ids=tokens.clone(), **how), expected)
