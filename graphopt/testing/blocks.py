"""Transformer blocks drawn at random: heads, norm, activation, rotary form, mask and cache as real models vary them."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

NORMS = ("rms", "rms_gemma", "layer")
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")
ROPES = ("half", "interleaved", "none")
MASKS = ("none", "causal", "additive", "boolean")
CACHES = ("none", "growing", "fixed")


@dataclasses.dataclass(frozen=True)
class BlockShape:
    """What a block is made of; kv_heads divides heads."""

    heads: int = 4
    kv_heads: int = 2
    head_size: int = 8
    hidden: int = 16
    norm: str = "rms"
    activation: str = "silu"
    gated: bool = True
    rope: str = "half"
    mask: str = "causal"
    cache: str = "none"
    fused_attention: bool = True
    bias: bool = False
    dtype: torch.dtype = torch.float32


class Block(nn.Module):
    """One pre-norm block of attention and MLP. forward(x, past) -> (y, keys, values); past is None without a cache."""

    def __init__(self, shape: BlockShape) -> None:
        super().__init__()
        self.shape = shape
        wide, narrow = shape.heads * shape.head_size, shape.kv_heads * shape.head_size
        model = wide
        self.q = nn.Linear(model, wide, bias=shape.bias)
        self.k = nn.Linear(model, narrow, bias=shape.bias)
        self.v = nn.Linear(model, narrow, bias=shape.bias)
        self.o = nn.Linear(wide, model, bias=False)
        self.up = nn.Linear(model, shape.hidden, bias=shape.bias)
        self.gate = nn.Linear(model, shape.hidden, bias=False) if shape.gated else None
        self.down = nn.Linear(shape.hidden, model, bias=shape.bias)
        self.scale = nn.Parameter(torch.rand(2, model))
        self.to(shape.dtype)

    def extra_repr(self) -> str:
        return str(self.shape)

    def forward(self, x: Tensor, past: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor, Tensor]:
        attended, keys, values = self.attend(self.norm(x, 0), past)
        x = x + attended
        inner = self.norm(x, 1)
        up = self.up(inner)
        active = self.activate(self.gate(inner)) * up if self.gate is not None else self.activate(up)
        return x + self.down(active), keys, values

    def norm(self, x: Tensor, index: int) -> Tensor:
        weight = self.scale[index]
        if self.shape.norm == "layer":
            return F.layer_norm(x, x.shape[-1:], weight)
        wide = x.float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        if self.shape.norm == "rms_gemma":
            return (normed * (1.0 + weight.float())).to(x.dtype)
        return weight * normed.to(x.dtype)

    def activate(self, x: Tensor) -> Tensor:
        if self.shape.activation == "gelu_tanh":
            return F.gelu(x, approximate="tanh")
        chosen: Any = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu}[self.shape.activation]
        result: Tensor = chosen(x)
        return result

    def attend(self, x: Tensor, past: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
        shape, (batch, length, _) = self.shape, x.shape
        q, k, v = (
            linear(x).view(batch, length, -1, shape.head_size).transpose(1, 2) for linear in (self.q, self.k, self.v)
        )
        start = past[0].shape[2] if past is not None and shape.cache == "growing" else 0
        q, k = (self.rotate(part, start) for part in (q, k))
        if past is not None and shape.cache == "growing":
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        elif past is not None:
            places = torch.arange(length, device=x.device)
            k, v = past[0].index_copy_(2, places, k), past[1].index_copy_(2, places, v)
        return self.o(self.mix(q, k, v).transpose(1, 2).reshape(batch, length, -1)), k, v

    def rotate(self, x: Tensor, start: int) -> Tensor:
        if self.shape.rope == "none":
            return x
        half = x.shape[-1] // 2
        frequency = 1.0 / (100.0 ** (torch.arange(half, device=x.device).float() / half))
        angle = torch.outer(torch.arange(start, start + x.shape[2], device=x.device).float(), frequency)
        if self.shape.rope == "half":
            cos, sin = (torch.cat([part, part], -1).to(x.dtype) for part in (angle.cos(), angle.sin()))
            return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin
        cos, sin = (part.repeat_interleave(2, -1).to(x.dtype) for part in (angle.cos(), angle.sin()))
        return x * cos + torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2) * sin

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        groups = self.shape.heads // self.shape.kv_heads
        mask = self.visible(q.shape[2], k.shape[2], q)
        if self.shape.fused_attention:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=groups > 1)
        k, v = (part.repeat_interleave(groups, 1) for part in (k, v))
        scores = q @ k.transpose(-1, -2) * self.shape.head_size**-0.5
        if mask is not None:
            scores = scores.masked_fill(~mask, torch.finfo(q.dtype).min) if mask.dtype == torch.bool else scores + mask
        return torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype) @ v

    def visible(self, rows: int, columns: int, like: Tensor) -> Tensor | None:
        if self.shape.mask == "none":
            return None
        visible = torch.ones(rows, columns, dtype=torch.bool, device=like.device).tril(columns - rows)
        if self.shape.mask in ("causal", "boolean"):
            return visible
        return torch.where(visible, 0.0, torch.finfo(like.dtype).min).to(like.dtype)


@st.composite
def transformer_blocks(
    draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
) -> tuple[Block, list[Any]]:
    """(block in eval mode, its inputs) of random shape."""
    kv_heads = draw(st.sampled_from((1, 2)))
    shape = BlockShape(
        heads=kv_heads * draw(st.sampled_from((1, 2, 3))),
        kv_heads=kv_heads,
        head_size=draw(st.sampled_from((4, 8))),
        hidden=draw(st.sampled_from((8, 12))),
        norm=draw(st.sampled_from(NORMS)),
        activation=draw(st.sampled_from(ACTIVATIONS)),
        gated=draw(st.booleans()),
        rope=draw(st.sampled_from(ROPES)),
        mask=draw(st.sampled_from(MASKS)),
        cache=draw(st.sampled_from(CACHES)),
        fused_attention=draw(st.booleans()),
        bias=draw(st.booleans()),
        dtype=draw(st.sampled_from(dtypes)),
    )
    batch, length, room = (draw(st.integers(low, 4)) for low in (1, 1, 1))
    torch.manual_seed(0)
    block = Block(shape).eval().requires_grad_(False)
    inputs: list[Any] = [torch.randn(batch, length, shape.heads * shape.head_size).to(shape.dtype)]
    if shape.cache != "none":
        held = (batch, kv_heads, room if shape.cache == "growing" else length + room, shape.head_size)
        inputs.append((torch.randn(held).to(shape.dtype), torch.randn(held).to(shape.dtype)))
    return block, inputs
