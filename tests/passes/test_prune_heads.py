"""Lossy pruning by name: what prune_certified and prune_by_importance remove, keep and refuse."""

from __future__ import annotations

import functools
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphopt
from graphopt import PruneHeads
from graphopt.errors import OptionError
from graphopt.passes import PIPELINE
from graphopt.passes.prune.prune_by_importance import prune_by_importance
from graphopt.passes.prune.prune_certified import prune_certified
from graphopt.pipeline import describe
from graphopt.testing import assert_not_applied, check_pass
from tests.suite import door

BEFORE = [p for p in PIPELINE if describe(p).stage in ("canonicalize", "recognize")]
D = 8


class Layer(nn.Module):
    """Norm, attention of 4 heads, norm, gated FFN; the heads' contributions differ in size."""

    def __init__(self, normed: bool = True) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.norm = nn.LayerNorm(32) if normed else nn.Identity()
        self.q, self.k, self.v, self.o = (nn.Linear(32, 32, bias=False) for _ in range(4))
        self.up, self.gate, self.down = nn.Linear(32, 40), nn.Linear(32, 40), nn.Linear(40, 32)
        self.eval().requires_grad_(False)
        self.o.weight[:, D : 2 * D] *= 1e-3
        self.o.weight[:, 3 * D :] *= 1e-2

    def forward(self, x: Tensor) -> Tensor:
        return self.attend(x) + self.down(F.silu(self.gate(x)) * self.up(x))

    def attend(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        q, k, v = (part(x).unflatten(-1, (4, D)).transpose(1, 2) for part in (self.q, self.k, self.v))
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def x() -> Tensor:
    return torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))


def bound_to(function: Any, prune: PruneHeads) -> Any:
    made = functools.partial(function, prune=prune)
    made.graph_pass = describe(function)  # type: ignore[attr-defined]
    return made


def heads_of(graph: Any) -> list[int]:
    found = [node for node in graph.after.graph.nodes if str(node.target) == "graphopt.attention.default"]
    return [node.args[0].meta["val"].shape[1] for node in found]


def test_certified_removes_what_its_bound_allows() -> None:
    subject = Layer()
    graph = check_pass([*BEFORE, bound_to(prune_certified, PruneHeads(max_error=0.02))], subject, [x()], verify="off")
    assert sum(heads_of(graph)) == 2
    compiled = door.compiled(subject.attend, target="reference", prune_heads=PruneHeads(max_error=0.02))
    with torch.no_grad():
        changed = (compiled(x()) - subject.attend(x())).square().mean(-1).sqrt()
    assert 0 < changed.max() <= 0.02


def test_certified_keeps_what_it_cannot_bound() -> None:
    passes = [*BEFORE, bound_to(prune_certified, PruneHeads(max_error=0.02))]
    assert_not_applied(passes, Layer(normed=False), [x()], reason="no norm comes before")
    passes = [*BEFORE, bound_to(prune_certified, PruneHeads(max_error=1e-9))]
    assert_not_applied(passes, Layer(), [x()], reason="no head stays within")


def test_certified_follows_the_weights() -> None:
    """A head that grows beyond the bound is back on the next call."""
    subject = Layer()
    compiled = door.compiled(subject.attend, target="reference", prune_heads=PruneHeads(max_error=0.02))
    with torch.no_grad():
        compiled(x())
        subject.o.weight[:, D : 2 * D] *= 1e3
        subject.o.weight[:, 3 * D :] *= 1e2
        for _ in range(3):
            torch.testing.assert_close(compiled(x()), subject.attend(x()))


@pytest.mark.parametrize("choice", ["norm", "gradient", "greedy"])
def test_the_least_important_heads_go(choice: str) -> None:
    subject = Layer()
    calibration: Any = None
    if choice == "gradient":
        calibration = graphopt.head_importance(subject, [{"x": x()}], loss=lambda y: y.square().mean())
    elif choice == "greedy":
        calibration = graphopt.calibrate(subject, [x()])
    options = PruneHeads(keep=0.5, choice=choice, calibration=calibration)
    compiled = door.compiled(subject, target="reference", prune_heads=options)
    twin = Layer()
    twin.o.weight[:, D : 2 * D] = 0
    twin.o.weight[:, 3 * D :] = 0
    with torch.no_grad():
        torch.testing.assert_close(compiled(x()), twin(x()))


