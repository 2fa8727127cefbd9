"""Whole layers: how much an answer changes without them, and compiled models that leave them out."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import graphopt
from graphopt import PruneLayers, backend, layer_importance
from graphopt.errors import OptionError
from tests.pruning.models import done_by
from tests.suite import door
from tests.suite.architectures import BY_NAME


def tiny(name: str, layers: int = 4) -> Any:
    torch.manual_seed(0)
    config = BY_NAME[name].build().config
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[0]] * layers
    model = type(BY_NAME[name].build())(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.normal_(0, 0.1)
    return model


def stack(model: Any) -> nn.ModuleList:
    return model.encoder.layer if hasattr(model, "encoder") else model.model.layers


def answer(result: Any) -> torch.Tensor:
    return result.logits if hasattr(result, "logits") else result.last_hidden_state


def without(model: Any, *numbers: int) -> Any:
    """A copy whose layers `numbers` hand on what they are given; keys and values are written all the same."""
    twin = copy.deepcopy(model)
    for number in numbers:
        stack(twin)[number].register_forward_hook(lambda module, args, output: args[0])
    return twin


@pytest.mark.parametrize("name", ["llama", pytest.param("bert", marks=pytest.mark.slow)])
def test_importance_is_the_change_of_the_answer(name: str) -> None:
    model, batch = tiny(name), BY_NAME[name].inputs(2)
    importance = layer_importance(model, [batch])
    whole = answer(model(**batch))
    assert len(importance.changes) == 4
    for number, change in enumerate(importance.changes.values()):
        other = answer(without(model, number)(**batch))
        assert change == pytest.approx(float((other - whole).norm() / whole.norm()), rel=1e-4)
    assert not any(layer._forward_hooks for layer in stack(model))


@pytest.mark.parametrize("name, target", [("llama", "reference"),
                                          pytest.param("llama", "cpu", marks=pytest.mark.rotate(one_in=6)),
                                          pytest.param("bert", "reference", marks=pytest.mark.slow),
                                          pytest.param("bert", "cpu", marks=pytest.mark.slow),
                                          pytest.param("gemma2", "reference", marks=pytest.mark.slow)])  # fmt: skip
def test_named_layers_are_left_out(name: str, target: str) -> None:
    model = tiny(name)
    prefix = "encoder.layer" if name == "bert" else "model.layers"
    compiled = door.compiled(
        model, target=target, strict=True, prune=PruneLayers(drop=(f"{prefix}.1", f"{prefix}.2"))
    )
    for rows in (2, 3):
        batch = BY_NAME[name].inputs(rows)
        want = answer(without(model, 1, 2)(**batch))
        torch.testing.assert_close(answer(compiled(**batch)), want, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(want, answer(model(**batch)), rtol=1e-2, atol=1e-3)


def test_the_least_important_go() -> None:
    model, batch = tiny("llama"), BY_NAME["llama"].inputs(2)
    for projection in (stack(model)[2].self_attn.o_proj, stack(model)[2].mlp.down_proj):
        projection.weight *= 1e-3
    importance = layer_importance(model, [batch])
    assert importance.least(0.75) == ("model.layers.2",) and importance.least(1.0) == ()
    prune = PruneLayers(keep=0.75, calibration=importance)
    compiled = door.compiled(model, target="reference", prune=(prune, graphopt.Sparsify(modules="nothing")))
    torch.testing.assert_close(answer(compiled(**batch)), answer(without(model, 2)(**batch)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("target", ["reference", pytest.param("cpu", marks=pytest.mark.slow)])
def test_the_cache_keeps_its_shape(target: str) -> None:
    """What a dropped layer writes into the cache is still there, and generation follows the model without the layer."""
    model = tiny("llama")
    settings: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True}
    batch = BY_NAME["llama"].inputs(2)
    want = without(model, 1).generate(**batch, **settings)
    model.forward = door.compiled(model.forward, target=target, prune=PruneLayers(drop=("model.layers.1",)))
    got = model.generate(**batch, **settings)
    assert got.sequences.tolist() == want.sequences.tolist()
    for one, other in zip(got.past_key_values.layers, want.past_key_values.layers, strict=True):
        torch.testing.assert_close(one.keys, other.keys, rtol=1e-4, atol=1e-5)


def refusals(model: Any, batch: Any, *names: str) -> list[str]:
    report = graphopt.explain(model, options={"target": "reference", "prune": PruneLayers(drop=names)}, **batch)
    return [refusal.reason for done in done_by(report, "drop_layers") for refusal in done.refusals]


def test_refused_when_there_is_no_such_layer() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).requires_grad_(False)
    assert refusals(model, {"input": torch.ones(1, 4)}, "layers.9") == [
        "layers.9: no operation of the graph belongs to it"
    ]


def test_refused_when_what_is_handed_on_cannot_be_told() -> None:
    class Mixed(nn.Module):
        """Two values of one form go in."""

        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Bilinear(4, 4, 4)]).requires_grad_(False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layers[0](x.sin(), x.cos()) + 1

    (reason,) = refusals(Mixed(), {"x": torch.ones(2, 4)}, "layers.0")
    assert reason.endswith("cannot be told from other values")


def test_training_is_left_alone() -> None:
    model, batch = tiny("llama").requires_grad_(True), BY_NAME["llama"].inputs(2)
    compiled = door.compiled(model, target="reference", prune=PruneLayers(drop=("model.layers.1",)))
    torch.testing.assert_close(compiled(**batch).logits, model(**batch).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "keep"),
        ({"keep": 0.5}, "layer_importance"),
        ({"keep": 0.0, "calibration": graphopt.LayerImportance({})}, "greater than 0"),
        ({"drop": "model.layers.1"}, "tuple"),
        ({"keep": 0.5, "drop": ("model.layers.1",)}, "keep"),
    ],
)
def test_wrong_options(given: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        PruneLayers(**given)


def test_experts_are_no_layers() -> None:
    class Block(nn.Module):
        """More experts than the model has layers."""

        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(5))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + sum(expert(x) for expert in self.experts)

    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Block() for _ in range(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.blocks[1](self.blocks[0](x))

    assert set(layer_importance(Stack(), [{"x": torch.ones(1, 4)}]).changes) == {"blocks.0", "blocks.1"}


@pytest.mark.parametrize("prune", ["2:4", PruneLayers(drop=("model.layers.1",))], ids=["sparse", "layers"])
def test_stored_code_is_not_taken_for_what_goes_by_names(prune: Any) -> None:
    """The names of modules and weights are no part of the key of stored code."""
    assert backend._may_reuse(graphopt.Options()) and not backend._may_reuse(graphopt.Options(prune=prune))


def test_importance_needs_layers_inputs_and_an_answer() -> None:
    with pytest.raises(OptionError, match="no ModuleList"):
        layer_importance(nn.Linear(2, 2), [])
    with pytest.raises(OptionError, match="got no inputs"):
        layer_importance(tiny("llama"), [])
