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


def _relu_plus(x: Tensor, y: Tensor) -> Tensor:
    return torch.add(torch.relu(x), y, alpha=0.5)


def test_operands_of_an_addition_with_a_factor_do_not_commute() -> None:
    new = once(match.pattern(x=(2, 8), y=(2, 8))(_relu_plus), lambda x, y: torch.relu(x) + y * 0.5)
    check_pass(new, _relu_plus, [X, Y], count=1)
    swapped = assert_not_applied(new, lambda x, y: torch.add(y, torch.relu(x), alpha=0.5), [X, Y])
    assert "expected aten.relu.default" in swapped.refusals[0].reason


@pytest.mark.parametrize("operation", [torch.eq, torch.ne, torch.logical_xor, torch.minimum])
def test_other_operations_commute(operation: Callable[[Tensor, Tensor], Tensor]) -> None:
    def compared(x: Tensor, y: Tensor) -> Tensor:
        return operation(x.exp(), y.sin()).float()

    pattern = match.pattern(x=(2, 8), y=(2, 8))(compared)
    new = once(pattern, lambda x, y: operation(y.sin(), x.exp()).float())
    check_pass(new, lambda x, y: operation(y.sin(), x.exp()).float(), [X, Y], count=1)


def test_an_index_of_another_dimension_is_another_pattern() -> None:
    @match.pattern(x=torch.empty(8, 8), index=torch.zeros(8, dtype=torch.long))
    def columns(x: Tensor, index: Tensor) -> Tensor:
        return x[:, index] * 3.0

    inputs = [torch.randn(8, 8), torch.randperm(8)]
    new = once(columns, lambda x, index: x.index_select(1, index) * 3.0)
    check_pass(new, lambda x, index: x[:, index] * 3.0, inputs, count=1, second=[])
    assert_not_applied(new, lambda x, index: x[index] * 3.0, inputs, reason="found ['a tensor']")


def test_operations_with_several_results() -> None:
    @match.pattern(x=(2, 8))
    def gated(x: Tensor) -> Tensor:
        gate, value = x.chunk(2, -1)
        return torch.sigmoid(gate) * value

    def other(x: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        return x[..., half:] * torch.sigmoid(x[..., :half])

    new = as_pass(gated, other)
    check_pass(new, lambda x: torch.mul(x.chunk(2, -1)[1], x.chunk(2, -1)[0].sigmoid()), [X], second=[])
    check_pass(new, gated.function, [X], count=1)
    reason = "expected result=0, found 1"
    assert_not_applied(new, lambda x: (lambda a, b: torch.sigmoid(b) * a)(*x.chunk(2, -1)), [X], reason=reason)


def test_results_that_would_be_memory_of_the_input_are_copied() -> None:
    twice = as_pass(match.pattern(x=(2, 8))(lambda x: x.neg().neg()), lambda x: x)
    for function in (
        lambda x: x.neg().neg(),
        lambda x: x.neg().neg().transpose(0, 1),
        lambda x: (x.neg().neg(), x.neg().neg().add_(1)),
    ):
        check_pass(twice, function, [X])
    graph = check_pass(twice, lambda x: x.neg().neg() * 2, [X], count=1)
    assert not graph.after.graph.find_nodes(op="call_function", target=torch.ops.aten.clone.default)


def test_updates_in_place_of_values_of_their_own_are_new_values() -> None:
    @match.pattern(x=(2, 8))
    def updating(x: Tensor) -> Tensor:
        return x.exp().add_(1.0).relu_()

    plain = once(updating, lambda x: torch.relu(x.exp() + 1.0))
    check_pass(plain, lambda x: torch.relu(x.exp() + 1.0), [X], count=1)
    check_pass(plain, updating.function, [X], count=1)
    pattern = match.pattern(x=(2, 8))(lambda x: torch.relu(x.exp() + 1.0))
    check_pass(once(pattern, updating.function), pattern.function, [X], count=1)


def _draws(x: Tensor) -> Tensor:
    return torch.nn.functional.dropout(x, 0.5)


@pytest.mark.parametrize(
    ("function", "examples", "said"),
    [
        (lambda x, y: x * y, {"x": (2,)}, "an example for each parameter of .*missing.*'y'"),
        (lambda x: x.exp(), {"x": (2,), "z": (2,)}, "an example for each parameter.*unexpected.*'z'"),
        (lambda x: x.exp(), {"x": "float"}, "the example of x must be a shape .*'float'"),
        (lambda x, s: x * s, {"x": (2,), "s": True}, "the example of s must be .*True"),
        (lambda x: x.exp(), {"x": (2, -1)}, r"the shape \(2, -1\) of x must hold whole numbers"),
        (lambda x, y: x.exp(), {"x": (2,), "y": (2,)}, "does not use its parameter y"),
        (lambda x: (x, x.exp()), {"x": (2,)}, "results must be a tensor that it computes"),
        (lambda x: x.transpose(0, 1), {"x": (2, 2)}, "results must be a tensor that it computes"),
        (lambda x: None, {"x": (1,)}, "does not use its parameter x"),
        (lambda x: [x.exp(), 2.0], {"x": (1,)}, "results must be a tensor that it computes"),
        (lambda x: x if x.sum() > 0 else -x, {"x": (2,)}, "cannot be traced on its examples"),
        (lambda x: x.mul_(2.0), {"x": (2,)}, "updates a parameter in place"),
        (_draws, {"x": (2,)}, "draws random numbers"),
    ],
)
def test_what_no_graph_holds_is_an_error(function: Callable[..., object], examples: dict, said: str) -> None:
    with pytest.raises(PatternError, match=said):
        match.find(_graph(lambda x, y: x * 2 + y), match.pattern(name="mine", **examples)(function))


@pytest.mark.parametrize(
    ("new", "said"),
    [
        (lambda x, y, scale: (x, y), "returns 1 tensors, its replacement a tensor, a tensor"),
        (lambda x, y, scale: None, "its replacement None"),
        (lambda x, y, scale: 3.0, "its replacement 3.0"),
        (lambda x, y, scale: x.mul_(scale) + y, "its replacement updates a parameter in place"),
        (lambda x, y, scale: torch.rand_like(x) + y * scale, "its replacement draws random numbers"),
    ],
)
def test_replacements_that_cannot_stand_for_the_pattern(new: Callable[..., object], said: str) -> None:
    with pytest.raises(PatternError, match=said):
        match.rewrite(_graph(SPELLINGS["as written"]), scaled_sum, new)


@pytest.mark.parametrize("answer", [True, False, None])
def test_a_condition_answers_with_a_reason(answer: object) -> None:
    with pytest.raises(PatternError, match=f"must return '' to accept .* got {answer}"):
        match.rewrite(_graph(SPELLINGS["as written"]), scaled_sum, replacement, lambda found: answer)


def test_a_function_is_no_pattern() -> None:
    with pytest.raises(PatternError, match="is not a pattern: decorate it"):
        match.rewrite(_graph(SPELLINGS["as written"]), replacement, replacement)
