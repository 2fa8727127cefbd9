"""part_products: what it rewrites and what it leaves, on steps with growing caches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule

from graphopt import backend, edit, pipeline
from graphopt.options import Options
from graphopt.passes.fuse.part_products import part_products
from tests.backends.graphs import run

pytest.importorskip("triton")
H, D = 2, 4
N = H * D


def step(project: Callable[..., tuple[Tensor, ...]]) -> Callable[..., Any]:
    """A step of attention over a cache, whose query, key and value `project` makes of the input."""

    def function(x: Tensor, past: Tensor, other: Tensor, *weights: Tensor) -> Any:
        *more, q, k, v = (t.view(*x.shape[:2], H, -1).transpose(1, 2) for t in project(x, *weights))
        keys, values = torch.cat([past, k], 2), torch.cat([other, v], 2)
        return F.scaled_dot_product_attention(q, keys, values), keys, values, *(part.relu() for part in more)

    return function


def as_gpt2(x: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    return torch.addmm(b, x.view(-1, x.shape[-1]), w).view(*x.shape[:2], -1).split(N, 2)


def compiled(function: Any, *inputs: Tensor) -> tuple[int, list[str], list[str], Any, Any]:
    """How many products were parted, what was refused, the kinds of kernels, the result, and eager's."""
    found: list[Any] = []

    def prepare(graph_module: GraphModule) -> None:
        options = Options(target="triton")
        passes = backend.arranged(options, "triton")
        with edit.session(edit.Session()) as session:
            pipeline.run(graph_module, passes[:-2], options)
            found.extend((part_products(graph_module), [refusal.reason for refusal in session.refusals]))
            assert part_products(graph_module) == 0
        pipeline.run(graph_module, passes[-1:], options)

    want = function(*inputs)
    got, (made,) = run(function, *inputs, prepare=prepare)
    return found[0], found[1], [kernel.kind for kernel in made.kernels.values()], got, want


def inputs(rows: int, *weights: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(size) for size in ((3, rows, 6), (3, H, 5, D), (3, H, 5, D), *weights)]


@pytest.mark.parametrize("rows", [1, 7])
def test_each_part_of_a_product_is_stored_where_it_belongs(rows: int) -> None:
    count, _, kinds, got, want = compiled(step(as_gpt2), *inputs(rows, (6, 3 * N), (3 * N,)))
    assert count == 1 and kinds == ["linear", "attention"]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("with_bias", [False, True])
def test_parts_of_a_linear_of_several_sizes(with_bias: bool) -> None:
    def project(x: Tensor, w: Tensor, *b: Tensor) -> tuple[Tensor, ...]:
        return F.linear(x, w, *b).split([2 * N, N, N, N], -1)

    sizes = [(5 * N, 6), (5 * N,)][: 1 + with_bias]
    count, _, kinds, got, want = compiled(step(project), *inputs(1, *sizes))
    assert count == 1 and sorted(kinds) == ["attention", "linear", "rows"]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def returns_a_part(x: Tensor, past: Tensor, other: Tensor, w: Tensor, b: Tensor) -> Any:
    _, k, _ = as_gpt2(x, w, b)
    return *step(as_gpt2)(x, past, other, w, b), k


def reads_the_whole(x: Tensor, past: Tensor, other: Tensor, w: Tensor, b: Tensor) -> Any:
    whole = torch.addmm(b, x.view(-1, 6), w)
    return *step(lambda x, w, b: whole.view(*x.shape[:2], -1).split(N, 2))(x, past, other, w, b), whole.sum()


def a_bias_for_each_row(x: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    return torch.addmm(b[:3, None], x.view(-1, 6), w).view(3, 1, -1).split(N, 2)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (reads_the_whole, "the whole product is read as well"),
        (step(a_bias_for_each_row), "its bias is not one number for each column"),
        (returns_a_part, "the caller, or a view, sees the strides of a part"),
    ],
)
def test_what_is_left_and_why(function: Any, reason: str) -> None:
    count, reasons, _, got, want = compiled(function, *inputs(1, (6, 3 * N), (3 * N,)))
    assert count == 0 and reason in reasons
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert function is not returns_a_part or got[-1].stride() == want[-1].stride()
