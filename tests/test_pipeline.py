"""How passes are ordered, and what becomes of those that break the contract."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx

import graphopt
from graphopt import passes, pipeline
from graphopt.errors import OptionError
from graphopt.testing import assert_not_applied


def named(name: str, **declared: Any) -> Callable[[fx.GraphModule], int]:
    def function(graph_module: fx.GraphModule) -> int:
        return 0

    function.__name__ = name
    return graphopt.graph_pass(exactness="bitwise", **declared)(function)


def order(*given: Callable[..., int], absent: tuple[Callable[..., int], ...] = ()) -> list[str]:
    return [pipeline.describe(function).name for function in pipeline.arrange(given, absent)]


def test_by_stage_then_as_given() -> None:
    given = named("a"), named("b", stage="recognize"), named("c", stage="canonicalize"), named("d")
    assert order(*given) == ["c", "b", "a", "d"]


@pytest.mark.parametrize("where", ["before", "after"])
def test_chains_whatever_the_order_they_are_given_in(where: str) -> None:
    a, b, c = named("a", **{where: "b"}), named("b", **{where: "c"}), named("c")
    want = ["a", "b", "c"] if where == "before" else ["c", "b", "a"]
    assert order(a, b, c) == order(b, a, c) == order(c, b, a) == want


@pytest.mark.parametrize("where", ["before", "after"])
def test_those_that_name_one_pass_stay_as_given(where: str) -> None:
    named_by_all, *others = named("x"), *(named(name, **{where: "x"}) for name in "abc")
    once = pipeline.arrange([named_by_all, *others])
    want = ["a", "b", "c", "x"] if where == "before" else ["x", "a", "b", "c"]
    assert [pipeline.describe(function).name for function in once] == order(*once) == want


def test_before_and_after_name_stages_too() -> None:
    given = named("a", before="recognize"), named("b", stage="recognize"), named("c", after="recognize")
    assert order(*given) == ["a", "b", "c"]


def test_a_pass_that_does_not_run_counts_as_its_stage() -> None:
    gone = named("gone", stage="quantize")
    mine, linear, merge = named("mine", before="gone"), named("linear", stage="recognize"), named("merge")
    assert order(mine, linear, merge, absent=(gone,)) == ["linear", "mine", "merge"]
    assert_not_applied(named("mine", after="quantize_linears"), lambda x: x + 1, [torch.ones(2)])
    options = {"target": "reference", "passes": [named("mine", after="prune_certified")]}
    assert torch.compile(lambda x: x + 1, backend="graphopt", options=options)(torch.ones(2)).tolist() == [2, 2]


def test_every_pass_of_the_library_can_be_ordered() -> None:
    found = order(*passes.PIPELINE, *passes.OPTIONAL)
    assert len(found) == len({*found}) and found.index("drop_layers") < found.index("fold_constants")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ((named("a", before="b"), named("b", before="a")), "lead in a circle: 'a' before 'b', 'b' before 'a'"),
        ((named("a", after="a"),), "lead in a circle: 'a' after 'a'"),
        ((named("a", before="p", after="q"), named("p"), named("q")), "'q' runs later than 'p'"),
        ((named("a", before="nowhere"),), "'a' refers to unknown pass or stage 'nowhere'; known are"),
        ((named("a", before="recognise"),), "did you mean 'recognize'"),
    ],
)
def test_what_cannot_be_ordered(given: tuple[Callable[..., int], ...], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        pipeline.arrange(given)


@pytest.mark.parametrize(
    ("declared", "said"),
    [
        ({"exactness": "exact"}, "exactness must be 'bitwise', 'rounding' or 'lossy', got 'exact'"),
        ({"exactness": "bitwise", "stage": "late"}, "stage must be one of canonicalize, .* got 'late'"),
        ({"exactness": "bitwise", "before": named("b")}, "before must be the name of a pass or a stage"),
    ],
)
def test_wrong_declarations(declared: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        graphopt.graph_pass(**declared)


@pytest.mark.parametrize("returned", [None, -1, "two"])
def test_a_pass_that_does_not_count_is_undone(returned: Any) -> None:
    @graphopt.graph_pass(exactness="bitwise")
    def careless(graph_module: fx.GraphModule) -> int:
        (added,) = graph_module.graph.find_nodes(op="call_function", target=torch.ops.aten.add.Tensor)
        added.update_arg(1, 5)
        return returned

    options = {"target": "reference", "passes": [careless]}
    report = graphopt.explain(lambda x: x + 1, torch.ones(2), options=options)
    (done,) = (done for done in report.graphs[0].passes if done.name == "careless")
    assert "careless must return how many rewrites it made" in done.error and done.rewrites == 0
    assert torch.compile(lambda x: x + 1, backend="graphopt", options=options)(torch.ones(2)).tolist() == [2, 2]
    with pytest.raises(Exception, match="careless must return how many"):
        graphopt.explain(lambda x: x + 1, torch.ones(2), options={**options, "strict": True})


def test_each_failing_pass_is_undone_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """What earlier passes did stays; the graph is copied again only when one has changed it."""

    def adding(number: int, fails: bool, name: str) -> Callable[[fx.GraphModule], int]:
        def function(graph_module: fx.GraphModule) -> int:
            (add,) = graph_module.graph.find_nodes(op="call_function", target=torch.ops.aten.add.Tensor)
            add.update_arg(1, add.args[1] + number)
            if fails:
                raise RuntimeError(f"{name} gave up")
            return 1

        function.__name__ = name
        return graphopt.graph_pass(exactness="lossy")(function)

    mixed = [named("first"), adding(10, True, "second"), named("third"), adding(100, False, "fourth"), named("fifth"),
             adding(1000, True, "sixth"), adding(10000, True, "seventh")]  # fmt: skip
    graph_module = torch.fx.experimental.proxy_tensor.make_fx(lambda x: x + 1, tracing_mode="fake")(torch.ones(2))
    copied: list[fx.Graph] = []
    copy = pipeline._copy
    monkeypatch.setattr(pipeline, "_copy", lambda graph: copied.append(graph) or copy(graph))
    reports = pipeline.run(graph_module, mixed, graphopt.Options())
    assert graph_module(torch.ones(2)).tolist() == [102, 102]
    assert [bool(report.error) for report in reports] == [False, True, False, False, False, True, True]
    assert len(copied) == 4


def test_disable_takes_names_of_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    def call(**options: Any) -> torch.Tensor:
        torch.compiler.reset()
        return torch.compile(lambda x: x + 1, backend="graphopt", options={"target": "reference", **options})(
            torch.ones(2)
        )

    assert call(disable=("remove_noops", "quantize_linears")).tolist() == [2, 2]
    with pytest.raises(Exception, match="there is no pass 'remove_noop' .did you mean 'remove_noops'"):
        call(disable=("remove_noop",))
    monkeypatch.setenv("GRAPHOPT_DISABLE", "a_pass_of_another_program")
    with pytest.warns(UserWarning, match="GRAPHOPT_DISABLE: there is no pass 'a_pass_of_another_program'"):
        call()
