"""The ways in which models spell attention as products and a softmax, and what each means in one operation.

    s = matmul(q, k.transpose(-1, -2)) * scale + mask                              # most models
    s = baddbmm(bias, q, k.transpose(-1, -2), alpha=scale).view(B, H, S, T) + mask # BLOOM
    y = matmul(softmax(s, -1), v)

A bias [B * H, 1, T] (ALiBi's, Press et al., 2022) becomes one of [B, H, 1, T], to which the mask is added first. Left
alone: scores that are filled where a mask hides them (MPT's `masked_fill`). Filling hides NaN and infinities of keys
that nobody should see, which a mask that is added lets through, and makes a row that sees nothing a plain mean.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from graphopt import match, ops, shapes

aten = torch.ops.aten


@functools.cache
def rules() -> tuple[match.Rule, ...]:
    """A rule for each spelling, the longer ones first."""
    return (*_with_bias_first(), *_plain())


def _softmax(scores: Tensor, dtype: torch.dtype, widened: bool) -> Tensor:
    if widened:
        return torch.softmax(scores, -1, dtype=torch.float32).to(dtype)
    return torch.softmax(scores, -1)


def _plain() -> list[match.Rule]:
    found = []
    spellings = [
        (scaled, capped, masked, widened, False)
        for widened in (True, False)
        for scaled, capped in (("mul", True), ("mul", False), ("div", False), ("", False))
        for masked in (True, False)
    ]
    for spelling in (*spellings, ("", False, True, False, True), ("", False, False, False, True)):
        scaled, capped, masked, _, safe = spelling
        examples: dict[str, Any] = {"q": (2, 4, 3, 8), "kt": (2, 4, 8, 5), "v": (2, 4, 5, 8)}
        examples |= {"scale": 0.34375} if scaled else {}
        examples |= {"cap": 50.25} if capped else {}
        examples |= {"mask": (2, 1, 3, 5)} if masked else {}
        spelled = match.pattern(name="attention", **examples)(_chain(*spelling))
        found.append(match.Rule(spelled, _replacement(scaled, safe), _why_not))
    return found


def _chain(scaled: str, capped: bool, masked: bool, widened: bool, safe: bool) -> Callable[..., Tensor]:
    """One spelling of attention; `kt` are the keys, transposed already."""

    def attention(q: Tensor, kt: Tensor, v: Tensor, scale: float = 1.0, cap: float = 0.0, mask: Any = None) -> Tensor:
        scores = q @ kt
        if scaled:
            scores = scores * scale if scaled == "mul" else scores / scale
        if capped:
            scores = torch.tanh(scores / cap) * cap
        if masked:
            scores = scores + mask
        if safe:
            weights: Tensor = aten._safe_softmax(scores, -1)
            return weights @ v
        return _softmax(scores, q.dtype, widened) @ v

    return attention


def _replacement(scaled: str, safe: bool) -> Callable[..., Any]:
    def attention(q: Tensor, kt: Tensor, v: Tensor, scale: float = 1.0, cap: float = 0.0, mask: Any = None) -> Any:
        factor = 1.0 / scale if scaled == "div" else scale
        return ops.attention(q, kt.mT, v, mask, scale=factor, softcap=cap, nan_rows=not safe)

    return attention


def _why_not(found: match.Match) -> str:
    if found.tensor("q").dim() != 4:
        return f"queries have {found.tensor('q').dim()} dimensions, not batch, head, position, channel"
    added = [found.tensor(name).dtype for name in ("mask", "bias") if name in found.values]
    if any(dtype != found.tensor("q").dtype for dtype in added):
        return "the mask has another dtype than the queries"
    return ""


def _with_bias_first() -> list[match.Rule]:
    found = []
    for widened, masked in ((True, True), (True, False), (False, True), (False, False)):

        def spelled(
            q: Tensor, k: Tensor, v: Tensor, scale: float, beta: float, bias: Tensor, mask: Any = None,
            widened: bool = widened,
        ) -> Tensor:  # fmt: skip
            (batch, heads, rows, _), length = q.shape, k.shape[2]
            folded = q.reshape(batch * heads, rows, -1), k.reshape(batch * heads, length, -1).transpose(1, 2)
            scores = torch.baddbmm(bias, *folded, beta=beta, alpha=scale).view(batch, heads, rows, length)
            weights = _softmax(scores if mask is None else scores + mask, q.dtype, widened)
            seen = torch.bmm(weights.view(batch * heads, rows, length), v.reshape(batch * heads, length, -1))
            return seen.view(batch, heads, rows, v.shape[3])

        examples: dict[str, Any] = {"q": (2, 4, 3, 8), "k": (2, 4, 5, 8), "v": (2, 4, 5, 8), "scale": 0.34375}
        examples |= {"beta": 0.71875, "bias": (8, 1, 5)} | ({"mask": (2, 1, 3, 5)} if masked else {})
        found.append(match.Rule(match.pattern(name="attention", **examples)(spelled), _unfolded, _why_not_unfolded))
    return found


def _unfolded(q: Tensor, k: Tensor, v: Tensor, scale: float, beta: float, bias: Tensor, mask: Any = None) -> Any:
    if bias.dim() == 3 and not shapes.same(bias.shape[0], 1):
        bias = bias.view(*q.shape[:2], *bias.shape[1:])
    return ops.attention(q, k, v, bias if mask is None else bias + mask, scale=scale, nan_rows=True)


def _why_not_unfolded(found: match.Match) -> str:
    if found["beta"] != 1:
        return f"its bias counts {found['beta']} times"
    if "mask" in found.values and found.tensor("q").dtype == torch.float16:
        return "bias and mask may be added in another order only where their sum cannot overflow"
    return _why_not(found)
