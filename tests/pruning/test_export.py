"""export_pruned: smaller ordinary models with the answers of the pruned compiled ones, and what cannot be exported."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn

import graphopt
from graphopt import PruneHeads, export_pruned
from graphopt.errors import ExportError, OptionError
from tests.passes.test_prune_experts import Biased
from tests.suite import door
from tests.suite.architectures import BY_NAME, DECODER

LLAMA_SHAPED = ("llama", "mistral", "qwen2", "qwen3", "granite", "gemma", "gemma2")
SIZE = 16


def tiny(name: str) -> Any:
    torch.manual_seed(0)
    model = (_gemma() if name == "gemma" else BY_NAME[name].build()).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.normal_(0.5, 0.2)
    return model


def _gemma() -> nn.Module:
    return transformers.GemmaForCausalLM(transformers.GemmaConfig(**DECODER))


def kill(
    model: Any, heads: tuple[int, ...] = (), channels: tuple[int, ...] = (), layers: tuple[int, ...] = (0, 1)
) -> Any:
    """Zero what reads some heads and FFN channels of some layers of a Llama-shaped model."""
    for number in layers:
        layer = model.model.layers[number]
        for head in heads:
            layer.self_attn.o_proj.weight[:, head * SIZE : (head + 1) * SIZE] = 0
        layer.mlp.down_proj.weight[:, list(channels)] = 0
    return model


def logits(model: Any, name: str, rows: int = 2) -> torch.Tensor:
    torch.manual_seed(1)
    result = model(**BY_NAME["llama" if name == "gemma" else name].inputs(rows))
    return result.logits if hasattr(result, "logits") else result.last_hidden_state


def same(model: Any, smaller: Any, name: str) -> None:
    for rows in (2, 3):
        torch.testing.assert_close(logits(smaller, name, rows), logits(model, name, rows), rtol=1e-4, atol=1e-5)


def stored_and_loaded(smaller: Any, folder: Any) -> Any:
    smaller.save_pretrained(folder)
    return type(smaller).from_pretrained(folder).eval()


@pytest.mark.parametrize("name", LLAMA_SHAPED)
def test_llama_shaped(name: str, tmp_path: Any) -> None:
    """A whole group of heads and a quarter of the channels, and back from the disk."""
    model = kill(tiny(name), heads=(2, 3), channels=tuple(range(5, 29)))
    smaller: Any = export_pruned(model)
    config = smaller.config
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (2, 1, SIZE)
    assert config.intermediate_size == 96 - 24 and config.hidden_size == 64
    attention = smaller.model.layers[1].self_attn
    assert attention.k_proj.weight.shape == (SIZE, 64) and attention.o_proj.weight.shape == (64, 2 * SIZE)
    assert model.config.num_attention_heads == 4 and model.model.layers[0].mlp.down_proj.in_features == 96
    same(model, smaller, name)
    same(model, stored_and_loaded(smaller, tmp_path), name)


def test_same_tokens_from_a_smaller_cache() -> None:
    model = kill(tiny("llama"), heads=(0, 1))
    settings: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True}
    batch = BY_NAME["llama"].inputs(2)
    want, got = (subject.generate(**batch, **settings) for subject in (model, export_pruned(model)))
    assert got.sequences.tolist() == want.sequences.tolist()
    assert (want.past_key_values.layers[0].keys.shape[1], got.past_key_values.layers[0].keys.shape[1]) == (2, 1)


def test_one_head_of_each_group() -> None:
    model = kill(tiny("llama"), heads=(1, 2))
    smaller: Any = export_pruned(model)
    assert (smaller.config.num_attention_heads, smaller.config.num_key_value_heads) == (2, 2)
    same(model, smaller, "llama")


def test_dead_by_what_makes_them() -> None:
    """Zero values (with their bias), and gates whose activation is zero at zero."""
    model = tiny("qwen2")
    for layer in model.model.layers:
        layer.self_attn.v_proj.weight[:SIZE], layer.self_attn.v_proj.bias[:SIZE] = 0, 0
        layer.mlp.gate_proj.weight[:10], layer.mlp.up_proj.weight[40:50] = 0, 0
    smaller: Any = export_pruned(model)
    assert (smaller.config.num_attention_heads, smaller.config.intermediate_size) == (2, 76)
    same(model, smaller, "qwen2")
    model.model.layers[0].self_attn.v_proj.bias[:SIZE] = 1.0
    with pytest.raises(ExportError, match="model.layers"):
        export_pruned(model)


def test_gpt2_and_bert_have_fewer_channels(tmp_path: Any) -> None:
    for name in ("gpt2", "bert"):
        model = tiny(name)
        for layer in model.transformer.h if name == "gpt2" else model.encoder.layer:
            down = layer.mlp.c_proj.weight.t() if name == "gpt2" else layer.output.dense.weight
            down[:, 7:30] = 0
        smaller: Any = export_pruned(model)
        field = "n_inner" if name == "gpt2" else "intermediate_size"
        assert getattr(smaller.config, field) == down.shape[1] - 23
        same(model, smaller, name)
        same(model, stored_and_loaded(smaller, tmp_path / name), name)


def test_refused_where_heads_have_no_size_of_their_own() -> None:
    for name in ("gpt2", "bert"):
        model = tiny(name)
        if name == "gpt2":
            model.transformer.h[1].attn.c_proj.weight[SIZE : 2 * SIZE] = 0
        else:
            model.encoder.layer[1].attention.output.dense.weight[:, SIZE : 2 * SIZE] = 0
        with pytest.raises(ExportError, match=r"(h|layer)\.1: heads \[1\].*cannot have fewer heads"):
            export_pruned(model)
        smaller: Any = export_pruned(model, keep_zeros=True)
        assert smaller.config.num_attention_heads == 4
        same(model, smaller, name)


def test_refused_where_layers_differ() -> None:
    for heads, channels, message in [
        ((2, 3), (), r"model.layers.0: 1 groups of heads"),
        ((3,), (), r"model.layers.0: 1 heads of each group"),
        ((), (4,), r"model.layers.0: 95 FFN channels"),
    ]:
        model = kill(tiny("llama"), heads, channels, layers=(0,))
        with pytest.raises(ExportError, match=message):
            export_pruned(model)
        same(model, export_pruned(model, keep_zeros=True), "llama")


def test_zeros_are_kept_only_where_they_must() -> None:
    model = kill(kill(tiny("llama"), (2, 3), (1, 2, 3)), (), (8, 9), layers=(1,))
    smaller: Any = export_pruned(model, keep_zeros=True)
    assert (smaller.config.num_key_value_heads, smaller.config.intermediate_size) == (1, 93)
    same(model, smaller, "llama")


def test_nothing_to_leave_out() -> None:
    model = tiny("llama")
    smaller: Any = export_pruned(model)
    assert smaller is not model and smaller.config.to_dict() == model.config.to_dict()
    same(model, smaller, "llama")


@pytest.mark.parametrize(
    "prune",
    [PruneHeads(keep=0.75, keep_channels=0.75, choice="norm"), PruneHeads(keep=0.5, choice="random"),
     PruneHeads(max_error=0.05)],
    ids=["norm", "random", "certified"],
)  # fmt: skip
def test_given_up_as_the_compiled_model_gives_up(prune: PruneHeads) -> None:
    """The lossy choice is the same, and what cannot be left out is zero."""
    model = tiny("llama")
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight[:, :SIZE] *= 1e-3
    compiled = door.compiled(model, target="reference", prune_heads=prune)
    smaller = export_pruned(model, prune, keep_zeros=True)
    torch.testing.assert_close(logits(smaller, "llama"), logits(compiled, "llama"), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits(smaller, "llama"), logits(model, "llama"), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_experts_that_are_never_chosen(name: str, tmp_path: Any) -> None:
    model = tiny(name)
    for number, layer in enumerate(model.model.layers):
        layer.mlp.gate = Biased(layer.mlp.gate)
        layer.mlp.gate.bias[number] = -torch.inf
    smaller: Any = export_pruned(model)
    assert smaller.model.layers[0].mlp.experts.gate_up_proj.shape[0] == 3
    same(model, smaller, name)
    same(model, stored_and_loaded(smaller, tmp_path), name)
    model.model.layers[0].mlp.gate.bias[2] = 1.0
    with pytest.raises(ExportError, match="model.layers.0.mlp.gate.bias"):
        export_pruned(model)
    model.model.layers[0].mlp.gate.bias[:] = 0
    with pytest.raises(ExportError, match="experts"):
        export_pruned(model, keep_zeros=True)


def test_what_the_model_was_set_to_stays() -> None:
    model = kill(tiny("llama"), heads=(2, 3)).to(torch.bfloat16).train()
    model.lm_head.requires_grad_(True)
    smaller: Any = export_pruned(model)
    assert smaller.training and smaller.lm_head.weight.requires_grad and smaller.dtype == torch.bfloat16
    assert not smaller.model.embed_tokens.weight.requires_grad
    assert smaller.generation_config.to_dict() == model.generation_config.to_dict()


def test_tied_embeddings_stay_tied() -> None:
    config = tiny("llama").config
    config.tie_word_embeddings = True
    model = kill(transformers.LlamaForCausalLM(config).eval().requires_grad_(False), heads=(0, 1))
    smaller: Any = export_pruned(model)
    assert smaller.lm_head.weight is smaller.model.embed_tokens.weight
    same(model, smaller, "llama")


def test_refused_when_the_configuration_makes_another_model() -> None:
    """A BERT without its pooler is not what its configuration says."""
    model = transformers.BertModel(tiny("bert").config, add_pooling_layer=False)
    with pytest.raises(ExportError, match="pooler"):
        export_pruned(model)


def test_wrong_arguments() -> None:
    with pytest.raises(ExportError, match="'t5'.*llama"):
        export_pruned(tiny("t5"))
    with pytest.raises(ExportError, match="'Linear'"):
        export_pruned(nn.Linear(2, 2))
    with pytest.raises(OptionError, match="prune_heads"):
        export_pruned(tiny("llama"), 0.5)  # type: ignore[arg-type]
    with pytest.raises(ExportError, match="max_error"):
        export_pruned(tiny("bert"), PruneHeads(max_error=0.1))
    with pytest.raises(ExportError, match="has not seen"):
        calibration = graphopt.Importance({"other.weight": torch.ones(1, 64)})
        export_pruned(tiny("llama"), PruneHeads(keep=0.5, calibration=calibration))
