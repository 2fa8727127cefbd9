"""quantize_linears: what it rewrites, one test for each refusal, and right answers after weights change."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import graphopt
from graphopt import Quantize
from graphopt.backend import graphopt as backend
from graphopt.options import Options
from graphopt.passes import PIPELINE, lossy
from graphopt.pipeline import arrange, describe
from graphopt.quantization import operations, schemes
from graphopt.testing import assert_not_applied, check_pass

SCHEMES = ("int8", "int4", "q4_k", "fp8", "nf4", "mxfp4", "int8-dynamic", "fp8-dynamic")


def through(quantize: Quantize | str, last: str = "quantize_linears") -> list:
    """The pipeline up to the named pass."""
    passes = arrange((*PIPELINE, *lossy(Options(quantize=quantize))))
    names = [describe(function).name for function in passes]
    return passes[: names.index(last) + 1]


class Block(nn.Module):
    def __init__(self, features: int = 64, wide: int = 96) -> None:
        super().__init__()
        self.up = nn.Linear(features, wide)
        self.gate = nn.Linear(features, wide, bias=False)
        self.down = nn.Linear(wide, features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.nn.functional.silu(self.gate(x)) * self.up(x))


class Speaker(nn.Module):
    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(80, 64)
        self.block = Block()
        self.head = nn.Linear(64, 80, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        return self.head(x + self.block(x))


def count(graph, op) -> int:
    return sum(node.target is op for node in graph.after.graph.nodes)


def test_off_unless_asked_for() -> None:
    assert lossy(Options()) == ()


@pytest.mark.rotate(one_in=3)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_linears_of_a_block(scheme: str) -> None:
    torch.manual_seed(0)
    graph = check_pass(through(scheme), Block(), [torch.randn(3, 64)], count=3)
    assert count(graph, operations.quantized_linear) == 3


def test_graph_text() -> None:
    check_pass(
        through("int8"),
        nn.Linear(64, 32),
        [torch.randn(2, 64)],
        count=1,
        after=lambda module: (
            [str(n.target) for n in module.graph.nodes if n.op == "call_function"]
            == [
                "graphopt.quantize_weight.default",
                "<built-in function getitem>",
                "<built-in function getitem>",
                "graphopt.quantized_linear.default",
            ]
        ),
    )


def test_merged_where_they_read_one_input() -> None:
    graph = check_pass(through("int8", "merge_quantized_linears"), Block(), [torch.randn(3, 64)], count=1)
    assert count(graph, operations.parallel_quantized_linear) == 1
    assert count(graph, operations.quantized_linear) == 1


def test_a_bias_computed_in_the_graph_is_not_merged() -> None:
    class Computed(Block):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            up = self.up(x)
            return up + torch.nn.functional.linear(x, self.gate.weight, up.sum((0,)))

    assert_not_applied(
        through("int8", "merge_quantized_linears"),
        Computed(),
        [torch.randn(3, 64)],
        reason="its weight or bias is computed in the graph",
    )


def test_a_weight_kept_as_k_by_n() -> None:
    class Conv1D(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(64, 40))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.weight

    model, x = Conv1D(), torch.randn(2, 64)
    check_pass(through("int8"), model, [x], count=1)
    with torch.no_grad():
        y = torch.compile(model, backend=backend, options={"quantize": "int8", "target": "reference"})(x)
        assert (y - model(x)).norm() < 0.02 * model(x).norm()


def assert_refused(model: nn.Module, inputs: list, quantize: Quantize | str, reason: str) -> None:
    assert_not_applied(through(quantize), model, inputs, reason=reason)


def test_refuses_a_weight_computed_in_the_graph() -> None:
    class LowRank(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base, self.a = nn.Linear(64, 64), nn.Parameter(torch.randn(64, 1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.linear(x, self.base.weight + self.a @ self.a.T)

    assert_refused(LowRank(), [torch.randn(3, 64)], "int8", "computed in the graph")


def test_refuses_an_argument_of_the_call() -> None:
    class Given(nn.Module):
        def forward(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.linear(x, weight)

    assert_refused(Given(), [torch.randn(3, 64), torch.randn(32, 64)], "int8", "an argument of the call")


def test_refuses_a_part_of_a_parameter() -> None:
    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(96, 64))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.linear(x, self.weight[:32])

    assert_refused(Part(), [torch.randn(3, 64)], "int8", "a view of a part of a parameter")


def test_refuses_a_weight_that_would_not_shrink() -> None:
    assert_refused(nn.Linear(1, 64), [torch.randn(3, 1)], Quantize("int8", 0), "it would take 320 bytes instead of 256")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_refuses_a_weight_that_is_not_finite(bad: float) -> None:
    model = nn.Linear(64, 32)
    with torch.no_grad():
        model.weight[3, 4] = bad
    assert_refused(model, [torch.randn(3, 64)], "int8", "weight: the weight holds infinities, NaN")


def test_refuses_names_left_out_by_the_user() -> None:
    assert_refused(Block(), [torch.randn(3, 64)], Quantize("int8", modules="nothing"), "up.weight: modules='nothing'")
    assert_refused(Block(), [torch.randn(3, 64)], Quantize("int8", skip="weight"), "down.weight: skip='weight'")


@pytest.mark.rotate(one_in=2)
@pytest.mark.parametrize("tied", [False, True])
def test_the_head_can_be_left_out_or_have_its_own_scheme(tied: bool) -> None:
    ids = [torch.randint(0, 80, (2, 5))]
    kept = check_pass(through(Quantize("int4", lm_head=False)), Speaker(tied), ids, count=3)
    assert any("lm_head=False" in refusal.reason for refusal in kept.refusals)
    for given, head in ((True, "int8-g64"), ("fp8", "fp8"), ("int4", "int4-g32")):
        own = check_pass(through(Quantize("int4", lm_head=given)), Speaker(tied), ids, count=4)
        names = [n.args[3] for n in own.after.graph.nodes if n.target is operations.quantized_linear]
        assert sorted(names) == sorted(["int4-g32", "int4-g32", "int4-g32", head])


def test_training_graphs_are_left_alone() -> None:
    model = nn.Linear(64, 32)
    compiled = torch.compile(model, backend=backend, options={"quantize": "int8", "target": "reference"})
    x = torch.randn(3, 64)
    assert torch.equal(compiled(x), model(x))


@pytest.mark.parametrize(
    ("scheme", "target"),
    [
        *((scheme, "reference") for scheme in SCHEMES),
        ("int4", "auto"),
        ("q4_k", "triton"),
        *(pytest.param(scheme, "cpu", marks=pytest.mark.slow) for scheme in SCHEMES if scheme != "int4"),
    ],
)
def test_a_changed_weight_gives_the_new_answer(scheme: str, target: str) -> None:
    torch.manual_seed(0)
    model = nn.Linear(64, 32)
    x = torch.randn(2, 64)
    how = schemes.named(schemes.canonical(scheme))

    def expected() -> torch.Tensor:
        return operations.quantized_linear(x, how.pack(model.weight), model.bias, how.name)

    compiled = torch.compile(model, backend=backend, options={"quantize": scheme, "target": target})
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), expected(), rtol=1e-4, atol=1e-4)
        model.weight.mul_(-3)
        torch.testing.assert_close(compiled(x), expected(), rtol=1e-4, atol=1e-4)
        model.weight.data = torch.randn(32, 64)
        torch.testing.assert_close(compiled(x), expected(), rtol=1e-4, atol=1e-4)
        model.load_state_dict({"weight": torch.randn(32, 64), "bias": torch.randn(32)})
        torch.testing.assert_close(compiled(x), expected(), rtol=1e-4, atol=1e-4)
        model.weight = nn.Parameter(torch.randn(32, 64))
        torch.testing.assert_close(compiled(x), expected(), rtol=1e-4, atol=1e-4)
        model.weight[0, 0] = float("nan")
        assert not torch.isfinite(compiled(x)[:, 0]).any()


def test_explain_names_the_refusals() -> None:
    options = {"quantize": Quantize("int8", skip="gate"), "target": "reference"}
    with torch.no_grad():
        report = graphopt.explain(Block(), torch.randn(2, 64), options=options)
    reasons = [refusal.reason for graph in report.graphs for ran in graph.passes for refusal in ran.refusals]
    assert "gate.weight: skip='gate' names it" in reasons
