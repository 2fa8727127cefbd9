"""2:4 sparsity: masks against their definition, weights at call time, reasons to refuse, and the GPU's form."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import graphopt
from graphopt import Sparsify
from graphopt.errors import OptionError
from graphopt.passes import PIPELINE
from graphopt.passes.prune.sparsify_linears import sparsify_linears
from graphopt.pipeline import describe
from graphopt.pruning import operations, sparsity
from graphopt.testing import assert_not_applied, check_pass
from tests.suite import door

BEFORE = [p for p in PIPELINE if describe(p).stage in ("canonicalize", "recognize")]


def bound_to(sparsify: Sparsify) -> Any:
    made = functools.partial(sparsify_linears, sparsify=sparsify)
    made.graph_pass = describe(sparsify_linears)  # type: ignore[attr-defined]
    return made


class Layer(nn.Module):
    def __init__(self, columns: int = 32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(columns, 40), nn.Linear(40, 16, bias=False)
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.up(x)))


def x(rows: int = 3, columns: int = 32) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


@settings(deadline=None)
@given(st.integers(1, 5), st.integers(1, 6), st.integers(0, 2**16))
def test_the_mask_keeps_the_best_pair(rows: int, groups: int, seed: int) -> None:
    """Against all pairs of each four."""
    scores = torch.rand(rows, groups * 4, generator=torch.Generator().manual_seed(seed))
    kept = sparsity.keep_largest(scores).unflatten(1, (-1, 4))
    assert (kept.sum(-1) == 2).all()
    for found, four in zip(kept.flatten(0, 1), scores.unflatten(1, (-1, 4)).flatten(0, 1), strict=True):
        best = max(itertools.combinations(range(4), 2), key=lambda pair: float(four[list(pair)].sum()))
        assert set(found.nonzero().flatten().tolist()) == set(best)


def test_wanda_asks_how_large_the_inputs_are() -> None:
    """A small weight on a loud channel stays; of pruned weights the norms of the channels that are left count."""
    weight = torch.tensor([[1.0, 2.0, 3.0, 4.0, 1.0, 2.0, 3.0, 4.0]])
    layer = nn.Linear(8, 1, bias=False).requires_grad_(False)
    layer.weight.copy_(weight)
    calibration = graphopt.calibrate(layer, [torch.tensor([[10.0, 10.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]])])
    sparse = graphopt.pruning.sparsity.rounding
    sparse.register(calibration)
    method = sparse.spell("wanda", calibration, "weight")
    made = sparsity.sparsify_weight(weight, method, "", False)
    assert made.tolist() == [[1, 2, 0, 0, 0, 0, 3, 4]]
    assert sparsity.sparsify_weight(weight[:, 4:], method, "0:2,4:6", False).tolist() == [[1, 2, 0, 0]]
    assert sparsity.sparsify_weight(weight.t(), "magnitude", "", True).tolist() == [[0, 0, 3, 4, 0, 0, 3, 4]]


@pytest.mark.parametrize("target", ["reference", pytest.param("cpu", marks=pytest.mark.rotate(one_in=4))])
@pytest.mark.parametrize("choice", ["magnitude", "wanda"])
def test_the_linears_of_a_model(choice: str, target: str) -> None:
    """The compiled model is the one with masked weights, at two batch sizes, also after a weight has changed."""
    subject, twin = Layer(), Layer()
    calibration = graphopt.calibrate(subject, [x(9)]) if choice == "wanda" else None
    option: Any = "2:4" if choice == "magnitude" else Sparsify(choice=choice, calibration=calibration)
    compiled = door.compiled(subject, target=target, strict=True, prune=option)
    for change in (lambda: None, lambda: subject.up.weight.neg_().add_(0.01)):
        change()
        for name, layer in (("up", twin.up), ("down", twin.down)):
            weight = subject.get_submodule(name).weight
            norms = 1.0 if calibration is None else calibration.find(f"{name}.weight").rows.float().norm(dim=0)
            layer.weight.copy_(torch.where(sparsity.keep_largest(weight.abs() * norms), weight, 0))
        for rows in (3, 5):
            torch.testing.assert_close(compiled(x(rows)), twin(x(rows)))
        assert (twin.up.weight == 0).sum() == twin.up.weight.numel() // 2


def test_no_gain_on_the_cpu_is_reported() -> None:
    graph = check_pass([*BEFORE, bound_to(Sparsify())], Layer(), [x()], count=2, verify="off")
    assert [r.reason for r in graph.refusals] == [
        f"{name}.weight: CPUs have no kernel for 2:4 weights: multiplied as dense ones, with no gain"
        for name in ("up", "down")
    ]


def test_only_the_weights_asked_for() -> None:
    graph = check_pass(
        [*BEFORE, bound_to(Sparsify(modules="down|up", skip="up"))], Layer(), [x()], count=1, verify="off"
    )
    assert any("skip='up' finds it" in refusal.reason for refusal in graph.refusals)
    assert_not_applied([*BEFORE, bound_to(Sparsify(modules="attn"))], Layer(), [x()], reason="does not find it")


def test_after_pruning_and_before_quantisation() -> None:
    subject = Layer()
    subject.down.weight[:, 4:12] = 0
    graph = check_pass([*PIPELINE[:-1], sparsify_linears], subject, [x()], verify="off")
    made = [node for node in graph.after.graph.nodes if node.target is sparsity.sparsify_weight]
    shapes = {tuple(node.meta["val"].shape) for node in made}
    assert shapes == {(32, 32), (16, 32)}
    assert any(node.target is operations.prune_weight for node in graph.after.graph.nodes)
    options = {"target": "reference", "prune": "2:4", "quantize": "int8"}
    got, want = (door.compiled(subject, **chosen)(x()) for chosen in (options, {**options, "quantize": None}))
    assert 0 < (got - want).norm() < 0.02 * want.norm()


def test_refused_when_the_columns_do_not_divide_into_fours() -> None:
    assert_not_applied(
        [*BEFORE, bound_to(Sparsify(modules="up"))], Layer(30), [x(3, 30)], reason="do not divide into fours"
    )


def test_refused_when_a_table_is_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(16, 8).requires_grad_(False)

        def forward(self, ids: Tensor) -> Tensor:
            return F.linear(self.table(ids), self.table.weight)

    assert_not_applied([*BEFORE, bound_to(Sparsify())], Tied(), [torch.arange(3)], reason="looked up in as well")


def test_refused_when_the_weight_is_an_argument() -> None:
    passes = [*BEFORE, bound_to(Sparsify())]
    assert_not_applied(
        passes, lambda x, weight: F.linear(x, weight), [x(), torch.randn(8, 32)], reason="given by the caller"
    )


def test_refused_when_the_calibration_has_not_seen_the_weight() -> None:
    calibration = graphopt.calibrate(nn.Linear(4, 4), [torch.randn(1, 4)])
    passes = [*BEFORE, bound_to(Sparsify(choice="wanda", calibration=calibration))]
    assert_not_applied(passes, Layer(), [x()], reason="has not seen it")


def test_training_is_left_alone() -> None:
    subject = Layer().requires_grad_(True)
    compiled = door.compiled(subject, target="reference", prune="2:4")
    torch.testing.assert_close(compiled(x()), subject(x()))


@pytest.mark.parametrize("bias", [False, True])
def test_the_form_of_the_gpus_kernels(bias: bool) -> None:
    """Compressed and multiplied by its meaning it is the masked weight; shapes are as announced."""
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    sparse = sparsity.sparsify_weight(weight, "magnitude", "", False)
    packed = sparsity.compress_weight(sparse)
    for tensor, announced in zip(packed, sparsity._compressed_shape(sparse), strict=True):
        assert (tensor.shape, tensor.dtype) == (announced.shape, announced.dtype)
    given, added = torch.randn(3, 128).bfloat16(), torch.randn(64).bfloat16() if bias else None
    torch.testing.assert_close(sparsity.sparse_linear(given, packed, added), F.linear(given, sparse, added))


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 3, 64])
def test_semi_structured_kernels(rows: int) -> None:
    if torch.cuda.get_device_capability()[0] not in (8, 9):
        pytest.skip("no 2:4 kernels on this device")
    linear = nn.Linear(256, 128).cuda().bfloat16().requires_grad_(False)
    compiled = door.compiled(linear, target="triton", prune="2:4")
    given = torch.randn(rows, 256, device="cuda", dtype=torch.bfloat16)
    weight = torch.where(sparsity.keep_largest(linear.weight.float().abs()), linear.weight, 0)
    torch.testing.assert_close(compiled(given), F.linear(given, weight, linear.bias), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"pattern": "1:4"}, "2:4"),
        ({"choice": "best"}, "wanda"),
        ({"choice": "wanda"}, "calibrate"),
        ({"modules": "("}, "regular expression"),
    ],
)
def test_wrong_options(given: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Sparsify(**given)


@pytest.mark.parametrize("given", ["4:8", 0.5, (Sparsify(), Sparsify()), {"pattern": "2:4"}])
def test_wrong_option_at_the_door(given: Any) -> None:
    with pytest.raises(OptionError, match="option 'prune'"):
        graphopt.Options(prune=given)
