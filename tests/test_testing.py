"""The helpers for pass authors: what they accept, and that they fail where a pass breaks its promise."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from torch import fx

from graphopt import edit, passes
from graphopt.pipeline import graph_pass
from graphopt.testing import (
    assert_not_applied,
    check_model,
    check_near_misses,
    check_pass,
    near_misses,
    strategies,
)
from tests.planted import inlined, wrong_pass

aten = torch.ops.aten


@graph_pass(exactness="bitwise")
def halve(graph_module: fx.GraphModule) -> int:
    """x / 2 becomes x * 0.5."""
    count = 0
    for node in graph_module.graph.find_nodes(op="call_function", target=aten.div.Tensor):
        if node.args[1] != 2.0:
            edit.refuse(node, f"the divisor is {node.args[1]}, not 2")
            continue
        with edit.rewriting(graph_module, node) as rewrite:
            rewrite.replace(node, rewrite.call(aten.mul.Tensor, node.args[0], 0.5))
        count += rewrite.applied
    return count


X = torch.randn(3, 4)


def test_check_pass_accepts_a_right_pass() -> None:
    graph = check_pass(
        halve,
        lambda x: (x / 2.0).relu() + x / 3.0,
        [X],
        count=1,
        after="""
            %0 f32[3, 4] = aten.mul.Tensor(%arg0_1, 0.5)
            %1 f32[3, 4] = aten.relu.default(%0)
            %2 f32[3, 4] = aten.div.Tensor(%arg0_1, 3.0)
            %3 f32[3, 4] = aten.add.Tensor(%1, %2)
            return (%3,)
        """,
    )
    assert [refusal.reason for refusal in graph.refusals] == ["the divisor is 3.0, not 2"]


def test_check_pass_takes_modules_and_inputs_that_are_changed() -> None:
    linear = torch.nn.Linear(4, 4)

    def function(x):
        x.add_(1.0)
        return linear(x) / 2.0

    check_pass(halve, function, [X], count=1)
    check_pass(halve, torch.nn.BatchNorm1d(4), [X], count=0)


def test_wrong_count_names_the_refusals() -> None:
    with pytest.raises(AssertionError, match="expected 1 rewrites, got 0; refused: the divisor is 3.0, not 2"):
        check_pass(halve, lambda x: x / 3.0, [X], count=1)


def test_another_graph_than_expected_is_shown_as_a_difference() -> None:
    with pytest.raises(AssertionError, match=r"\+%0 f32\[3, 4\] = aten.mul.Tensor"):
        check_pass(halve, lambda x: x / 2.0, [X], after="return (%0,)")
    with pytest.raises(AssertionError, match="predicate"):
        check_pass(halve, lambda x: x / 2.0, [X], after=lambda graph_module: False)


def test_rewrite_that_can_be_made_again_and_again_fails() -> None:
    @graph_pass(exactness="bitwise")
    def restless(graph_module: fx.GraphModule) -> int:
        node = graph_module.graph.find_nodes(op="call_function", target=aten.relu.default)[0]
        with edit.rewriting(graph_module, node) as rewrite:
            rewrite.replace(node, rewrite.call(aten.relu.default, node.args[0]))
        return rewrite.applied

    with pytest.raises(AssertionError, match="a second run makes 1 more rewrites"):
        check_pass(restless, torch.relu, [X])


def test_rewrite_behind_the_back_of_edit_fails() -> None:
    @graph_pass(exactness="bitwise")
    def sneaky(graph_module: fx.GraphModule) -> int:
        found = graph_module.graph.find_nodes(op="call_function", target=aten.relu.default)
        for node in found:
            with graph_module.graph.inserting_before(node):
                new = graph_module.graph.call_function(aten.clamp_min.default, (node.args[0], 0))
            new.meta = dict(node.meta)
            node.replace_all_uses_with(new)
        return len(found)

    with pytest.raises(AssertionError, match="1 rewrites reported, but 0 went through graphopt.edit"):
        check_pass(sneaky, torch.relu, [X])


def test_wrong_meta_fails() -> None:
    @graph_pass(exactness="bitwise")
    def liar(graph_module: fx.GraphModule) -> int:
        for node in graph_module.graph.find_nodes(op="call_function", target=aten.relu.default):
            node.meta["val"] = node.meta["val"].double()
        return 0

    with pytest.raises(AssertionError, match=r"meta\['val'\] of .*relu.* has another dtype"):
        check_pass(liar, torch.relu, [X])


def test_the_second_batch_size_is_tried() -> None:
    baked = wrong_pass(aten.sum.default, inlined(lambda x: x.mean() * 12.0))
    with pytest.raises(AssertionError, match="differ"):
        check_pass(baked, lambda x: x.sum() + 1, [X], verify="off")


def test_assert_not_applied() -> None:
    assert_not_applied(halve, lambda x: x / 3.0, [X], reason="not 2")
    with pytest.raises(AssertionError, match="no refusal says 'because'"):
        assert_not_applied(halve, lambda x: x / 3.0, [X], reason="because")
    with pytest.raises(AssertionError, match="applied 1 times"):
        assert_not_applied(halve, lambda x: x / 2.0, [X])


def test_near_misses_change_one_thing_each() -> None:
    found = near_misses(lambda x: torch.rsqrt((x * x).mean(-1) + 1e-5) - x[:, 0], [X])
    kinds = {" ".join(miss.change.split()[-3:]) for miss in found}
    assert {"is returned too", "dtype and back", "is doubled", "are swapped"} <= {
        ending for kind in kinds for ending in ("is returned too", "dtype and back", "is doubled", "are swapped")
        if kind.endswith(ending)
    }  # fmt: skip
    assert all(miss.function(X) is not None for miss in found)


def test_near_misses_find_a_matcher_that_does_not_look_at_the_constant() -> None:
    check_near_misses(halve, lambda x: (x / 2.0).exp() * 2.0, [X])
    blind = wrong_pass(aten.div.Tensor, lambda rewrite, node: rewrite.call(aten.mul.Tensor, node.args[0], 0.5))
    with pytest.raises(Exception, match="changes results") as info:
        check_near_misses(blind, lambda x: (x / 2.0).exp(), [X])
    assert any("is doubled" in note for note in info.value.__notes__)


def test_check_model_compares_with_eager() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.SiLU(), torch.nn.Linear(8, 4)).eval()
    report = check_model(model, X, options={"target": "reference"})
    assert report.graphs[0].rewrites >= 2
    wrong = wrong_pass(aten.silu.default, inlined(lambda x: torch.sigmoid(x) * x * 1.001))
    with pytest.raises(AssertionError, match="differ"):
        check_model(model, X, options={"target": "reference", "passes": [wrong]})


QUICK = settings(
    max_examples=6,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@QUICK
@given(strategies.programs())
def test_the_pipeline_is_right_on_random_programs(program: strategies.Program) -> None:
    check_pass(list(passes.PIPELINE), program.function, program.inputs, verify="sample")


@QUICK
@given(strategies.transformer_blocks())
def test_the_pipeline_is_right_on_random_transformer_blocks(drawn) -> None:
    block, inputs = drawn
    check_pass(list(passes.PIPELINE), block, inputs, verify="sample")


def test_strategies_find_a_planted_bug_and_shrink_it() -> None:
    wrong = wrong_pass(aten.sigmoid.default, inlined(lambda x: 1 / (1 + torch.exp(-x)) * 1.01))

    @settings(max_examples=300, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(strategies.programs(most_steps=3, in_place=False, dtypes=(torch.float32,)))  # 1 % is nothing in bfloat16
    def property_test(program: strategies.Program) -> None:
        if "sigmoid" in program.source:
            check_pass(wrong, program.function, program.inputs, verify="sample", second=[])

    with pytest.raises(Exception, match="changes results") as info:
        property_test()
    shown = "\n".join(getattr(info.value, "__notes__", []))
    assert "torch.sigmoid" in shown
    assert shown.count("\n    v") <= 2
