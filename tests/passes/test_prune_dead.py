"""prune_dead: what it removes, one test for each reason to refuse, and equality with eager on blocks at random."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from graphopt.passes import PIPELINE
from graphopt.passes.prune.prune_dead import prune_dead
from graphopt.pruning import operations
from graphopt.testing import assert_not_applied, strategies, trace
from graphopt.testing import check_pass as check_fully
from graphopt.testing.blocks import Block, BlockShape

PASSES = [p for p in PIPELINE if p.__name__ not in ("merge_parallel_linears", "prune_dead")] + [prune_dead]
D = 8


# Each kind of rewrite is run on a few inputs; the blocks at random try them all.
check_pass = functools.partial(check_fully, verify="sample")


def weights(graph_module: fx.GraphModule) -> set[tuple[int, ...]]:
    """The shapes of the pruned matrices of a graph."""
    nodes = [node for node in graph_module.graph.nodes if node.target is operations.prune_weight]
    return {tuple(node.meta["val"].shape) for node in nodes if node.meta["val"].dim() == 2}


def heads_of(graph_module: fx.GraphModule) -> list[tuple[int, int]]:
    """Query and key/value heads of each attention of a graph."""
    found = [node for node in graph_module.graph.nodes if str(node.target) == "graphopt.attention.default"]
    return [(node.args[0].meta["val"].shape[1], node.args[1].meta["val"].shape[1]) for node in found]


class Attention(nn.Module):
    """Self- or cross-attention of 4 heads of 8 channels; every way in which heads are kept apart or mixed."""

    def __init__(self, kv_heads: int = 4, bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.q, self.o = nn.Linear(32, 32, bias=bias), nn.Linear(32, 32, bias=bias)
        self.k, self.v = nn.Linear(32, D * kv_heads, bias=bias), nn.Linear(32, D * kv_heads, bias=bias)

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, D)).transpose(1, 2)

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        source = x if memory is None else memory
        q, k, v = self.split(self.q(x)), self.split(self.k(source)), self.split(self.v(source))
        mixed = F.scaled_dot_product_attention(q, k, v, enable_gqa=k.shape[1] != q.shape[1])
        return self.o(mixed.transpose(1, 2).flatten(2))

    def kill(self, *heads: int) -> Attention:
        with torch.no_grad():
            for head in heads:
                self.o.weight[:, head * D : (head + 1) * D] = 0
        return self.eval().requires_grad_(False)


def x(length: int = 5) -> Tensor:
    return torch.randn(2, length, 32, generator=torch.Generator().manual_seed(0))


def test_heads_that_the_output_projection_ignores() -> None:
    graph = check_pass(PASSES, Attention().kill(0, 2), [x()], count=1)
    assert weights(graph.after) == {(16, 32), (32, 16)}
    assert heads_of(graph.after) == [(2, 2)]


def test_heads_whose_values_are_zero() -> None:
    subject = Attention().kill()
    subject.v.weight[D : 2 * D], subject.v.bias[D : 2 * D] = 0, 0
    graph = check_pass(PASSES, subject, [x()], count=1)
    assert weights(graph.after) == {(24, 32), (32, 24)}


def test_a_bias_alone_keeps_a_head_alive() -> None:
    subject = Attention().kill()
    subject.v.weight[D : 2 * D] = 0
    assert_not_applied(PASSES, subject, [x()])


def test_a_gate_kills_a_head() -> None:
    class Gated(Attention):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Parameter(torch.tensor([1.0, 0.0, 0.5, 2.0]))

        def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
            q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
            mixed = F.scaled_dot_product_attention(q, k, v) * self.gate[:, None, None]
            return self.o(mixed.transpose(1, 2).flatten(2))

    graph = check_pass(PASSES, Gated().kill(), [x()], count=1)
    assert heads_of(graph.after) == [(3, 3)]


def test_key_value_heads_go_with_their_whole_group() -> None:
    graph = check_pass(PASSES, Attention(kv_heads=2).kill(0, 1), [x()], count=1)
    assert heads_of(graph.after) == [(2, 1)]
    assert weights(graph.after) == {(16, 32), (8, 32), (32, 16)}


def test_groups_that_lose_unequally_many_heads() -> None:
    graph = check_pass(PASSES, Attention(kv_heads=2).kill(1), [x()], count=1)
    assert sorted(heads_of(graph.after)) == [(1, 1), (2, 1)]


def test_cross_attention() -> None:
    graph = check_pass(PASSES, Attention().kill(3), [x(), x(7)], count=1)
    assert heads_of(graph.after) == [(3, 3)]


def test_all_heads_dead_leaves_one() -> None:
    graph = check_pass(PASSES, Attention().kill(0, 1, 2, 3), [x()], count=1)
    assert heads_of(graph.after) == [(1, 1)]


class FeedForward(nn.Module):
    """Gated or plain, with separate or fused projections."""

    def __init__(self, activation: Callable[[Tensor], Tensor], gated: bool, fused: bool = False) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.up, self.down = nn.Linear(32, 96 if fused else 48), nn.Linear(48, 32)
        self.gate = nn.Linear(32, 48, bias=False) if gated and not fused else None
        self.activation, self.fused = activation, fused
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        up = self.up(x)
        if self.fused:
            gate, up = up.chunk(2, -1)
            return self.down(self.activation(gate) * up)
        if self.gate is not None:
            return self.down(self.activation(self.gate(x)) * up)
        return self.down(self.activation(up))


@pytest.mark.parametrize(
    ("activation", "gated", "fused"), [(F.silu, True, False), (F.gelu, True, True), (F.relu, False, False)]
)
def test_channels_that_the_down_projection_ignores(activation: Any, gated: bool, fused: bool) -> None:
    subject = FeedForward(activation, gated, fused)
    subject.down.weight[:, 3:11] = 0
    graph = check_pass(PASSES, subject, [x()], count=1)
    assert {(40, 32), (32, 40)} == weights(graph.after)


def test_zero_rows_of_gate_and_up() -> None:
    subject = FeedForward(F.silu, True)
    subject.gate.weight[:8] = 0
    subject.up.weight[20:24], subject.up.bias[20:24] = 0, 0
    graph = check_pass(PASSES, subject, [x()], count=1)
    assert weights(graph.after) == {(36, 32), (32, 36)}


def test_an_activation_that_is_not_zero_at_zero() -> None:
    subject = FeedForward(torch.sigmoid, False)
    subject.up.weight[:8], subject.up.bias[:8] = 0, 0
    assert_not_applied(PASSES, subject, [x()])


def test_three_linears_in_a_row() -> None:
    chain = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 8))
    chain.eval().requires_grad_(False)
    chain[2].weight[:, 10:20], chain[4].weight[:, :16] = 0, 0
    graph = check_pass(PASSES, chain, [x()], count=2)
    assert {(38, 32), (48, 38), (8, 48)} <= weights(graph.after)


def test_models_without_dead_heads_are_left_alone() -> None:
    graph = assert_not_applied(PASSES, Attention().kill(), [x()])
    assert not graph.reports[-1].refusals


class Watched(Attention):
    """What a forward hook on the query projection does: the value is read elsewhere."""

    def forward(self, x: Tensor, memory: Tensor | None = None) -> tuple[Tensor, Tensor]:
        made = self.q(x)
        q, k, v = self.split(made), self.split(self.k(x)), self.split(self.v(x))
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.o(mixed.transpose(1, 2).flatten(2)), made


def test_refused_when_a_hook_returns_a_projection() -> None:
    assert_not_applied(PASSES, Watched().kill(1), [x()], reason="is returned to the caller, or seen by a hook")


def test_refused_when_a_hook_reads_a_projection() -> None:
    subject, seen = Attention().kill(1), []
    subject.q.register_forward_hook(lambda module, args, output: seen.append(output.norm()))
    compiled = trace(lambda x: (subject(x), seen.pop()), PASSES)
    with torch.no_grad():
        got, want = compiled(x())[0], subject(x())
    torch.testing.assert_close(got, want)
    (graph,) = compiled.graphs
    assert graph.reports[-1].rewrites == 0
    assert "a hook that reads it" in graph.refusals[-1].reason


def test_refused_when_attention_weights_are_returned() -> None:
    class Explained(Attention):
        def forward(self, x: Tensor, memory: Tensor | None = None) -> tuple[Tensor, Tensor]:
            q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
            seen = torch.softmax(q @ k.transpose(-1, -2), -1)
            return self.o((seen @ v).transpose(1, 2).flatten(2)), seen

    assert_not_applied(PASSES, Explained().kill(1), [x()], reason="attention weights are returned to the caller")


def test_refused_when_a_projection_is_shared() -> None:
    class Shared(Attention):
        def __init__(self) -> None:
            super().__init__()
            self.second = nn.Linear(32, 32)

        def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
            q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
            mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            return self.o(mixed) + self.second(mixed)

    assert_not_applied(PASSES, Shared().kill(1), [x()], reason="a shared projection")


def test_refused_when_dead_in_one_of_two_tied_uses() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Attention().kill(1), Attention().kill()
            self.second.q.weight = self.first.q.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x))

    assert_not_applied(PASSES, Tied(), [x()], reason="is used twice (tied)")


def test_refused_when_dropout_is_active() -> None:
    class Dropping(FeedForward):
        def forward(self, x: Tensor) -> Tensor:
            return self.down(F.dropout(F.relu(self.up(x)), 0.5))

    subject = Dropping(F.relu, False)
    subject.down.weight[:, :8] = 0
    assert_not_applied(PASSES, subject, [x()], reason="random numbers")


def test_refused_when_the_weight_is_an_argument() -> None:
    weight, bias = torch.randn(8, 32), torch.randn(8)
    assert_not_applied(
        PASSES, lambda x, weight: F.linear(x, weight, bias), [x(), weight.index_fill(1, torch.arange(8), 0)]
    )


def test_training_keeps_dead_heads() -> None:
    """A dead head still gets gradients, which may bring it back: nothing is removed from training graphs."""
    subject = Attention().kill(1).requires_grad_(True)
    compiled = trace(subject, PASSES)
    compiled(x()).sum().backward()
    assert [graph.kind for graph in compiled.graphs] == ["forward", "backward"]
    assert all(report.name != "prune_dead" for graph in compiled.graphs for report in graph.reports)
    assert subject.o.weight.grad[:, D : 2 * D].abs().sum() > 0


@settings(max_examples=6, deadline=None)
@given(strategies.transformer_blocks(), st.data())
def test_blocks_at_random(case: tuple[Block, list[Any]], data: st.DataObject) -> None:
    block, inputs = case
    shape: BlockShape = block.shape
    for head in data.draw(st.sets(st.integers(0, shape.heads - 1)), label="dead heads"):
        block.o.weight[:, head * shape.head_size : (head + 1) * shape.head_size] = 0
    for channel in data.draw(st.sets(st.integers(0, shape.hidden - 1)), label="dead channels"):
        block.down.weight[:, channel] = 0
    check_fully(PASSES, block, inputs, second=[])
