"""Translation validation: right rewrites pass, wrong ones are caught, shrunk, and written as programs that run."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import graphopt
import graphopt.edit
from graphopt import verify
from graphopt.errors import VerificationError
from graphopt.testing import trace
from graphopt.verify import cut, judge, wide
from tests.planted import inlined, wrong_pass

aten = torch.ops.aten


def failures(pass_, function, *inputs, level="all", dynamic=None, directory=None):
    """The checker after `function` was compiled with the pass."""
    found = []
    checker = verify.Checker(level, on_failure=found.append, directory=directory)
    with torch.no_grad():
        trace(function, [pass_], observer=checker, dynamic=dynamic)(*inputs)
    assert checker.checked > 0
    return checker


def test_right_rewrite_passes() -> None:
    half = wrong_pass(
        aten.div.Tensor, lambda rw, node: rw.call(aten.mul.Tensor, node.args[0], 0.5), exactness="bitwise"
    )
    checker = failures(half, lambda x: x / 2.0, torch.randn(3, 4))
    assert (checker.checked, checker.distinct, checker.unchecked, checker.failures) == (1, 1, 0, [])


def test_equal_rewrites_are_checked_once() -> None:
    half = wrong_pass(aten.div.Tensor, lambda rw, node: rw.call(aten.mul.Tensor, node.args[0], 0.5))

    def layers(x):
        for _ in range(5):
            x = (x / 2.0).relu()
        return x

    checker = failures(half, layers, torch.randn(3, 4))
    assert (checker.checked, checker.distinct) == (5, 1)


def test_another_order_of_a_sum_is_rounding_but_not_bitwise() -> None:
    def reordered(x, dims, keepdim=False):
        return x.flip(-1).cumsum(-1)[..., -1].contiguous()

    for exactness, count in (("rounding", 0), ("bitwise", 1)):
        other_order = wrong_pass(aten.sum.dim_IntList, inlined(reordered), exactness=exactness)
        checker = failures(other_order, lambda x: x.sum(-1) + 1, torch.randn(3, 1000))
        assert len(checker.failures) == count, exactness


def test_rewrite_that_rests_on_how_its_input_is_made_passes() -> None:
    drop_second = wrong_pass(
        aten.relu.default, lambda rw, node: node.args[0] if node.args[0].target is aten.relu.default else rw.call(
            aten.relu.default, node.args[0]
        )
    )  # fmt: skip
    assert not failures(drop_second, lambda x: x.relu().relu() + 1, torch.randn(3, 4)).failures


def test_merging_equal_nodes_passes() -> None:
    def first_of(rewrite, node):
        return next(other for other in rewrite.graph_module.graph.nodes if other.target is node.target)

    merge = wrong_pass(aten.mul.Tensor, lambda rw, node: first_of(rw, node), most=2, exactness="bitwise")
    assert not failures(merge, lambda x, y: torch.sin(x * y) + torch.cos(x * y), torch.ones(2), torch.ones(2)).failures


def test_a_dropped_mask_is_caught_although_masks_are_followed_to_their_origin() -> None:
    unmasked = wrong_pass(aten.where.self, lambda rw, node: node.args[1])

    def masked(scores):
        seen = torch.arange(5)[:, None] >= torch.arange(5)[None, :]
        return torch.where(seen, scores, -1e9).softmax(-1)

    assert len(failures(unmasked, masked, torch.randn(5, 5)).failures) == 1


def test_true_mask_may_be_dropped() -> None:
    unmasked = wrong_pass(aten.where.self, lambda rw, node: node.args[1])

    def masked(scores):
        return torch.where(torch.arange(5) >= 0, scores, -1e9).softmax(-1)

    assert not failures(unmasked, masked, torch.randn(5, 5)).failures


def test_a_clone_that_is_returned_may_not_become_its_input() -> None:
    no_clone = wrong_pass(aten.clone.default, lambda rw, node: node.args[0], exactness="bitwise")
    inside = failures(no_clone, lambda x: x.clone() + 1, torch.randn(3))
    assert not inside.failures
    returned = failures(no_clone, lambda x: x.clone(), torch.randn(3))
    assert "shares memory with input 0" in returned.failures[0].message


def test_wrong_size_at_another_length_is_caught() -> None:
    # Right at the traced size 4 only: the pass took a symbolic size for a number.
    baked = wrong_pass(aten.mean.dim, lambda rw, node: rw.inline(lambda x: x.sum(-1) / 4.0, node.args[0]))
    checker = failures(baked, lambda x: x.mean(-1) + 1, torch.randn(3, 4), dynamic=True, level="sample")
    assert len(checker.failures) == 1
    assert checker.failures[0].inputs.sizes


def test_a_polynomial_rewrite_is_checked_without_rounding() -> None:
    slightly = wrong_pass(aten.mul.Tensor, inlined(lambda x, y: x * y + 2.0**-40 * x))
    checker = failures(slightly, lambda x, y: x * y - 1, torch.randn(3), torch.randn(3))
    assert "polynomial" in checker.failures[0].message


def test_raises_and_names_pass_nodes_and_source() -> None:
    wrong = wrong_pass(aten.exp.default, inlined(lambda x: x.exp() * 1.01))
    with pytest.raises(
        Exception, match=r"by planted \(rounding\), of exp at .*test_verify.py:\d+ changes results"
    ) as info:
        with torch.no_grad():
            trace(lambda x: x.exp(), [wrong], observer=verify.Checker("sample"))(torch.randn(3))
    assert isinstance(info.value, VerificationError) or "VerificationError" in str(info.value)


def test_reproducer_is_small_and_runs_alone(tmp_path) -> None:
    wrong = wrong_pass(aten.addmm.default, inlined(lambda b, x, w: torch.nan_to_num(x @ w) + b * 1.001))
    linear = torch.nn.Linear(48, 32)
    checker = failures(
        wrong, lambda x: linear(x.relu()).sigmoid(), torch.randn(40, 48), dynamic=True, directory=tmp_path
    )
    failure = checker.failures[0]
    assert failure.reproducer is not None
    assert all(value.numel() <= 4 for value in failure.inputs.values)
    done = subprocess.run(
        [sys.executable, failure.reproducer], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 1
    assert "elements differ" in done.stderr


def test_what_is_made_smaller_stays_the_failure_it_was() -> None:
    """Wrong for NaN, and wrong in another way for the ones that a shrinker tries: the NaN is what was found."""

    def loses_nan(x):
        return torch.where((x == 1).all(), x * 1.5, torch.nan_to_num(x, nan=0.0).relu())

    wrong = wrong_pass(aten.relu.default, inlined(loses_nan), exactness="bitwise")
    (failure,) = failures(wrong, lambda x: x.relu() + 1, torch.randn(3, 4)).failures
    assert failure.found.kinds == {"nan became finite"}
    (value,) = failure.inputs.values
    assert value.numel() == 1 and value.isnan().all()


def test_a_narrow_cut_shows_what_the_whole_does_wrong_not_what_cannot_happen() -> None:
    """After a square root no value is negative: that the new nodes differ there is no failure; that they round is."""
    rounds = wrong_pass(aten.abs.default, inlined(lambda x: torch.where(x < 0, torch.nan, x.bfloat16().float())))
    (failure,) = failures(rounds, lambda x: x.sqrt().abs() + 1, torch.rand(3, 4)).failures
    assert failure.found.kinds == {"finite became finite"}


def test_option_undoes_a_wrong_pass_and_reports_it() -> None:
    wrong = wrong_pass(aten.exp.default, inlined(lambda x: x.exp() * 1.01))
    x = torch.randn(3, 4)
    report = graphopt.explain(
        lambda x: x.exp() + 1, x, options={"verify": "sample", "target": "reference", "passes": [wrong]}
    )
    undone = [made for made in report.graphs[0].passes if made.error]
    assert [made.name for made in undone] == ["planted"]
    assert "VerificationError" in undone[0].error
    assert report.graphs[0].verification == {"checked": 1, "distinct": 1, "unchecked": 0, "failed": 1}


def test_judge_compares_the_error_with_that_of_the_old_graph() -> None:
    exact = torch.linspace(1, 2, 8, dtype=torch.float64)
    old = exact.to(torch.bfloat16)
    assert judge.difference(old, old, exact, "rounding") is None
    assert kinds(old, old + 0.25, exact, "rounding") == {"finite became finite"}
    assert kinds(old, old.float(), exact, "rounding") == {"another dtype"}
    assert kinds(torch.tensor([0.0]), torch.tensor([-0.0])) == {"zero became a zero of the other sign"}
    assert kinds(torch.tensor([torch.nan, 1, 2]), torch.tensor([0.0, 1, 3])) == {
        "nan became finite",
        "finite became finite",
    }
    assert judge.difference(torch.tensor([torch.nan]), torch.tensor([-torch.nan]), None, "bitwise") is None


def kinds(old: torch.Tensor, new: torch.Tensor, exact=None, exactness="bitwise") -> frozenset[str]:
    found = judge.difference(old, new, exact, exactness)
    assert found is not None
    return found.kinds


def test_wide_runs_dialect_operations_by_their_meaning() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(4, 8, dtype=torch.bfloat16), torch.randn(3, 8, dtype=torch.bfloat16)
    out = wide.run_wide(torch.ops.graphopt.linear, [x, weight])
    torch.testing.assert_close(out, x.double() @ weight.double().T)


def test_cut_holds_only_the_rewrite() -> None:
    seen = []
    half = wrong_pass(aten.div.Tensor, lambda rw, node: rw.call(aten.mul.Tensor, node.args[0], 0.5))
    with torch.no_grad():
        trace(lambda x: (x.exp() / 2.0).sin(), [half], observer=lambda given: seen.append(cut(given)))(torch.ones(3))
    targets = [node.target for node in seen[0].before.graph.nodes if node.op == "call_function"]
    assert targets == [aten.div.Tensor]


@pytest.mark.parametrize(("written", "count"), [(lambda x: x, 0), (lambda x: x * 2, 1)], ids=["right", "wrong"])
def test_memory_that_the_rewrite_fills_at_the_end_of_the_graph(written, count, tmp_path) -> None:
    """The writing node computes no value that anybody reads: it belongs to the rewrite all the same."""

    @graphopt.graph_pass(exactness="bitwise")
    def filled_last(graph_module: torch.fx.GraphModule) -> int:
        made = 0
        for node in graph_module.graph.find_nodes(op="call_function", target=aten.clone.default):
            with graphopt.edit.rewriting(graph_module, node) as rewrite:
                room = rewrite.call(aten.zeros.default, list(node.meta["val"].shape))
                rewrite.call_last(aten.copy_.default, room, rewrite.inline(written, node.args[0]))
                rewrite.replace(node, room)
            made += rewrite.applied
        return made

    checker = failures(filled_last, lambda x: x.clone(), torch.randn(3, 4), directory=tmp_path)
    assert len(checker.failures) == count
    for failure in checker.failures:
        assert failure.reproducer is not None and "copy_" in failure.reproducer.read_text()
