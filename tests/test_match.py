"""graphopt.match: what patterns match, what they must not, and what they say about near misses."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx

from graphopt import match
from graphopt.errors import PatternError
from graphopt.passes.canonicalize.merge_common_nodes import merge_common_nodes
from graphopt.pipeline import graph_pass
from graphopt.testing import assert_not_applied, check_pass, trace


@match.pattern(x=(2, 8), y=(2, 8), scale=0.34375)
def scaled_sum(x: Tensor, y: Tensor, scale: float) -> Tensor:
    return torch.sigmoid(x) * scale + y.exp()


def replacement(x: Tensor, y: Tensor, scale: float) -> Tensor:
    return torch.add(y.exp(), x.sigmoid() * scale)


def as_pass(
    pattern: match.Pattern, new: Callable[..., object], condition: Callable[[match.Match], str] = lambda found: ""
) -> Callable[[fx.GraphModule], int]:
    @graph_pass(exactness="rounding")
    def rewrite_pattern(graph_module: fx.GraphModule) -> int:
        return match.rewrite(graph_module, pattern, new, condition)

    return rewrite_pattern


def once(pattern: match.Pattern, new: Callable[..., object]) -> Callable[[fx.GraphModule], int]:
    """A pass that marks what it replaces, so that its own results do not match again."""

    def condition(found: match.Match) -> str:
        return "rewritten already" if "graphopt" in found.results[0].meta else ""

    return as_pass(pattern, new, condition)


X, Y = torch.randn(2, 3, 8), torch.randn(2, 3, 8)

SPELLINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "as written": lambda x, y: torch.sigmoid(x) * 0.5 + y.exp(),
    "other order": lambda x, y: y.exp() + 0.5 * torch.sigmoid(x),
    "inputs through views": lambda x, y: torch.sigmoid(x.transpose(1, 2)) * 0.5 + y.view(2, 8, 3).exp(),
    "a view in the middle of the model": lambda x, y: (torch.sigmoid(x) * 0.5 + y.exp()).reshape(-1),
    "one tensor for both": lambda x, y: torch.sigmoid(x) * 0.5 + x.exp(),
    "broadcast": lambda x, y: torch.sigmoid(x) * 0.5 + y[:1, :1].exp(),
    "narrow": lambda x, y: torch.sigmoid(x.bfloat16()) * 0.5 + y.bfloat16().exp(),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_spelling(spelling: str, dynamic: bool) -> None:
    check_pass(once(scaled_sum, replacement), SPELLINGS[spelling], [X, Y], count=1, dynamic=dynamic, second=[])


def test_match_tells_what_the_parameters_stand_for() -> None:
    graph_module = _graph(lambda x, y: torch.sigmoid(x) * 0.125 + y.exp())
    (found,) = match.find(graph_module, scaled_sum)
    placeholders = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    assert (found["x"], found["y"], found["scale"]) == (*placeholders, 0.125)
    assert found.tensor("x").shape == X.shape
    assert [node.target for node in found.results] == [torch.ops.aten.add.Tensor]
    assert len(found.inside) == 3


def test_every_occurrence_is_rewritten() -> None:
    def twice(x: Tensor, y: Tensor) -> Tensor:
        first = torch.sigmoid(x) * 0.5 + y.exp()
        return torch.sigmoid(first) * 0.25 + x.exp()

    check_pass(once(scaled_sum, replacement), twice, [X, Y], count=2)


@match.pattern(x=(2, 8), y=(2, 8))
def both(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    total = x.exp() + y.sin()
    return total.tanh(), total


def test_several_results() -> None:
    def function(x: Tensor, y: Tensor) -> Tensor:
        total = x.exp() + y.sin()
        return torch.tanh(total) * total

    check_pass(once(both, lambda x, y: (torch.tanh(y.sin() + x.exp()), y.sin() + x.exp())), function, [X, Y], count=1)


@match.pattern(x=(2, 8), y=(2, 8))
def siblings(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return x.exp() * y, x.exp() / y


def test_results_that_do_not_depend_on_each_other() -> None:
    def function(x: Tensor, y: Tensor) -> Tensor:
        e = x.exp()
        return (e * y).cos() - (e / y).sin()

    check_pass(once(siblings, lambda x, y: (y * x.exp(), x.exp() / y)), function, [X, Y.abs() + 1], count=1)


def test_result_computed_before_an_input_is_ready() -> None:
    def function(x: Tensor, y: Tensor) -> Tensor:
        e = x.exp()
        late = (e * y).sin()
        return late + e / late

    @match.pattern(x=(2, 8), y=(2, 8), z=(2, 8))
    def far(x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        return x.exp() * y, x.exp() / z

    assert_not_applied(
        as_pass(far, lambda x, y, z: (x.exp() * y, x.exp() / z)),
        function,
        [X, Y],
        reason="z (%sin) is computed after the result %mul",
    )


@match.pattern(x=(2, 4, 8))
def heads(x: Tensor) -> Tensor:
    return torch.softmax(x.view(*x.shape[:2], 2, x.shape[2] // 2).transpose(1, 2), -1).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("dynamic", [False, True])
def test_views_inside_the_pattern(dynamic: bool) -> None:
    def function(x: Tensor) -> Tensor:
        batch, rows, _ = x.shape
        split = x.reshape(batch, rows, 2, 6).permute(0, 2, 1, 3).contiguous()
        return torch.softmax(split, 3).permute(0, 2, 1, 3).reshape(batch, rows, 12)

    new = once(heads, lambda x: torch.softmax(x.unflatten(2, (2, -1)), -1).flatten(2))
    check_pass(new, function, [torch.randn(2, 3, 12)], count=1, dynamic=dynamic)


def test_other_view_inside_the_pattern_is_refused() -> None:
    def function(x: Tensor) -> Tensor:
        return torch.softmax(x.view(2, 3, 3, 4).transpose(1, 2), -1).transpose(1, 2).flatten(2)

    new = as_pass(heads, lambda x: torch.softmax(x.unflatten(2, (2, -1)), -1).flatten(2))
    assert_not_applied(new, function, [torch.randn(2, 3, 12)], reason="expected a result of shape")


REFUSALS: dict[str, Callable[[Tensor, Tensor], object]] = {
    "expected aten.exp.default, found aten.sin.default": lambda x, y: torch.sigmoid(x) * 0.5 + y.sin(),
    "expected no other user, has 2": lambda x, y: (torch.sigmoid(x) * 0.5 + y.exp(), torch.sigmoid(x) * 0.5),
    "expected alpha=1, found 2": lambda x, y: torch.add(torch.sigmoid(x) * 0.5, y.exp(), alpha=2),
    "expected nothing on the way, found cast to bfloat16, cast to float32": (
        lambda x, y: (torch.sigmoid(x) * 0.5).bfloat16().float() + y.exp()
    ),
}


@pytest.mark.parametrize("reason", REFUSALS)
def test_not_applied(reason: str) -> None:
    new = as_pass(scaled_sum, replacement)
    found = assert_not_applied([merge_common_nodes, new], REFUSALS[reason], [X, Y], reason=reason)
    (refusal,) = (refusal for refusal in found.refusals if reason in refusal.reason)
    assert refusal.reason.startswith("scaled_sum: ") and "test_match.py:" in refusal.where


def test_condition_refuses_with_its_reason() -> None:
    new = as_pass(scaled_sum, replacement, lambda found: "too small" if found["scale"] < 1 else "")
    found = assert_not_applied(new, SPELLINGS["as written"], [X, Y], reason="too small")
    assert "4 of 4 nodes matched at %add" in found.refusals[0].reason


def test_memory_written_in_between_is_refused() -> None:
    graph_module = _graph(lambda x, y: torch.sigmoid(x) * 0.5 + y.exp())
    x, _ = (node for node in graph_module.graph.nodes if node.op == "placeholder")
    (multiplied,) = graph_module.graph.find_nodes(op="call_function", target=torch.ops.aten.mul.Tensor)
    with graph_module.graph.inserting_before(multiplied):
        written = graph_module.graph.call_function(torch.ops.aten.copy_.default, (x, x))
    written.meta["val"] = x.meta["val"]
    assert match.find(graph_module, scaled_sum) == []


def test_result_that_lies_elsewhere_in_memory_is_copied_into_place() -> None:
    @match.pattern(x=(2, 3, 8))
    def doubled(x: Tensor) -> Tensor:
        return x.exp().tanh()

    def transposed(x: Tensor) -> Tensor:
        return x.transpose(0, 1).contiguous().exp().tanh().transpose(0, 1)

    check_pass(once(doubled, transposed), lambda x: x.exp().tanh() + 0, [X], verify="off", count=1)


def test_number_that_appears_nowhere_is_an_error() -> None:
    @match.pattern(x=(2, 8), scale=0.34375)
    def inverted(x: Tensor, scale: float) -> Tensor:
        return x * (1 / scale)

    with pytest.raises(PatternError, match="the value of scale .* appears nowhere"):
        match.find(_graph(lambda x, y: x * 2 + y), inverted)


def test_no_guard_on_a_symbol_is_left() -> None:
    def function(x: Tensor, y: Tensor) -> Tensor:
        return torch.sigmoid(x.view(-1, 4)) * 0.5 + y.exp()

    compiled = trace(function, [as_pass(scaled_sum, replacement)], dynamic=True)
    for rows in (6, 10, 14):
        compiled(torch.randn(rows, 2, 2), torch.randn(rows, 4))
    assert len(compiled.graphs) == 1


@settings(max_examples=6, deadline=None)
@given(
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    scale=st.sampled_from([0.0, -1.5, 2.0, 3.0]),
)
def test_any_shape(shape: list[int], dtype: torch.dtype, scale: float) -> None:
    inputs = [torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)]
    check_pass(
        once(scaled_sum, replacement), lambda x, y: y.exp() + torch.sigmoid(x) * scale, inputs, count=1, second=[]
    )


def _graph(function: Callable[[Tensor, Tensor], object]) -> fx.GraphModule:
    compiled = trace(function)
    with torch.no_grad():
        compiled(X, Y)
    return compiled.graphs[0].after


def test_a_replacement_with_other_parameters_is_an_error_at_once() -> None:
    @match.pattern(x=(2, 8), y=(2, 8))
    def summed(x: Tensor, y: Tensor) -> Tensor:
        return (x + y).exp()

    def product(a: Tensor, y: Tensor) -> Tensor:
        return a.exp() * y.exp()

    with pytest.raises(PatternError, match=r"'summed': its replacement product\(.*by their names \(x, y\): .*'a'"):
        match.Rule(summed, product)

    def takes_any(**values: Tensor) -> Tensor:
        return values["x"].exp() * values["y"].exp()

    check_pass(once(summed, takes_any), lambda x, y: (x + y).exp(), [X, X], verify="off", count=1)
