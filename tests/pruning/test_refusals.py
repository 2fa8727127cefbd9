"""What keeps the heads of a whole Hugging Face model: each reason by name, and answers that are still eager's."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import graphopt
from tests.pruning.models import done_by
from tests.pruning.test_models import dying, pruned
from tests.suite import door
from tests.suite.architectures import BY_NAME

OPTIONS = {"target": "reference", "strict": True}


@pytest.fixture
def model() -> Any:
    """A BERT whose attentions have a dead head each, with the attention that can return its weights."""
    made = dying("bert")
    made.set_attn_implementation("eager")
    return made


def batch() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return BY_NAME["bert"].inputs(2)


def refused(model: Any, **arguments: Any) -> tuple[list[str], int]:
    """The reasons of prune_dead, and how much it removed all the same."""
    report = graphopt.explain(model, options=OPTIONS, **batch(), **arguments)
    return [refusal.reason for done in done_by(report, "prune_dead") for refusal in done.refusals], pruned(report)


def test_attention_weights_returned_to_the_caller(model: Any) -> None:
    """Of all layers: only the FFNs shrink. Without the weights the heads go too."""
    reasons, removed = refused(model, output_attentions=True)
    assert reasons == ["attention weights are returned to the caller"] * 2
    others, more = refused(model)
    assert not others and more > removed
    want = model(**batch(), output_attentions=True)
    got = door.compiled(model, **OPTIONS)(**batch(), output_attentions=True)
    torch.testing.assert_close(got.attentions, want.attentions, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got.last_hidden_state, want.last_hidden_state, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_hooks_on_the_projections(model: Any, name: str) -> None:
    seen: list[torch.Tensor] = []
    projection = model.encoder.layer[0].attention.self.get_submodule(name)
    projection.register_forward_hook(lambda module, args, output: seen.append(output))
    reasons, _ = refused(model)
    # Keys and values may stay whole while queries and the output projection shrink; queries may not.
    assert [("seen by a hook" in reason) for reason in reasons] == ([True] if name == "query" else [])
    seen.clear()
    want = model(**batch()).last_hidden_state
    got = door.compiled(model, **OPTIONS)(**batch()).last_hidden_state
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert seen[-1].shape == (2, 11, 64)
    torch.testing.assert_close(seen[-1], seen[0], rtol=1e-4, atol=1e-5)


def test_shared_projections_and_heads_zero_in_one_of_two_tied_uses(model: Any) -> None:
    """Both layers share a query projection; the head is dead in the first alone."""
    first, second = (layer.attention for layer in model.encoder.layer)
    second.self.query = first.self.query
    second.output.dense.weight.normal_(0, 0.1)
    reasons, _ = refused(model)
    assert len(reasons) == 1 and "is used twice (tied)" in reasons[0]
    got, want = door.compiled(model, **OPTIONS)(**batch()), model(**batch())
    torch.testing.assert_close(got.last_hidden_state, want.last_hidden_state, rtol=1e-4, atol=1e-5)


def test_training_mode(model: Any) -> None:
    """Dropout draws numbers for all heads, and dead ones get gradients: nothing is removed."""
    model.train().requires_grad_(True)
    results = []
    for subject in (model, door.compiled(model, **OPTIONS)):
        model.zero_grad()
        torch.manual_seed(3)
        result = subject(**batch()).last_hidden_state
        result.square().mean().backward()
        results.append((result.detach(), model.encoder.layer[0].attention.output.dense.weight.grad.clone()))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)
    assert results[1][1][:, 16:32].abs().sum() > 0
