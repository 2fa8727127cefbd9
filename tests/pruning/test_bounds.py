"""The certified bound is never exceeded: random and adversarial inputs try to break it, head by head and together."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from graphopt.pruning import bounds

INPUTS = 1000


@dataclasses.dataclass
class Layer:
    """An attention layer behind a norm, in float64, with the facts that the bound needs."""

    block: bounds.Block
    tensors: list[Tensor]
    q: Tensor
    heads: int

    def output(self, hidden: Tensor, left_out: tuple[int, ...] = ()) -> Tensor:
        """hidden [B, S, d] to [B, S, N], without some heads."""
        block = self.block
        o, v, *rest = self.tensors
        there = iter(rest)
        gain, shift, bias = (next(there) if has else None for has in block.has)
        if shift is not None:
            x = F.layer_norm(hidden, hidden.shape[-1:])
        else:
            x = hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + 1e-6)
        x = x * (1.0 if gain is None else gain + block.gain_offset) + (0.0 if shift is None else shift)
        v, o = (v.t() if block.v_transposed else v), (o.t() if block.o_transposed else o)
        rows = slice(block.first_row, block.first_row + self.heads // block.group * block.size)
        values = x @ v[rows].t() + (0.0 if bias is None else bias[rows])
        values = values.unflatten(-1, (-1, block.size)).transpose(1, 2).repeat_interleave(block.group, 1)
        scores = (x @ self.q.t()).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        mixed = torch.softmax(scores @ scores.transpose(-1, -2), -1) @ values
        mixed[:, list(left_out)] = 0
        return mixed.transpose(1, 2).flatten(2) @ o.t()


def layer(kind: str, heads: int = 4, group: int = 1, size: int = 4, seed: int = 0) -> Layer:
    made = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=made, dtype=torch.float64)

    width = heads * size
    fused = kind == "gpt2"
    rows = width * 3 if fused else width // group
    norm, biased = ("layer", True) if kind in ("bert", "gpt2") else ("rms", False)
    v, o = normal(rows, width) / 4, normal(width, width) / 4
    rest = [normal(width)] + ([normal(width)] if norm == "layer" else []) + ([normal(rows)] if biased else [])
    block = bounds.Block((), size, group, 2 * width if fused else 0, fused, fused, (True, norm == "layer", biased),
                         1.0 if kind == "gemma" else 0.0, math.inf)  # fmt: skip
    tensors = [o.t().contiguous(), v.t().contiguous(), *rest] if fused else [o, v, *rest]
    return Layer(block, tensors, normal(width, width), heads)


KINDS: dict[str, dict[str, Any]] = {
    "llama": {"heads": 6, "group": 3}, "gemma": {"heads": 4, "group": 2}, "bert": {}, "gpt2": {}, "t5": {"heads": 5}
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_never_exceeded(kind: str) -> None:
    """On 1000 random inputs for each architecture; the median ratio says that the bound is no idle one."""
    subject = layer(kind, **KINDS[kind])
    generator = torch.Generator().manual_seed(1)
    scales = 10.0 ** torch.randint(-3, 4, (INPUTS, 1, 1), generator=generator)
    hidden = torch.randn(INPUTS, 3, subject.heads * 4, generator=generator, dtype=torch.float64) * scales
    whole = subject.output(hidden)
    for left_out in [(0,), (1, 2), tuple(range(subject.heads))]:
        changed = (whole - subject.output(hidden, left_out)).square().mean(-1).sqrt()
        limit = bounds.bound(subject.block, subject.tensors, left_out)
        assert changed.max() <= limit
        assert changed.median() > limit / 50


@pytest.mark.parametrize("kind", KINDS)
def test_reached_but_for_the_averaging(kind: str) -> None:
    """With one token, the worst direction of one head comes within rounding of the bound where nothing is shifted."""
    subject = layer(kind, **KINDS[kind])
    if subject.block.has != (True, False, False):
        pytest.skip("a shift is bounded by itself")
    o, v, gain = subject.tensors
    worst = torch.linalg.svd(o[:, :4] @ (v[:4] * (gain + subject.block.gain_offset))).Vh[0]
    hidden = worst[None, None] * 1e3
    changed = (subject.output(hidden) - subject.output(hidden, (0,))).square().mean(-1).sqrt()
    limit = bounds.bound(subject.block, subject.tensors, (0,))
    assert 0.999 * limit <= float(changed) <= limit


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(KINDS)), st.integers(0, 2**16), st.data())
def test_adversarial_inputs(kind: str, seed: int, data: st.DataObject) -> None:
    subject = layer(kind, seed=seed, **KINDS[kind])
    left_out = tuple(sorted(data.draw(st.sets(st.integers(0, subject.heads - 1), min_size=1))))
    limit = bounds.bound(subject.block, subject.tensors, left_out)
    hidden = torch.randn(8, 2, subject.heads * 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    hidden.requires_grad_(True)
    for _ in range(20):  # uphill on the change itself
        changed = (subject.output(hidden) - subject.output(hidden, left_out)).square().mean(-1).sqrt()
        assert changed.max() <= limit
        (slope,) = torch.autograd.grad(changed.sum(), hidden)
        hidden = (hidden + 3.0 * slope).detach().requires_grad_(True)


def test_chosen_heads_stay_within_the_limit() -> None:
    subject = layer("llama", heads=6, group=2)
    single = sorted(bounds.bound(subject.block, subject.tensors, [head]) for head in range(6))
    block = dataclasses.replace(subject.block, limit=single[0] + single[1] * 1.01)
    chosen = bounds.choose(block, subject.tensors, 6)
    assert len(chosen) == 2
    assert dataclasses.replace(block, heads=chosen).holds(subject.tensors)
    assert not dataclasses.replace(block, heads=tuple(range(6))).holds(subject.tensors)


def test_a_dead_head_costs_nothing() -> None:
    subject = layer("llama", heads=4)
    subject.tensors[0][:, 4:8] = 0
    assert bounds.bound(subject.block, subject.tensors, [1]) == 0


def test_spelled_and_read_again() -> None:
    block = dataclasses.replace(layer("gpt2").block, heads=(0, 3), limit=0.25)
    assert bounds.Block.read(block.spell()) == block
