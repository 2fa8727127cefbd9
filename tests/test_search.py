"""The research kit: the search finds what is cheaper, its plan is right, a sweep measures every combination."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import sympy
import torch
from rich.console import Console
from torch import fx

import graphopt
from graphopt import cost, edit, match, search
from graphopt.errors import OptionError
from graphopt.testing import trace

aten = torch.ops.aten


def chain(a: torch.Tensor, b: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return (a @ b) @ v


def other(a: torch.Tensor, b: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return a @ (b @ v)


SHAPES = {"a": (3, 4), "b": (4, 5), "v": (5, 2)}


@graphopt.graph_pass(exactness="rounding", stage="canonicalize", training=False)
def rightwards(graph_module: fx.GraphModule) -> int:
    return match.rewrite(graph_module, match.pattern(**SHAPES)(chain), other)


@graphopt.graph_pass(exactness="rounding", stage="canonicalize", training=False)
def leftwards(graph_module: fx.GraphModule) -> int:
    return match.rewrite(graph_module, match.pattern(**SHAPES)(other), chain)


@graphopt.graph_pass(exactness="bitwise", stage="canonicalize")
def wide_relu(graph_module: fx.GraphModule) -> int:
    """Applies at every relu: a cheaper form of small ones, a dearer one of the large ones by the model below."""
    count = 0
    for node in graph_module.graph.find_nodes(op="call_function", target=aten.relu.default):
        with edit.rewriting(graph_module, node) as rewrite:
            rewrite.replace(node, rewrite.call(aten.clamp_min.default, node.args[0], 0))
        count += rewrite.applied
    return count


@graphopt.graph_pass(exactness="bitwise", stage="canonicalize")
def broken(graph_module: fx.GraphModule) -> int:
    raise RuntimeError("never works")


BOTH = (rightwards, leftwards)


def operands(rows: int, columns: int) -> list[torch.Tensor]:
    return [torch.randn(rows, 64) / 8, torch.randn(64, 64) / 8, torch.randn(64, columns)]


def test_a_thin_right_operand_goes_first() -> None:
    given = operands(64, 1)
    (plan,) = search.best(chain, *given, using=BOTH, roofline="H100")
    assert [str(move) for move in plan.moves] == ["rightwards"] and plan.complete
    assert plan.seconds < plan.captured_seconds and plan.device == "H100"
    compiled = torch.compile(chain, backend="graphopt", options=plan.options(target="reference", strict=True))
    torch.testing.assert_close(compiled(*given), chain(*given))
    report = graphopt.explain(chain, *given, options=plan.options(target="reference"), roofline="H100")
    study = report.graphs[0].study
    assert study is not None and report.graphs[0].rewrites == 1
    assert study.optimised.cost.flops == plan.cost.flops < plan.captured_cost.flops
    assert any(line.made_by == "rightwards #1" for line in study.snapshots[-1].lines)


def test_what_is_cheapest_stays() -> None:
    (plan,) = search.best(chain, *operands(1, 64), using=BOTH, roofline="H100")
    assert plan.moves == () and plan.seconds == plan.captured_seconds
    assert plan.explored == 2, "the way back leads to the graph that it came from"
    assert "leave it as it is" in str(plan)


def test_one_place_is_chosen_where_all_places_are_worse() -> None:
    def model(region: fx.GraphModule) -> cost.Cost:
        dear = 0
        for node in region.graph.nodes:
            if node.op == "call_function":
                small = node.meta["val"].numel() < 10
                dear += 1 if small == (node.target is aten.clamp_min.default) else 5
        return cost.Cost(sympy.Integer(dear) * 10**12, sympy.Integer(0), 1)

    def program(small: torch.Tensor, large: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return large.relu(), small.relu()

    (plan,) = search.best(
        program, torch.randn(3), torch.randn(99), using=[wide_relu], cost_model=model, finish=(), roofline="H100"
    )
    assert [str(move) for move in plan.moves] == ["wide_relu at 2"]


def test_budget_and_broken_passes() -> None:
    (plan,) = search.best(chain, *operands(64, 1), using=BOTH, roofline="H100", budget=1)
    assert plan.explored == 1 and not plan.complete and plan.moves == ()
    (plan,) = search.best(chain, *operands(64, 1), using=(broken,), roofline="H100")
    assert plan.explored == 1 and plan.complete


class Gated(torch.nn.Module):
    """Two linears of one input."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.gate = torch.nn.Linear(8, 16), torch.nn.Linear(8, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(x) * self.gate(x).sigmoid()


