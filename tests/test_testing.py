"""The helpers for pass authors: what they accept, and that they fail where a pass breaks its promise."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from torch import Tensor, fx

from graphopt import edit, passes
from graphopt.errors import OptionError
from graphopt.pipeline import graph_pass
from graphopt.testing import (
    assert_not_applied,
    check_kernel,
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


@pytest.mark.rotate(one_in=2)
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


def _without(target: object) -> Callable[[fx.GraphModule], int]:
    """A pass that drops updates in place: what no result of the program need show."""

    @graph_pass(exactness="rounding")
    def drop_updates(graph_module: fx.GraphModule) -> int:
        found = graph_module.graph.find_nodes(op="call_function", target=target)
        for node in found:
            node.replace_all_uses_with(node.args[0])
            graph_module.graph.erase_node(node)
        return 0

    return drop_updates


class Counting(torch.nn.Module):
    """Updates a buffer that its result does not depend on."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen.add_(1)
        return x * 2


def test_a_dropped_update_that_no_result_shows_is_found() -> None:
    def updates(x: Tensor, y: Tensor) -> Tensor:
        y.add_(1)
        return x * 2

    drop = _without(torch.ops.aten.copy_.default)
    with pytest.raises(AssertionError, match="differ"):
        check_pass(drop, updates, [torch.randn(2, 3), torch.randn(2, 3)])
    with pytest.raises(AssertionError, match="differ"):
        check_pass(drop, Counting(), [torch.randn(2, 3)])


def test_check_model_compares_updates_of_arguments_and_buffers() -> None:
    def updates(x: Tensor, y: Tensor) -> Tensor:
        y.add_(1)
        return x * 2

    given = [torch.randn(2, 3), torch.zeros(2, 3)]
    options = {"target": "reference"}
    check_model(updates, *given, options=options)
    assert given[1].sum() == 0
    check_model(Counting(), given[0], options=options)
    wrong = {**options, "passes": [_without(torch.ops.aten.copy_.default)]}
    with pytest.raises(AssertionError, match="value 2.*1.0 became 0.0"):
        check_model(updates, *given, options=wrong)
    with pytest.raises(AssertionError, match="1.0 became 0.0"):
        check_model(Counting(), given[0], options=wrong)


def test_check_model_wants_a_model_and_options() -> None:
    with pytest.raises(OptionError, match="model must be a module or a function, got 3"):
        check_model(3, torch.ones(2))
    with pytest.raises(OptionError, match="unknown option 'targett'"):
        check_model(torch.nn.Identity(), torch.ones(2), options={"targett": "cpu"})


def test_a_kernel_that_returns_its_argument_is_found() -> None:
    with pytest.raises(AssertionError, match="result 0 shares memory with input 0"):
        check_kernel(lambda x: x.clone(), lambda x: x, [torch.randn(3)])
    check_kernel(lambda x: x.t(), lambda x: x.transpose(0, 1), [torch.randn(3, 2)])


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: check_pass(halve, lambda x: x + 1, torch.ones(2)), "inputs must be a list .* got Tensor"),
        (lambda: check_pass([], lambda x: x + 1, [torch.ones(2)]), "there is no pass to check"),
        (lambda: check_pass(len, lambda x: x + 1, [torch.ones(2)]), "is not a pass: decorate it"),
        (lambda: check_pass(halve, lambda x: x + 1, [torch.ones(2)], verify="some"), "verify='some': allowed are"),
        (lambda: check_kernel(torch.exp, torch.exp, torch.ones(2)), "args must be a list .* got Tensor"),
        (lambda: check_kernel(torch.exp, torch.exp, [torch.ones(2)], kinds=["nans"]), "kinds: 'nans' is not among"),
        (lambda: check_kernel(torch.exp, torch.exp, [torch.ones(2)], exactness="exact"), "exactness: 'exact' is not"),
    ],
)
def test_wrong_arguments(call: Callable[[], object], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        call()


def test_a_function_without_a_graph_is_said_to_have_none() -> None:
    with pytest.raises(AssertionError, match="there is no graph to look at"):
        check_pass(halve, lambda x: x, [torch.ones(2)])
    with pytest.raises(AssertionError, match="there is no graph to look at"):
        assert_not_applied(halve, lambda x: x, [torch.ones(2)])


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda rewrite, node: 3, "%add must be replaced by a node, got 3"),
        (lambda rewrite, node: None, "%add must be replaced by a node, got None"),
        (lambda rewrite, node: fx.Graph().placeholder("x"), "%x is a node of another graph"),
        (lambda rewrite, node: rewrite.call(aten.neg.default, fx.Graph().placeholder("x")), "a node of another graph"),
        (lambda rewrite, node: rewrite.call(aten.neg.default, *node.users), "%exp is computed only after %add"),
        (lambda rewrite, node: rewrite.constant(1.0), "needs a tensor that is known now, got 1.0"),
        (lambda rewrite, node: rewrite.constant(torch.ones(2)), r"without numbers.* constant.lambda: torch.ones.8"),
    ],
)
def test_wrong_uses_of_edit_are_errors(make: Callable[..., object], said: str) -> None:
    @graph_pass(exactness="rounding")
    def careless(graph_module: fx.GraphModule) -> int:
        (node,) = graph_module.graph.find_nodes(op="call_function", target=aten.add.Tensor)
        with edit.rewriting(graph_module, node) as rewrite:
            rewrite.replace(node, make(rewrite, node))
        return rewrite.applied

    with pytest.raises(Exception, match=said):
        check_pass(careless, lambda x: (x + 1).exp(), [torch.ones(2)])


def test_constants_are_made_by_a_function() -> None:
    @graph_pass(exactness="bitwise")
    def add_ones(graph_module: fx.GraphModule) -> int:
        count = 0
        for node in graph_module.graph.find_nodes(op="call_function", target=aten.add.Tensor):
            if not isinstance(node.args[1], fx.Node):
                with edit.rewriting(graph_module, node) as rewrite:
                    ones = rewrite.constant(lambda: torch.ones(3))
                    rewrite.replace(node, rewrite.call(aten.add.Tensor, node.args[0], ones))
                count += rewrite.applied
        return count

    check_pass(add_ones, lambda x: x + 1, [torch.randn(2, 3)], count=1)
