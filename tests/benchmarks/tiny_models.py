"""Tiny models with random weights whole through generated kernels under the interpreter, beside eager.

    python -m tests.benchmarks.tiny_models

Each model is compiled by the public door for the target triton, in float32, on CPU tensors. The error is the largest
difference of the answers to a prompt of 7 tokens (an image for ViT), the tokens are those of a greedy generation with
the model's own cache: the first graph, and the steps behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from graphopt import report
from tests.backends.test_triton_models import DECODERS, bert

TOKENS = 12
Answer = Callable[[nn.Module], Tensor]


def t5(layers: int) -> nn.Module:
    config = transformers.T5Config(
        d_model=32, d_kv=8, d_ff=48, num_layers=layers, num_heads=4, vocab_size=99, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config).eval()  # type: ignore[no-any-return]


def vit(layers: int) -> nn.Module:
    config = transformers.ViTConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4, image_size=32,
        patch_size=8,
    )  # fmt: skip
    return transformers.ViTModel(config).eval()  # type: ignore[no-any-return]


def cases() -> Iterator[tuple[str, Callable[[int], nn.Module], Answer, bool]]:
    """The name of a model, what builds it, its answer, and whether it generates."""
    ids, image = torch.arange(14).view(2, 7) + 3, torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)

    def logits(model: nn.Module) -> Tensor:
        more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
        return model(input_ids=ids, use_cache=False, **more).logits  # type: ignore[no-any-return]

    for name in ("Llama", "Qwen3", "Gemma2", "GPT2", "Mixtral"):
        yield name, DECODERS[name], logits, True
    yield "T5", t5, logits, True
    yield "BERT", bert, lambda model: model(input_ids=ids).last_hidden_state, False
    yield "ViT", vit, lambda model: model(image).last_hidden_state, False


def generated(model: Any) -> Tensor:
    ids = torch.arange(14).view(2, 7) + 3
    settings = {"max_new_tokens": TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return model.generate(ids, **settings)  # type: ignore[no-any-return]


def main() -> None:
    """Print a line for each model."""
    print("| model | largest error | largest answer | tokens equal | left to torch |")
    print("|---|---|---|---|---|")
    for name, build, answer, generates in cases():
        torch.manual_seed(0)
        torch.compiler.reset()
        model = build(2)
        with torch.no_grad(), report.collecting() as collected:
            want, tokens = answer(model), generated(model) if generates else None
            model.compile(backend="graphopt", options={"target": "triton"})
            got = answer(model)
            equal = "no tokens" if tokens is None else f"{int((generated(model) == tokens).sum())} of {tokens.numel()}"
        fallbacks = [fallback.what for graph in collected.graphs for fallback in graph.fallbacks]
        left = {what.split("(")[-1].rstrip(")") for what in fallbacks}
        error, largest = float((got - want).abs().max()), float(want.abs().max())
        print(f"| {name} | {error:.1e} | {largest:.2f} | {equal} | {', '.join(sorted(left)) or '-'} |", flush=True)


if __name__ == "__main__":
    main()
