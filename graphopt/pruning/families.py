"""What the configuration of a Hugging Face architecture can say about fewer heads, channels and experts.

A configuration holds one number of heads, of FFN channels and of experts for all layers. Where it has a `head_dim`,
heads can be fewer; GPT-2 and BERT derive the size of a head from that of the model, so that only FFN channels can.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor, nn

from graphopt.errors import ExportError


@dataclasses.dataclass(frozen=True)
class Heads:
    """The projections of a layer's attention, the norm before it, and what that adds to its weight."""

    q: str = "self_attn.q_proj"
    k: str = "self_attn.k_proj"
    v: str = "self_attn.v_proj"
    o: str = "self_attn.o_proj"
    norm: str = "input_layernorm"
    gain_offset: float = 0.0
    expressible: bool = True


@dataclasses.dataclass(frozen=True)
class Channels:
    """The projections of a layer's FFN. gates: all whose rows make its channels; field: of the configuration."""

    down: str = "mlp.down_proj"
    gates: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    activation: str = "mlp.act_fn"
    field: str = "intermediate_size"


@dataclasses.dataclass(frozen=True)
class Experts:
    """A layer's router, and the stacks of its experts."""

    router: str = "mlp.gate"
    stacks: tuple[str, ...] = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
    field: str = "num_local_experts"


@dataclasses.dataclass(frozen=True)
class Family:
    """layers: where a model keeps them, from its base model. transposed: whether its weights are [inputs, outputs]."""

    layers: str = "layers"
    heads: Heads = Heads()
    channels: Channels | None = Channels()
    experts: Experts | None = None
    transposed: bool = False


_LLAMA = Family()
_GEMMA = Family(heads=Heads(gain_offset=1.0))
_MOE = Family(channels=None, experts=Experts())

FAMILIES: dict[str, Family] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "granite"), _LLAMA),
    **dict.fromkeys(("gemma", "gemma2"), _GEMMA),
    "mixtral": _MOE,
    "gpt2": Family(
        "h", Heads("attn.c_attn", "attn.c_attn", "attn.c_attn", "attn.c_proj", "ln_1", expressible=False),
        Channels("mlp.c_proj", ("mlp.c_fc",), "mlp.act", "n_inner"), transposed=True,
    ),
    "bert": Family(
        "encoder.layer",
        Heads("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense",
              expressible=False),
        Channels("output.dense", ("intermediate.dense",), "intermediate.intermediate_act_fn"),
    ),
}  # fmt: skip
FAMILIES["qwen3_moe"] = dataclasses.replace(_MOE, experts=Experts(field="num_experts"))


def family_of(model: nn.Module) -> Family:
    """The family of a Hugging Face model. Raises ExportError for other models."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind not in FAMILIES:
        raise ExportError(
            f"export_pruned() got a model of type {kind or type(model).__name__!r}; it knows the configurations of"
            f" {', '.join(sorted(FAMILIES))}. Compile the model instead: torch.compile prunes any architecture"
        )
    return FAMILIES[kind]


def layers_of(model: nn.Module, family: Family) -> list[tuple[str, nn.Module]]:
    """The layers of a model, each with its dotted name."""
    base: Any = getattr(model, str(model.base_model_prefix), model)
    found = base.get_submodule(family.layers)
    (prefix,) = [name for name, module in model.named_modules() if module is found]
    return [(f"{prefix}.{number}", layer) for number, layer in enumerate(found)]


def matrix(layer: nn.Module, name: str, family: Family) -> Tensor:
    """The weight of a projection as [outputs, inputs]."""
    weight: Any = layer.get_submodule(name).weight
    turned: Tensor = weight.detach().t() if family.transposed else weight.detach()
    return turned
