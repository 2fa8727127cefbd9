"""Chains in whole models: a decode step is one call, and its tokens are eager's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import fx

from graphopt.backends.cpp import chain
from tests.backends.test_cpp_chain import texts

pytestmark = pytest.mark.usefixtures("cpp_library")

MODELS: dict[str, tuple[Any, dict[str, int]]] = {
    "llama": (transformers.LlamaConfig, {}),
    "qwen3": (transformers.Qwen3Config, {"head_dim": 16}),
    "qwen2": (transformers.Qwen2Config, {}),
    "olmo2": (transformers.Olmo2Config, {}),
}


@pytest.mark.rotate(one_in=2)
@pytest.mark.parametrize("name", MODELS)
def test_a_decode_step_is_one_chain(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, own = MODELS[name]
    config = make(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, **own,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    ids = torch.randint(1, 90, (2, 9))
    ask = {"max_new_tokens": 6, "do_sample": False, "use_cache": True}
    want = model.generate(ids, **ask)
    seen: list[list[str]] = []
    form = chain.form

    def watched(graph_module: fx.GraphModule) -> Any:
        choices = form(graph_module)
        seen.append(texts(graph_module))
        return choices

    monkeypatch.setattr(chain, "form", watched)
    model.forward = torch.compile(model.forward, backend="graphopt", options={"strict": True})
    with torch._functorch.config.patch(enable_autograd_cache=False):
        assert torch.equal(model.generate(ids, **ask), want)
    (decode,) = [steps for steps in seen if any("attend" in each for each in steps)]
    assert len(decode) == 1 and decode[0].count("attend") == 3


def test_a_prompt_left_padded_and_a_weight_that_changes() -> None:
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    compiled = transformers.LlamaForCausalLM(config).eval()
    compiled.load_state_dict(model.state_dict())
    compiled.forward = torch.compile(compiled.forward, backend="graphopt", options={"strict": True, "quantize": "int8"})
    reference = torch.compile(
        model, backend="graphopt", options={"strict": True, "quantize": "int8", "target": "reference"}
    )
    ids = torch.randint(1, 90, (2, 7))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    ask: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False}
    for _ in range(2):
        assert torch.equal(compiled.generate(ids, **ask), reference.generate(ids, **ask))
        with torch.no_grad():
            for each in (model, compiled):
                each.model.layers[1].self_attn.k_proj.weight.mul_(-2)
