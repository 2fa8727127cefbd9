"""prune_experts: stacks and loops of experts of which some are never chosen, each reason to refuse, and revival."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Llama4TextConfig
from transformers.models.llama4.modeling_llama4 import Llama4TextMoe

import graphopt
from graphopt.passes import PIPELINE
from graphopt.passes.prune.prune_experts import prune_experts
from graphopt.pipeline import describe
from graphopt.pruning import operations
from graphopt.testing import assert_not_applied, trace
from graphopt.testing import check_pass as check_fully
from tests.pruning.models import done_by, frozen
from tests.suite import door
from tests.suite.architectures import BY_NAME

PASSES = [p for p in PIPELINE if describe(p).stage in ("canonicalize", "recognize")] + [prune_experts]
INF = torch.inf

check_pass = functools.partial(check_fully, verify="sample")


def x(rows: int = 2) -> Tensor:
    return torch.randn(rows, 5, 32, generator=torch.Generator().manual_seed(0))


def stacks(graph_module: Any) -> list[int]:
    """How many experts each stack of matrices of a graph holds."""
    return [node.meta["val"].shape[0] for node in graph_module.graph.nodes if str(node.target) == "aten.bmm.default"]


def linears(graph_module: Any) -> int:
    return sum(str(node.target) == "graphopt.linear.default" for node in graph_module.graph.nodes)


def stack(*dead: int) -> nn.Module:
    """Llama 4's mixture, which computes all experts for every token, with a bias on its router."""
    torch.manual_seed(0)
    config = Llama4TextConfig(hidden_size=32, intermediate_size=24, num_local_experts=4, num_experts_per_tok=1,
                              num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2)  # fmt: skip
    made = Llama4TextMoe(config)
    for parameter in made.parameters():
        parameter.data.normal_(0, 0.3)
    made.router.bias = nn.Parameter(torch.zeros(4))
    with torch.no_grad():
        made.router.bias[list(dead)] = -INF
    return made.eval().requires_grad_(False)


class Loop(nn.Module):
    """All experts in turn, each times its gate: chosen probabilities, or (`corrected`) scores chosen by others."""

    def __init__(self, *dead: int, corrected: bool = False, chosen: int = 2, largest: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.router = nn.Linear(32, 4)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(32, 24), nn.SiLU(), nn.Linear(24, 32)) for _ in range(4))
        self.register_buffer("correction", torch.zeros(4))
        self.corrected, self.chosen, self.largest = corrected, chosen, largest
        self.eval().requires_grad_(False)
        (self.correction if corrected else self.router.bias)[list(dead)] = -INF

    def forward(self, x: Tensor) -> Tensor:
        gates, out = self.gates(x), torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            out = out + gates[..., number, None] * expert(x)
        return out

    def gates(self, x: Tensor) -> Tensor:
        logits = self.router(x)
        if self.corrected:
            scores = logits.sigmoid()
            index = torch.topk(scores + self.correction, self.chosen, -1, largest=self.largest).indices
            return torch.zeros_like(scores).scatter(-1, index, scores.gather(-1, index))
        values, index = torch.topk(torch.softmax(logits, -1), self.chosen, -1)
        return torch.zeros_like(logits).scatter(-1, index, values / values.sum(-1, keepdim=True))


