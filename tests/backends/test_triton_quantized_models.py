"""Models with quantised weights on the target triton, under the interpreter: no fallback, the meaning's answers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import graphopt
from tests.backends.test_triton_models import decoder

pytest.importorskip("transformers")
BUILD = decoder("Llama", hidden_size=64, intermediate_size=96)


def tokens(model: nn.Module, count: int, **options: Any) -> torch.Tensor:
    torch._dynamo.reset()
    compiled: Any = torch.compile(model.forward, backend="graphopt", options=options)
    ids = torch.arange(5)[None]
    with torch.no_grad():
        cache = None
        found = []
        for _ in range(count):
            output = compiled(input_ids=ids, past_key_values=cache, use_cache=True)
            cache, ids = output.past_key_values, output.logits[:, -1:].argmax(-1)
            found.append(ids)
    return torch.cat(found, 1)


@pytest.mark.rotate(one_in=3)
@pytest.mark.parametrize(("scheme", "embeddings"), [("int8", False), ("int4", True), ("int8-dynamic", False)])
def test_a_llama_gives_the_tokens_of_the_meaning(scheme: str, embeddings: bool) -> None:
    """strict: nothing may be left to torch."""
    torch.manual_seed(0)
    model, quantize = BUILD(1), graphopt.Quantize(scheme, embeddings=embeddings)
    want = tokens(model, 3, target="reference", quantize=quantize)
    assert tokens(model, 3, target="triton", quantize=quantize, strict=True).equal(want)


def test_a_changed_weight_gives_the_next_answer_right() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(96, 64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.linear(x) * 2
            return found

    torch.manual_seed(0)
    model, x = Twice().eval(), torch.randn(2, 96)
    options = {"target": "triton", "quantize": "int4", "strict": True}
    compiled: Any = torch.compile(model, backend="graphopt", options=options)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=0.3, atol=0.3)
        model.linear.weight.neg_()
        torch.testing.assert_close(compiled(x), model(x), rtol=0.3, atol=0.3)
        model.linear.weight = nn.Parameter(torch.randn(64, 96))
        torch.testing.assert_close(compiled(x), model(x), rtol=0.3, atol=3.0)