def test_a_pass_that_gains_nothing_by_itself_is_found_for_what_it_makes_possible() -> None:
    model, x = Gated().eval(), torch.randn(3, 8)
    with torch.no_grad():
        (plan,) = search.best(model, x, roofline="H100", budget=60)
        assert [str(move) for move in plan.moves] == ["recognize_linear", "merge_parallel_linears"]
        compiled = torch.compile(model, backend="graphopt", options=plan.options(target="reference"))
        torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"beam": 0}, "beam must be a whole number, 1 or more"),
        ({"places": -1}, "places must be a whole number, 0 or more"),
    ],
)
def test_wrong_bounds_are_refused(given: dict, said: str) -> None:
    with pytest.raises(OptionError, match=said):
        search.best(chain, *operands(2, 2), **given)


def test_lossy_passes_are_refused() -> None:
    @graphopt.graph_pass(exactness="lossy")
    def rounds(graph_module: fx.GraphModule) -> int:
        return 0

    with pytest.raises(OptionError, match="'rounds' is lossy: only exact rewrites"):
        search.best(chain, *operands(2, 2), using=[rounds])


def test_region_forming_asks_the_users_cost_model() -> None:
    """A model for which a launch costs nothing and every node of a region squares its price: nothing is joined."""

    def alone(region: fx.GraphModule) -> cost.Cost:
        nodes = sum(node.op == "call_function" for node in region.graph.nodes)
        return cost.Cost(sympy.Integer(10**12 * nodes**2))

    def program(x: torch.Tensor) -> torch.Tensor:
        return (x.sin() * 2).cos() + 1

    x = torch.randn(4, 4)
    counts = []
    for model in (None, alone):
        options = {"target": "triton", "cost_model": model}
        report = graphopt.explain(program, x, options=options, roofline="H100")
        torch.testing.assert_close(torch.compile(program, backend="graphopt", options=options)(x), program(x))
        counts.append(next(done.rewrites for done in report.graphs[0].passes if done.name == "form_regions"))
    assert counts == [1, 4]


def test_sweep_measures_every_combination(tmp_path: Path) -> None:
    model = torch.nn.Linear(64, 64).eval()
    path = tmp_path / "sweep.png"
    found = search.sweep(
        model,
        torch.randn(3, 64),
        grid={"quantize": [None, "int8"], "disable": [(), ("recognize_linear",)]},
        fixed={"target": "reference"},
        roofline="H100",
        rounds=2,
        plot=path,
    )
    whole, left, narrow, unknown = found.rows
    assert whole.error == left.error == unknown.error == 0 < narrow.error < 0.05
    assert narrow.bytes < whole.bytes == unknown.bytes and all(row.measured > 0 for row in found.rows)
    assert found.device == "H100" and found.eager > 0
    assert path.read_bytes().startswith(b"\x89PNG")
    assert json.loads(found.to_json())["rows"][2]["options"] == {"quantize": "int8", "disable": []}
    console = Console(width=120)
    with console.capture() as captured:
        console.print(found)
    assert "quantize=int8, disable=[]" in captured.get()


def test_sweep_refuses_wrong_options_before_any_work() -> None:
    def never(x: torch.Tensor) -> torch.Tensor:
        raise AssertionError("ran")

    with pytest.raises(OptionError, match="did you mean 'quantize'"):
        search.sweep(never, torch.randn(2), grid={"quantise": [None]})
    with pytest.raises(OptionError, match="rounds must be at least 1"):
        search.sweep(never, torch.randn(2), grid={}, rounds=0)


def test_more_combinations_than_dynamo_keeps_forms_of_one_function() -> None:
    found = search.sweep(
        torch.sin,
        torch.randn(3),
        grid={"limit": list(range(12))},
        fixed={"target": "reference"},
        roofline="H100",
        rounds=1,
    )
    assert len(found.rows) == 12 and all(row.bytes > 0 for row in found.rows)


def test_only_some_rewrites_of_a_pass() -> None:
    def program(x: torch.Tensor) -> torch.Tensor:
        return x.relu() + x.neg().relu()

    def some(graph_module: fx.GraphModule) -> int:
        with edit.selecting("chosen", frozenset((2,))):
            return wide_relu(graph_module)

    some.graph_pass = wide_relu.graph_pass  # type: ignore[attr-defined]
    compiled = trace(program, [some])
    compiled(torch.randn(3))
    targets = [node.target for node in compiled.graphs[0].after.graph.nodes]
    assert targets.count(aten.relu.default) == 1 and targets.index(aten.clamp_min.default) > targets.index(
        aten.relu.default
    )