@pytest.mark.parametrize("kind", ["stack", pytest.param("loop", marks=pytest.mark.slow)])
def test_in_generated_code(kind: str) -> None:
    """What stays is no run of neighbours; strict=True raises if the graph cannot be lowered."""
    subject: Any = stack(1) if kind == "stack" else Loop(0, 1)
    compiled = door.compiled(subject, target="cpu", strict=True)
    with torch.no_grad():
        for rows in (2, 3):
            torch.testing.assert_close(compiled(x(rows)), subject(x(rows)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("dead", [(1,), (0, 3)])
def test_of_a_stack(dead: tuple[int, ...], dynamic: bool) -> None:
    graph = check_pass(PASSES, stack(*dead), [x()], count=1, dynamic=dynamic)
    assert stacks(graph.after) == [4 - len(dead)] * 2
    weights = [node for node in graph.after.graph.nodes if node.target is operations.prune_weight]
    assert {tuple(node.meta["val"].shape[1:]) for node in weights} == {(32, 48), (24, 32)}


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("dead", [(2,), (0, 1)])
def test_of_a_loop(dead: tuple[int, ...], corrected: bool) -> None:
    graph = check_pass(PASSES, Loop(*dead, corrected=corrected), [x()], count=1)
    assert linears(graph.after) == 1 + 2 * (4 - len(dead))


def test_all_but_the_chosen() -> None:
    graph = check_pass(PASSES, Loop(0, 3), [x()], count=1)
    assert linears(graph.after) == 5


def test_kept_when_some_must_be_chosen_all_the_same() -> None:
    """With three of four excluded and two to be chosen, an excluded one is chosen; its gate is not zero."""
    assert_not_applied(PASSES, Loop(0, 1, 3, corrected=True), [x()], reason="cannot be told apart")


def test_kept_when_the_smallest_are_chosen() -> None:
    assert_not_applied(PASSES, Loop(1, corrected=True, largest=False), [x()], reason="cannot be told apart")


def test_mixtures_without_excluded_experts_are_left_alone() -> None:
    for subject in (stack(), Loop()):
        graph = assert_not_applied(PASSES, subject, [x()])
        assert not graph.reports[-1].refusals


class Biased(nn.Module):
    """A router of Hugging Face's with a bias: scores, weights and choice as Mixtral and Qwen3-MoE compute them."""

    def __init__(self, router: nn.Module) -> None:
        super().__init__()
        self.weight, self.top_k, self.normed = router.weight, router.top_k, getattr(router, "norm_topk_prob", True)
        self.bias = nn.Parameter(torch.zeros(len(self.weight)), requires_grad=False)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = nn.functional.linear(hidden.reshape(-1, hidden.shape[-1]), self.weight, self.bias)
        values, index = torch.topk(torch.softmax(logits.float(), -1), self.top_k, -1)
        return logits, values / values.sum(-1, keepdim=True) if self.normed else values, index


def mixture(name: str, form: str) -> Any:
    model = frozen(name)
    model.set_experts_implementation(form)
    for layer in model.model.layers:
        layer.mlp.gate = Biased(layer.mlp.gate)
        layer.mlp.gate.bias[2] = -INF
    return model


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("mixtral", "grouped_mm"),
        pytest.param("mixtral", "batched_mm", marks=pytest.mark.slow),
        pytest.param("qwen3_moe", "grouped_mm", marks=pytest.mark.slow),
        pytest.param("qwen3_moe", "batched_mm", marks=pytest.mark.slow),
    ],
)
def test_refused_where_only_chosen_experts_are_computed(name: str, form: str) -> None:
    """What is never chosen is never read either: even NaN in its weights changes nothing."""
    model, batch = mixture(name, form), BY_NAME[name].inputs(2)
    want = model(**batch).logits
    for layer in model.model.layers:
        layer.mlp.experts.gate_up_proj[2], layer.mlp.experts.down_proj[2] = torch.nan, torch.nan
    options = {"target": "reference", "strict": True}
    (made,) = done_by(graphopt.explain(model, options=options, **batch), "prune_experts")
    assert [refusal.reason for refusal in made.refusals] == [
        "experts 2: only experts that are chosen are computed: those that never are cost nothing"
    ] * 2
    torch.testing.assert_close(door.compiled(model, **options)(**batch).logits, want, rtol=1e-4, atol=1e-5)


def _comes_back(bias: Tensor) -> None:
    bias[1] = 0.5


def _others_go(bias: Tensor) -> None:
    bias[[0, 2, 3]] = torch.tensor([-INF, 0.0, -INF])


def _stays_away(bias: Tensor) -> None:
    bias[2] = 1.0


@pytest.mark.rotate(one_in=3)
@pytest.mark.parametrize("change", [_comes_back, _others_go, _stays_away])
@pytest.mark.parametrize("kind", ["stack", "loop", "corrected"])
def test_chosen_again_after_the_bias_changes(kind: str, change: Any) -> None:
    subject: Any = {"stack": stack(1), "loop": Loop(1), "corrected": Loop(1, corrected=True)}[kind]
    bias = subject.correction if kind == "corrected" else subject.router.bias
    compiled = door.compiled(subject, target="reference")
    first = (lambda result: result[0]) if kind == "stack" else (lambda result: result)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(first(compiled(x())), first(subject(x())))
        change(bias)
        for rows in (2, 2, 3):
            torch.testing.assert_close(first(compiled(x(rows))), first(subject(x(rows))))


def test_training_keeps_them() -> None:
    """An expert that is not chosen now may be after the next step."""
    subject = Loop(1).requires_grad_(True)
    compiled = trace(subject, PASSES)
    compiled(x()).sum().backward()
    assert all(report.name != "prune_experts" for graph in compiled.graphs for report in graph.reports)
