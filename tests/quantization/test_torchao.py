"""Models that torchao has quantised pass through: its weights stay as they are, all else is optimised."""

from __future__ import annotations

import pytest
import torch
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_
from transformers import LlamaConfig, LlamaForCausalLM

import graphopt

pytestmark = pytest.mark.filterwarnings("ignore")  # torchao's own, about what it cannot load


@pytest.fixture(params=["reference", pytest.param("cpu", marks=pytest.mark.rotate(one_in=8))])
def target(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 128}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=False)).eval().bfloat16()


@pytest.mark.rotate(one_in=6)
@pytest.mark.parametrize("config", [Int8WeightOnlyConfig(), Int8DynamicActivationInt8WeightConfig()])
@pytest.mark.parametrize("rows", (1, 3))
def test_generates_the_tokens_of_eager(config: object, rows: int, target: str) -> None:
    model = llama()
    quantize_(model, config)
    prompt = torch.randint(0, 128, (rows, 9))
    expected = model.generate(prompt, max_new_tokens=8, do_sample=False)
    model.forward = torch.compile(model.forward, backend="graphopt", options={"target": target})
    assert torch.equal(model.generate(prompt, max_new_tokens=8, do_sample=False), expected)
    assert graphopt.counters["rewrites"] > 0


def test_quantize_takes_what_torchao_left(target: str) -> None:
    model = llama()
    quantize_(model.model, Int8WeightOnlyConfig())
    ids = torch.randint(0, 128, (1, 9))
    with torch.no_grad():
        expected = model(ids).logits
        report = graphopt.explain(model, ids, options={"quantize": "int8", "target": target})
        out = torch.compile(model, backend="graphopt", options={"quantize": "int8", "target": target})(ids).logits
    (graph,) = report.graphs
    assert sum(each.rewrites for each in graph.passes if each.name == "quantize_linears") == 1, "the head alone"
    torch.testing.assert_close(out, expected, rtol=0.05, atol=0.05 * expected.abs().max().item())
