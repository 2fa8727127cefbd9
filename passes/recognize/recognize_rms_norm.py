"""Write root mean square normalisation as one `graphopt.rms_norm`.

    s = rsqrt(mean(x ** 2, -1, keepdim) + eps);  y = weight * (x * s)
becomes
    y = graphopt.rms_norm(x, weight, eps)

Recognised, in whatever dtype: Llama (in float32, rounded, then times the weight), Gemma (times 1 + weight in
float32, then rounded), the two without weight. Norms that compute in a narrow dtype are left alone: they round at
every step, and `graphopt.rms_norm` does not.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from graphopt import match
from graphopt.pipeline import graph_pass

EPS = 0.001953125


def _rsqrt_of_mean(x: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


@match.pattern(name="rms_norm", x=(2, 3, 8), weight=(8,), eps=EPS)
def _rounded_first(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return weight * (wide * _rsqrt_of_mean(wide, eps)).to(x.dtype)


@match.pattern(name="rms_norm", x=(2, 3, 8), weight=(8,), eps=EPS)
def _rounded_last(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return (wide * _rsqrt_of_mean(wide, eps) * weight.float()).to(x.dtype)


@match.pattern(name="rms_norm", x=(2, 3, 8), weight=(8,), eps=EPS, offset=0.75)
def _with_offset(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    wide = x.float()
    return (wide * _rsqrt_of_mean(wide, eps) * (weight.float() + offset)).to(x.dtype)


@match.pattern(name="rms_norm", x=(2, 3, 8), eps=EPS)
def _without_weight(x: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return (wide * _rsqrt_of_mean(wide, eps)).to(x.dtype)


def _why_not(found: match.Match) -> str:
    if "weight" in found.values and found.tensor("weight").dim() != 1:
        return f"the weight has {found.tensor('weight').dim()} dimensions"
    return ""


_rms_norm = torch.ops.graphopt.rms_norm

# The narrowest input first: what rounds last is also, on the widened input, what rounds first.
RULES = (
    match.Rule(
        _with_offset, lambda x, weight, eps, offset: _rms_norm(x, weight, eps, offset, False), _why_not
    ),
    match.Rule(
        _rounded_last,
        lambda x, weight, eps: _rms_norm(x, weight, eps, 0.0, x.dtype == torch.float32),
        _why_not,
    ),
    match.Rule(_rounded_first, lambda x, weight, eps: _rms_norm(x, weight, eps), _why_not),
    match.Rule(_without_weight, lambda x, eps: _rms_norm(x, None, eps)),
)


@graph_pass(exactness="rounding", stage="recognize", training=False)
def recognize_rms_norm(graph_module: fx.GraphModule) -> int:
    """Replace the chains of operations that compute RMSNorm by `graphopt.rms_norm`."""
    return match.apply(graph_module, RULES)
