"""Twenty bugs of different classes, planted one by one: which instrument catches each.

verify: the wrong rewrite itself, by translation validation. check: `check_pass` without verification (numbers, layout,
memory, changed inputs and weights against the graph without the pass). bisect: the rewrite is found by limiting their
number, for a program that compares numbers.
The table is the claim; a bug that an instrument newly catches or misses fails the test.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx

from graphopt import _compat, capture, edit, pipeline, verify
from graphopt.bisect import BisectError, Culprit, Result, search
from graphopt.options import Options
from graphopt.pipeline import graph_pass
from graphopt.testing import check_kernel, check_pass, trace
from tests.planted import inlined, wrong_pass

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class Bug:
    """A wrong pass, a program it breaks, and which instruments see it."""

    name: str
    pass_: Callable[[fx.GraphModule], int]
    function: Callable[..., Any]
    inputs: tuple[torch.Tensor, ...]
    verify: bool = True
    check: bool = True
    bisect: bool = True
    dynamic: bool | None = None
    second: tuple[torch.Tensor, ...] = ()


def x34() -> torch.Tensor:
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


def erased_mutation() -> Callable[[fx.GraphModule], int]:
    @graph_pass(exactness="bitwise")
    def planted(graph_module: fx.GraphModule) -> int:
        found = graph_module.graph.find_nodes(op="call_function", target=aten.copy_.default)
        for node in found:
            graph_module.graph.erase_node(node)
        return len(found)

    return planted


def swapped_draws() -> Callable[[fx.GraphModule], int]:
    @graph_pass(exactness="bitwise")
    def planted(graph_module: fx.GraphModule) -> int:
        draws = [node for node in graph_module.graph.nodes if node.target is aten.rand.default]
        if len(draws) != 2 or isinstance(draws[1].meta.get("graphopt"), edit.Provenance):
            return 0
        with edit.rewriting(graph_module, draws[1].next) as rewrite:
            rewrite.replace(draws[0], rewrite.call(aten.rand.default, *draws[0].args, **draws[0].kwargs))
        if rewrite.applied:
            graph_module.graph.erase_node(draws[0])
        return rewrite.applied

    return planted


def first_weight_only() -> Callable[[fx.GraphModule], int]:
    """Bakes the value that a weight has now into the graph."""

    @graph_pass(exactness="bitwise")
    def planted(graph_module: fx.GraphModule) -> int:
        weights = [node for node in graph_module.graph.nodes if node.meta.get("role") == "weight" and node.users]
        value = capture.weight_tensor(weights[0]) if weights else None
        if value is None:
            return 0
        weight, user = weights[0], next(iter(weights[0].users))
        with _compat.without_modes():
            kept = value.detach().clone()
        with edit.rewriting(graph_module, user) as rewrite:
            rewrite.replace(weight, rewrite.constant(kept))
        return rewrite.applied

    return planted


def lossless(target: Any, function: Callable[..., Any]) -> Callable[[fx.GraphModule], int]:
    return wrong_pass(target, inlined(function), exactness="bitwise")


def two_draws(x: torch.Tensor) -> torch.Tensor:
    first, second = torch.rand(3, 4), torch.rand(3, 4)
    return x * first - second


WEIGHTED = torch.nn.Linear(4, 4)
TABLE = torch.randn(6, 4)
ROWS = torch.tensor([0, 5, 2])

BUGS = [
    Bug(
        "wrong constant",
        wrong_pass(aten.div.Tensor, inlined(lambda x, y: x * 0.51)),
        lambda x: (x / 2.0).sin(),
        (x34(),),
    ),
    Bug(
        "wrong epsilon",
        wrong_pass(aten.add.Tensor, inlined(lambda x, eps: x + eps / 10)),
        lambda x: x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-3),
        (x34(),),
    ),
    Bug("dropped mutation", erased_mutation(), lambda x: x.mul_(2.0).sin() + 1, (x34(),), verify=False),
    Bug(
        "lost copy: output shares memory with an input",
        wrong_pass(aten.clone.default, lambda rewrite, node: node.args[0], exactness="bitwise"),
        lambda x: x.clone(),
        (x34(),),
        bisect=False,
    ),
    Bug(
        "lost NaN",
        lossless(aten.relu.default, lambda x: torch.nan_to_num(x, nan=0.0).relu()),
        torch.relu,
        (x34(),),
        check=False,
    ),
    Bug(
        "lost sign of zero",
        lossless(aten.neg.default, lambda x: 0.0 - x),
        lambda x: torch.neg(x),
        (x34(),),
        check=False,
    ),
    Bug(
        "lost infinity",
        wrong_pass(aten.exp.default, inlined(lambda x: x.exp().clamp(max=1e38))),
        torch.exp,
        (x34(),),
        check=False,
    ),
    Bug(
        "rounded in a narrower dtype",
        wrong_pass(aten.sum.dim_IntList, inlined(lambda x, dims: x.bfloat16().sum(dims).float())),
        lambda x: x.sum(-1),
        (x34(),),
    ),
    Bug(
        "wrong broadcast",
        wrong_pass(aten.sub.Tensor, inlined(lambda x, y: x - y[:, None])),
        lambda x: x @ x.T - x.sum(-1),
        (x34(),),
    ),
    Bug(
        "swapped operands",
        wrong_pass(aten.sub.Tensor, inlined(lambda x, y: y - x)),
        lambda x, y: x - y * 2,
        (x34(), x34() + 1),
    ),
    Bug(
        "transposed matrix",
        wrong_pass(aten.mm.default, inlined(lambda x, y: x @ y.T)),
        lambda x: x @ x.sin(),
        (torch.randn(4, 4),),
    ),
    Bug(
        "size of the first call baked in",
        wrong_pass(aten.mean.dim, lambda rewrite, node: rewrite.inline(lambda x: x.sum(-1) / 4.0, node.args[0])),
        lambda x: x.mean(-1),
        (x34(),),
        dynamic=True,
        second=(torch.randn(3, 6),),
    ),
    Bug(
        "off by one at the end of a row",
        wrong_pass(
            aten.cumsum.default,
            inlined(lambda x, dim: x.cumsum(dim) - x * (torch.arange(x.shape[-1]) == x.shape[-1] - 1)),
        ),
        lambda x: x.cumsum(-1),
        (x34(),),
        dynamic=True,
    ),
    Bug("baked weight", first_weight_only(), WEIGHTED, (x34(),)),
    Bug("reordered random numbers", swapped_draws(), two_draws, (x34(),)),
    Bug(
        "dropped mask",
        wrong_pass(aten.where.self, lambda rewrite, node: node.args[1]),
        lambda x: torch.where(torch.arange(4) <= torch.arange(3)[:, None], x, -1e9).softmax(-1),
        (x34(),),
    ),
    Bug(
        "mask shifted by one",
        wrong_pass(aten.le.Tensor, inlined(lambda x, y: x < y)),
        lambda x: torch.where(torch.arange(4) <= torch.arange(3)[:, None], x, -1e9).exp(),
        (x34(),),
    ),
    Bug(
        "wrong row of a table",
        wrong_pass(aten.embedding.default, inlined(lambda table, rows: table[(rows + 1) % table.shape[0]])),
        lambda rows, table: torch.nn.functional.embedding(rows, table) + 1,
        (ROWS, TABLE),
    ),
    Bug(
        "missing maximum: softmax overflows",
        wrong_pass(aten._softmax.default, inlined(lambda x, dim, half: x.exp() / x.exp().sum(dim, keepdim=True))),
        lambda x: x.softmax(-1),
        (x34(),),
        check=False,
    ),
    Bug(
        "tie broken the other way",
        lossless(aten.argmax.default, lambda x, dim: x.shape[-1] - 1 - x.flip(-1).argmax(dim)),
        lambda x: x.argmax(-1),
        (x34(),),
        check=False,
    ),
]


def test_there_are_twenty_classes() -> None:
    assert len({bug.name for bug in BUGS}) == 20


def caught_by_verify(bug: Bug) -> verify.Failure | None:
    found: list[verify.Failure] = []
    with torch.no_grad():
        trace(bug.function, [bug.pass_], observer=verify.Checker("all", found.append), dynamic=bug.dynamic)(*bug.inputs)
    return found[0] if found else None


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_verify(bug: Bug) -> None:
    failure = caught_by_verify(bug)
    assert (failure is not None) == bug.verify
    if failure is not None and failure.inputs.values:
        sizes = [value.numel() for value in failure.inputs.values if isinstance(value, torch.Tensor)]
        assert max(sizes) <= 16, "the reproducer is not small"


def caught_by_check(bug: Bug) -> bool:
    try:
        check_pass(bug.pass_, bug.function, bug.inputs, verify="off", second=bug.second, dynamic=bug.dynamic)
    except (AssertionError, RuntimeError):
        return True
    return False


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_check_pass_without_verification(bug: Bug) -> None:
    assert caught_by_check(bug) == bug.check


def found_by_bisect(bug: Bug) -> Culprit:
    """Raises BisectError if there is no rewrite to find."""
    from graphopt.dump import Dump

    def execute(environment: Any) -> Result:
        options = Options(
            limit=int(environment["GRAPHOPT_LIMIT"]) if "GRAPHOPT_LIMIT" in environment else None,
            disable=tuple(environment.get("GRAPHOPT_DISABLE", "").split(",")),
            strict=True,
        )
        return Result(int(not runs_right(bug, options, environment.get("GRAPHOPT_DUMP"), Dump)), "")

    return search(execute)


@pytest.mark.parametrize("bug", [bug for bug in BUGS if bug.check and bug.bisect], ids=lambda bug: bug.name)
def test_bisect(bug: Bug) -> None:
    """What is visible in the numbers is found by bisecting; the erased copy_ is no rewrite, and bisect says so."""
    if not bug.verify:
        with pytest.raises(BisectError, match="without any rewrite"):
            found_by_bisect(bug)
        return
    culprit = found_by_bisect(bug)
    assert (culprit.number, culprit.pass_name, culprit.confirmed) == (1, "planted", True)
    assert culprit.changes


def runs_right(bug: Bug, options: Options, folder: str | None, dump: Any) -> bool:
    """One run of a program with the planted pass under bisecting options; the wrong answer is the exit status."""
    import json

    def prepare(graph_module: fx.GraphModule, inputs: Any, info: Any) -> Any:
        reports = pipeline.run(graph_module, [bug.pass_], options)
        if folder is not None:
            written = dump(folder)
            written.graph("last", graph_module)
            written.report(json.dumps({"passes": [dataclasses.asdict(made) for made in reports]}, default=str))
        run = lambda arguments: graph_module(*arguments)  # noqa: E731
        run._boxed_call = True
        return run

    torch.compiler.reset()
    compiled = torch.compile(
        bug.function, backend=lambda graph, inputs: capture.capture(graph, inputs, prepare), dynamic=bug.dynamic
    )
    with torch.no_grad():
        return all(
            torch.allclose(a, b, atol=1e-5, rtol=1e-4, equal_nan=True)
            for a, b in zip(calls(bug, bug.function), calls(bug, compiled), strict=True)
        )


def calls(bug: Bug, function: Callable[..., Any]) -> list[torch.Tensor]:
    """Results and inputs afterwards: of one call, one with other weights, and one with other sizes."""
    found: list[torch.Tensor] = []
    weights = list(bug.function.parameters()) if isinstance(bug.function, torch.nn.Module) else []
    for inputs, scale in ((bug.inputs, 1.0), (bug.inputs, 2.0), (bug.second, 0.5)):
        for weight in weights:
            weight.mul_(scale)
        if inputs:
            given = [value.clone() for value in inputs]
            torch.manual_seed(0)
            found += [function(*given), *given]
    return found


@pytest.mark.parametrize(
    ("name", "kernel"),
    [
        ("eps left out", lambda x, w, eps: w * (x * torch.rsqrt((x * x).mean(-1, keepdim=True)))),
        ("accumulates in bfloat16", lambda x, w, eps: (w * x.bfloat16() * torch.rsqrt(
            x.bfloat16().pow(2).mean(-1, keepdim=True) + eps)).float()),
        ("last column dropped", lambda x, w, eps: w * x * torch.rsqrt(x[..., :-1].pow(2).mean(-1, keepdim=True) + eps)),
        ("writes into its input", lambda x, w, eps: x.mul_(torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)) * w),
        ("another dtype", lambda x, w, eps: (w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))).double()),
    ],
)  # fmt: skip
def test_wrong_kernel_is_caught(name: str, kernel: Callable[..., Any]) -> None:
    args = [torch.randn(3, 8), torch.randn(8), 1e-5]
    right = lambda x, w, eps: w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))  # noqa: E731
    check_kernel(torch.ops.graphopt.rms_norm.default, right, args)
    with pytest.raises(AssertionError, match="inputs: "):
        check_kernel(torch.ops.graphopt.rms_norm.default, kernel, args)
