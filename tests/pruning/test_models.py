"""Whole tiny models with dead heads and channels: the same answers and tokens as eager, from smaller matrices."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import graphopt
from tests.pruning.models import done_by, frozen
from tests.suite import door
from tests.suite.architectures import BY_NAME

# What reads heads, what reads FFN channels, and whether it is kept transposed.
READERS: dict[str, tuple[tuple[str, ...], tuple[str, ...], bool]] = {
    "llama": (("self_attn.o_proj",), ("mlp.down_proj",), False),
    "qwen3": (("self_attn.o_proj",), ("mlp.down_proj",), False),
    "phi3": (("self_attn.o_proj",), ("mlp.down_proj",), False),
    "gpt2": (("attn.c_proj",), ("mlp.c_proj",), True),
    "bert": (("attention.output.dense",), ("0.output.dense",), False),
    "t5": (("SelfAttention.o", "EncDecAttention.o"), ("DenseReluDense.wo",), False),
    "bart": (("attn.out_proj",), ("fc2",), False),
}


def dying(name: str) -> Any:
    """A tiny model in which the second head of each attention and 16 channels of each FFN are dead."""
    model = frozen(name)
    heads, channels, transposed = READERS[name]
    size = 8 if name in ("t5", "bart") else 16
    for path, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if weight is None or weight.dim() != 2:
            continue
        read = weight.t() if transposed else weight
        if path.endswith(heads):
            read[:, size : 2 * size] = 0
        elif path.endswith(channels):
            read[:, 3:19] = 0
    return model


def pruned(report: graphopt.Report) -> int:
    return sum(done.rewrites for done in done_by(report, "prune_dead"))


@pytest.mark.parametrize(
    "name", [name if name in ("llama", "bert") else pytest.param(name, marks=pytest.mark.slow) for name in READERS]
)
def test_same_as_eager_from_smaller_matrices(name: str) -> None:
    model = dying(name)
    for rows in (2, 3):
        batch = BY_NAME[name].inputs(rows)
        subject = door.compiled(model, target="reference")
        got, want = subject(**copy.deepcopy(batch)), model(**copy.deepcopy(batch))
        for one, other in zip(got.to_tuple(), want.to_tuple(), strict=True):
            if isinstance(other, torch.Tensor):
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    report = graphopt.explain(model, options={"target": "reference", "strict": True}, **batch)
    sources = sum(path.endswith((*READERS[name][0], *READERS[name][1])) for path, _ in model.named_modules())
    assert pruned(report) >= sources


@pytest.mark.parametrize(
    ("name", "cache"),
    [
        ("llama", "dynamic"),
        pytest.param("llama", "static", marks=pytest.mark.slow),
        pytest.param("gpt2", "dynamic", marks=pytest.mark.slow),
        pytest.param("t5", "dynamic", marks=pytest.mark.slow),
        pytest.param("bart", "dynamic", marks=pytest.mark.slow),
    ],
)
def test_same_tokens_with_a_cache(name: str, cache: str) -> None:
    """The cache keeps the shape that the caller expects: all key/value heads."""
    model = dying(name)
    batch = {key: value for key, value in BY_NAME[name].inputs(2).items() if key != "decoder_input_ids"}
    settings: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    settings |= {"return_dict_in_generate": True, "output_logits": True}
    settings |= {"cache_implementation": "static"} if cache == "static" else {}
    want = model.generate(**copy.deepcopy(batch), **settings)
    subject = copy.deepcopy(model)
    subject.forward = door.compiled(subject.forward, target="reference")
    got = subject.generate(**copy.deepcopy(batch), **settings)
    assert got.sequences.tolist() == want.sequences.tolist()
    torch.testing.assert_close(got.logits, want.logits, rtol=1e-3, atol=1e-5)
    for one, other in zip(_keys(got.past_key_values), _keys(want.past_key_values), strict=True):
        assert one.shape == other.shape
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def _keys(cache: Any) -> list[torch.Tensor]:
    cache = getattr(cache, "self_attention_cache", cache)
    return [layer.keys for layer in cache.layers]


def test_quantised_and_pruned() -> None:
    """Quantisation packs the smaller weights: the answers stay as near to eager's as without pruning."""
    model = dying("llama")
    batch = BY_NAME["llama"].inputs(2)
    subject = door.compiled(model, target="reference", quantize="int8")
    got, want = subject(**batch).logits, model(**batch).logits
    assert (got - want).norm() <= 0.05 * want.norm()
    report = graphopt.explain(model, options={"target": "reference", "quantize": "int8"}, **batch)
    assert pruned(report) >= 4 and sum(done.rewrites for done in done_by(report, "quantize_linears")) >= 4


@pytest.mark.slow
def test_stored_code_serves_other_weights(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is served from the disk cache fits the weights at hand, dead or alive, also with generated code."""
    monkeypatch.setenv("GRAPHOPT_CACHE_DIR", str(tmp_path))
    batch = BY_NAME["llama"].inputs(2)
    alive = dying("llama")
    torch.manual_seed(7)
    for parameter in alive.parameters():
        parameter.normal_(0, 0.05)
    for model in (dying("llama"), alive, dying("llama")):
        door.fresh()
        subject = door.compiled(model, target="cpu")
        torch.testing.assert_close(subject(**batch).logits, model(**batch).logits, rtol=1e-4, atol=1e-4)