@pytest.mark.parametrize("choice", ["gradient", "greedy", "norm", "random"])
def test_the_report_compares_the_choice_with_random_and_smallest_norm(choice: str) -> None:
    """At the same budget: the numbers are those of the heads that each of the three would give up."""
    subject, x0 = Layer(), x()
    calibration: Any = None
    if choice == "gradient":
        calibration = graphopt.head_importance(subject, [{"x": x0}], loss=lambda y: y.square().mean())
    elif choice == "greedy":
        calibration = graphopt.calibrate(subject, [x0])
    options = PruneHeads(keep=0.5, choice=choice, calibration=calibration)
    report = graphopt.explain(subject, x0, options={"target": "reference", "prune_heads": options})
    (done,) = (done for done in report.graphs[0].passes if done.name == "prune_by_importance")
    (note,) = done.notes
    assert note.startswith("heads: 2 of 4 given up; ") and " ".join(note.split()) in " ".join(str(report).split())
    costs = {way: float(cost) for way, cost in re.findall(r"(\w+) ([\d.e+-]+)(?:,|$)", note.partition(": ")[2])}
    assert list(costs) == list(dict.fromkeys([choice, "random", "norm"]))
    if choice == "random":
        assert costs["norm"] < costs["random"]
        return
    assert costs[choice] == min(costs.values()) < costs["random"]
    if choice == "greedy":
        seen: list[Tensor] = []
        hook = subject.o.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        subject(x0)
        hook.remove()
        whole = subject.o(seen[0])
        kept = seen[0].index_fill(-1, torch.tensor([*range(D, 2 * D), *range(3 * D, 4 * D)]), 0)
        error = (whole - subject.o(kept)).square().sum() / whole.square().sum()
        assert costs["greedy"] == pytest.approx(float(error), rel=0.02)


def test_channels_of_the_ffn() -> None:
    prune = PruneHeads(keep_channels=0.75, choice="norm")
    graph = check_pass([*BEFORE, bound_to(prune_by_importance, prune)], Layer(), [x()], verify="off", count=1)
    shapes = {tuple(node.meta["val"].shape) for node in graph.after.graph.nodes if node.op == "call_function"
              and "prune_weight" in str(node.target)}  # fmt: skip
    assert {(30, 32), (30,), (32, 30)} == shapes


def test_random_is_fixed_by_name_and_keeps_its_share() -> None:
    first, second = (
        check_pass(
            [*BEFORE, bound_to(prune_by_importance, PruneHeads(keep=0.75, choice="random"))],
            Layer(),
            [x()],
            verify="off",
        )
        for _ in range(2)
    )
    assert sum(heads_of(first)) == 3 and first.after.code == second.after.code


def test_refused_when_the_calibration_has_not_seen_a_weight() -> None:
    importance = graphopt.Importance({"other.weight": torch.ones(1, 32)})
    passes = [*BEFORE, bound_to(prune_by_importance, PruneHeads(keep=0.5, calibration=importance))]
    assert_not_applied(passes, Layer(), [x()], reason="the calibration has not seen o.weight")


def test_importance_is_the_derivative_of_a_gate() -> None:
    subject = Layer()
    importance = graphopt.head_importance(subject, [{"x": x()}], loss=lambda y: y.square().mean())
    step, slopes = 1e-3, []
    with torch.no_grad():
        for head in range(4):
            losses = []
            for sign in (1, -1):
                twin = Layer()
                twin.o.weight[:, head * D : (head + 1) * D] *= 1 + sign * step
                losses.append(twin.double()(x().double()).square().mean())
            slopes.append((losses[0] - losses[1]) / (2 * step))
    torch.testing.assert_close(
        importance.of_blocks("o.weight", D), torch.stack(slopes).abs().float(), rtol=1e-3, atol=1e-7
    )
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in subject.parameters())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "max_error"),
        ({"max_error": 0.1, "keep": 0.5}, "max_error"),
        ({"max_error": -1.0}, "greater than 0"),
        ({"keep": 1.5, "choice": "norm"}, "at most 1"),
        ({"keep": 0.5, "choice": "best"}, "allowed are"),
        ({"keep": 0.5}, "head_importance"),
        ({"keep": 0.5, "choice": "greedy"}, "calibrate"),
    ],
)
def test_wrong_options(given: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        PruneHeads(**given)


def test_wrong_option_at_the_door() -> None:
    with pytest.raises(OptionError, match="prune_heads"):
        graphopt.Options(prune_heads=0.5)  # type: ignore[arg-type]
