"""Why did a pass not fire? A small Llama whose RMSNorm is altered in five ways, and what the report says of each.

python examples/near_misses.py
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel
from transformers.models.llama import modeling_llama

import graphopt

Norm = Callable[[Tensor, Tensor, float], Tensor]


def as_it_is(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Llama's own."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def over_another_dimension(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The mean runs over the tokens."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-2, keepdim=True) + eps)).to(x.dtype)


def epsilon_outside_of_the_root(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The root is taken first."""
    wide = x.float()
    return weight * (wide * (torch.rsqrt(wide.pow(2).mean(-1, keepdim=True)) + eps)).to(x.dtype)


def in_a_narrow_dtype(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Nothing is widened to float32."""
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))


def absolute_values(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Absolute values instead of squares."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.abs().mean(-1, keepdim=True) + eps)).to(x.dtype)


def scale_used_twice(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The scale is needed outside of the norm as well."""
    wide = x.float()
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * (wide * scale).to(x.dtype) + scale.to(x.dtype)


NORMS: tuple[Norm, ...] = (
    as_it_is,
    over_another_dimension,
    epsilon_outside_of_the_root,
    in_a_narrow_dtype,
    absolute_values,
    scale_used_twice,
)


def altered(norm: Norm) -> nn.Module:
    """A Llama of one layer in bfloat16 whose norms compute `norm`."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        use_cache=False,
    )
    torch.manual_seed(0)
    model: nn.Module = LlamaModel(config).eval().bfloat16()

    class Altered(modeling_llama.LlamaRMSNorm):  # type: ignore[misc]  # transformers has no types
        def forward(self, hidden_states: Tensor) -> Tensor:
            return norm(hidden_states, self.weight, self.variance_epsilon)

    for module in model.modules():
        if isinstance(module, modeling_llama.LlamaRMSNorm):
            module.__class__ = Altered
    return model


def main() -> None:
    """Explain each model; print how often the norm was recognised and the reasons where it was not."""
    for norm in NORMS:
        torch.compiler.reset()
        with torch.no_grad():
            report = graphopt.explain(altered(norm), torch.arange(5)[None], options={"target": "reference"})
        (done,) = [each for each in report.graphs[0].passes if each.name == "recognize_rms_norm"]
        print(f"{norm.__name__}: {done.rewrites} of 3 norms recognised")
        for reason in dict.fromkeys(f"{each.reason} ({each.where.rpartition('/')[2]})" for each in done.refusals):
            print(f"    {reason}")


if __name__ == "__main__":
    main()
