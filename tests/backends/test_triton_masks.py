"""Masks that attention computes from positions: no tensor of scores' size is read, and the answers are the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx import GraphModule

import graphopt.ops  # noqa: F401  (registers the dialect)
from graphopt import cost, edit, estimate
from graphopt.backends.triton.compile import CompiledGraph
from graphopt.passes.fuse.form_regions import form_regions
from graphopt.passes.fuse.score_functions import MOST_STEPS
from tests.backends.graphs import run

attention = torch.ops.graphopt.attention

Mask = Callable[..., Tensor]
"""From batch, heads, queries, keys and the tensors of the case to the mask."""


def positions(queries: int, keys: int) -> tuple[Tensor, Tensor]:
    """Those of queries [S, 1], the last of which is at the last key, and of keys [T]."""
    return torch.arange(queries)[:, None] + (keys - queries), torch.arange(keys)


def alibi(b: int, h: int, s: int, t: int, slopes: Tensor) -> Tensor:
    q, k = positions(s, t)
    return slopes[:, None, None] * (k - q).to(slopes.dtype)


def alibi_of_the_past(b: int, h: int, s: int, t: int, slopes: Tensor) -> Tensor:
    q, k = positions(s, t)
    return torch.where(k <= q, slopes[:, None, None] * (k - q), float("-inf"))


def window(b: int, h: int, s: int, t: int) -> Tensor:
    q, k = positions(s, t)
    return ((k <= q) & (k > q - 9))[None, None]


def prefix(b: int, h: int, s: int, t: int, lengths: Tensor) -> Tensor:
    q, k = positions(s, t)
    return (k <= q) | (k < lengths[:, None, None, None])


def documents(b: int, h: int, s: int, t: int, ids: Tensor) -> Tensor:
    q, k = positions(s, t)
    return (ids[:, None, t - s :, None] == ids[:, None, None, :]) & (k <= q)


def padded(b: int, h: int, s: int, t: int, mask: Tensor) -> Tensor:
    q, k = positions(s, t)
    return (k <= q) & mask.bool()[:, None, None]


def padded_additive(b: int, h: int, s: int, t: int, mask: Tensor) -> Tensor:
    q, k = positions(s, t)
    hidden = torch.where(k <= q, 0.0, torch.finfo(torch.float32).min)
    return hidden + (1.0 - mask.float())[:, None, None] * torch.finfo(torch.float32).min


def picked_by_index(b: int, h: int, s: int, t: int, mask: Tensor) -> Tensor:
    """As transformers' masks read padding."""
    q, k = positions(s, t)
    return (k <= q) & mask.bool()[torch.arange(b)[:, None, None, None], k]


def chunked(b: int, h: int, s: int, t: int) -> Tensor:
    q, k = positions(s, t)
    return (q // 8 == k // 8)[None, None]


def inputs_of(case: Mask, b: int, h: int, t: int) -> list[Tensor]:
    if case in (alibi, alibi_of_the_past):
        return [2.0 ** -torch.arange(1, h + 1)]
    if case is prefix:
        return [torch.randint(1, t, (b,))]
    if case is documents:
        return [torch.randint(0, 3, (b, t)).sort(-1).values]
    if case in (padded, padded_additive, picked_by_index):
        return [(torch.arange(t) >= torch.arange(b)[:, None] * 5).long()]
    return []


CASES: tuple[Mask, ...] = (
    alibi, alibi_of_the_past, window, prefix, documents, padded, padded_additive, picked_by_index, chunked
)  # fmt: skip
SHAPES = [(2, 4, 80, 80, 2), (2, 4, 1, 80, 2), (1, 2, 3, 600, 1), (2, 4, 20, 90, 4)]
"""batch, heads, queries, keys, KV heads: prefill, decode, decode with keys shared out, a prompt behind a cache"""


def computed(
    case: Mask, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, dynamic: bool = False
) -> CompiledGraph:
    """One attention with the mask of a case, checked against eager; its compiled graph."""
    b, h, s, t, kv = shape
    rows = [(b, h, s, 16), (b, kv, t, 16), (b, kv, t, 16)]
    q, k, v = (torch.randn(size).to(dtype) for size in rows)
    extra = inputs_of(case, b, h, t)

    def function(q: Tensor, k: Tensor, v: Tensor, *extra: Tensor) -> Tensor:
        mask = case(q.shape[0], q.shape[1], q.shape[2], k.shape[2], *extra)
        mask = mask.to(q.dtype) if mask.is_floating_point() else mask
        result: Tensor = attention(q, k, v, mask, scale=0.3)
        return result

    want = function(q.double(), k.double(), v.double(), *extra)
    for x in (q, k, v, *extra) if dynamic else ():
        for dim in {2: (1,), 4: (2,)}.get(x.dim(), ()):
            torch._dynamo.mark_dynamic(x, dim)
    got, (compiled,) = run(function, q, k, v, *extra, prepare=form_regions)
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)
    assert compiled.fallbacks == []
    return compiled


def largest_input(compiled: CompiledGraph, queries: int, keys: int) -> int:
    """Elements of the largest tensor that the attention reads besides q, k and v."""
    (region,) = (m for m in compiled._graph_module.modules() if getattr(m, "meta", {}).get("kind") == "attention")
    assert isinstance(region, GraphModule)
    values = [n.meta["val"] for n in region.graph.find_nodes(op="placeholder")]
    return max(
        (x.numel() for x in values if isinstance(x, Tensor) and not (x.dim() == 4 and x.shape[3] == 16)), default=0
    )


@pytest.mark.rotate(one_in=2)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_masks_are_computed_in_the_kernel(case: Mask, shape: tuple[int, ...]) -> None:
    b, h, s, t, _ = shape
    compiled = computed(case, shape)
    assert compiled.launches == 1
    assert largest_input(compiled, s, t) <= b * t < max(s, 2) * t * b


@pytest.mark.parametrize("case", [alibi, window, padded], ids=lambda case: case.__name__)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits(case: Mask, dtype: torch.dtype) -> None:
    assert computed(case, SHAPES[0], dtype).launches == 1


@pytest.mark.parametrize("case", [alibi_of_the_past, prefix, picked_by_index], ids=lambda case: case.__name__)
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[3]], ids=str)
def test_symbolic_sizes(case: Mask, shape: tuple[int, ...]) -> None:
    compiled = computed(case, shape, dynamic=True)
    assert compiled.launches == 1 and " n0" in compiled.source


def test_layers_compute_one_mask_each_with_one_kernel() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = window(1, 2, 70, 70)
        for _ in range(3):
            q = attention(q, k, v, mask, scale=0.3)
        return q

    inputs = [torch.randn(1, 70, 2, 16).transpose(1, 2) for _ in range(3)]
    got, (compiled,) = run(function, *inputs, prepare=form_regions)
    torch.testing.assert_close(got, function(*inputs), rtol=1e-4, atol=1e-4)
    assert compiled.launches == 3 and len(compiled.kernels) == 1


def test_a_row_that_sees_nothing_is_zero() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows, columns = torch.arange(70)[:, None], torch.arange(70)
        result: Tensor = attention(q, k, v, (columns < rows - 3)[None, None], scale=0.3)
        return result

    inputs = [torch.randn(1, 2, 70, 16) for _ in range(3)]
    got, (compiled,) = run(function, *inputs, prepare=form_regions)
    torch.testing.assert_close(got, function(*inputs), rtol=1e-4, atol=1e-4)
    assert compiled.launches == 1 and not got[:, :, :4].any()


@st.composite
def expressions(draw: Any) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """A condition on heads [H, 1, 1], queries [S, 1], keys [T] and numbers [B, 1, 1, T], of any depth up to three."""

    def number(depth: int) -> Callable[..., Tensor]:
        kind = draw(st.sampled_from(("leaf", "+", "-", "*", "//", "%", "min") if depth else ("leaf",)))
        if kind == "leaf":
            which, offset = draw(st.integers(0, 3)), draw(st.integers(-5, 5))
            return lambda *places: places[which] + offset
        left, right, step = number(depth - 1), number(depth - 1), draw(st.integers(1, 9))
        return {
            "+": lambda *p: left(*p) + right(*p),
            "-": lambda *p: left(*p) - right(*p),
            "*": lambda *p: left(*p) * (step - 4),
            "//": lambda *p: left(*p) // step,
            "%": lambda *p: left(*p) % step,
            "min": lambda *p: torch.minimum(left(*p), right(*p)),
        }[kind]

    def condition(depth: int) -> Callable[..., Tensor]:
        kind = draw(st.sampled_from(("<", "<=", "==", "&", "|", "~") if depth else ("<", "<=", ">", ">=", "!=")))
        if kind in ("&", "|", "~"):
            one, other = condition(depth - 1), condition(depth - 1)
            return {
                "&": lambda *p: one(*p) & other(*p), "|": lambda *p: one(*p) | other(*p), "~": lambda *p: ~one(*p)
            }[kind]  # fmt: skip
        compare = {"<": torch.lt, "<=": torch.le, "==": torch.eq, ">": torch.gt, ">=": torch.ge, "!=": torch.ne}[kind]
        left, right = number(2), number(1)
        return lambda *places: compare(left(*places), right(*places))

    return condition(2)


@settings(max_examples=15, deadline=None)
@given(expressions(), st.sampled_from([(1, 2, 30, 70), (2, 4, 1, 90), (1, 2, 2, 300)]), st.booleans())
def test_random_expressions(
    expression: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor], shape: tuple[int, ...], additive: bool
) -> None:
    b, h, s, t = shape

    def function(q: Tensor, k: Tensor, v: Tensor, numbers: Tensor) -> Tensor:
        rows, columns = positions(s, t)
        mask = expression(torch.arange(h)[:, None, None], rows, columns, numbers[:, None, None])
        mask = mask.expand(b, h, s, t) if mask.dim() < 4 else mask
        if additive:
            mask = torch.where(mask, 0.5, -2.0)
        result: Tensor = attention(q, k, v, mask, scale=0.3)
        return result

    q, k, v = torch.randn(b, h, s, 16), torch.randn(b, h, t, 16), torch.randn(b, h, t, 16)
    numbers = torch.randint(-9, 90, (b, t))
    got, (compiled,) = run(function, q, k, v, numbers, prepare=form_regions)
    torch.testing.assert_close(got, function(q, k, v, numbers), rtol=1e-4, atol=1e-4)
    assert compiled.fallbacks == []


def refusals(
    function: Callable[..., Any],
    *inputs: Tensor,
    launches: int,
    change: Callable[[GraphModule], Any] = lambda graph_module: None,
) -> list[str]:
    """Why the mask of a function's attention is read; its answer is checked. change: made in the graph before."""
    kept: list[str] = []

    def prepare(graph_module: GraphModule) -> None:
        change(graph_module)
        with edit.session(edit.Session()) as session:
            form_regions(graph_module)
        kept.extend(refusal.reason for refusal in session.refusals)

    want = function(*(x.clone() for x in inputs))
    got, (compiled,) = run(function, *inputs, prepare=prepare)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert compiled.launches == launches
    return kept


def attend(mask: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function of q, k, v and what the mask is made from, with positions of 70 queries and keys."""

    def function(q: Tensor, k: Tensor, v: Tensor, *extra: Tensor) -> Tensor:
        result: Tensor = attention(q, k, v, mask(*positions(70, 70), *extra), scale=0.3)
        return result

    return function


def rows() -> list[Tensor]:
    return [torch.randn(1, 2, 70, 16) for _ in range(3)]


def test_a_mask_that_is_an_input_is_read_and_nothing_is_said() -> None:
    assert refusals(attend(lambda q, k, mask: mask), *rows(), torch.randn(70, 70), launches=1) == []


def test_what_has_no_value_at_one_place_is_read() -> None:
    (reason,) = refusals(attend(lambda q, k, x: x.cumsum(-1)), *rows(), torch.randn(70, 70), launches=2)
    assert reason == "its mask is read from memory: aten.cumsum.default has no value at one place alone"


def test_what_is_behind_it_is_computed_all_the_same() -> None:
    mask = attend(lambda q, k, x: (x.cumsum(-1) > 0) & (k <= q))
    assert refusals(mask, *rows(), torch.randn(70), launches=2) == []


def test_an_element_picked_for_each_score_is_read() -> None:
    """As a relative bias is looked up in a table of distances."""
    far = attend(lambda q, k, table: table[(k - q).clamp(-8, 8) + 8])
    (reason,) = refusals(far, *rows(), torch.randn(17), launches=3)
    assert "aten.index.Tensor picks an element for each score" in reason


def test_too_many_operations_for_each_score_are_done_once() -> None:
    def deep(q: Tensor, k: Tensor, steps: int) -> Tensor:
        far = (k - q).float()
        for _ in range(steps):
            far = (far * 0.5).sin()
        return far

    assert refusals(attend(lambda q, k: deep(q, k, MOST_STEPS // 2 - 1)), *rows(), launches=1) == []
    (reason,) = refusals(attend(lambda q, k: deep(q, k, MOST_STEPS // 2)), *rows(), launches=3)
    assert reason.endswith(f"{MOST_STEPS + 2} operations for each score, more than {MOST_STEPS}")


def test_what_takes_longer_to_read_than_the_mask_is_not_computed_from(monkeypatch: pytest.MonkeyPatch) -> None:
    given = [torch.randn(70, 70, dtype=torch.float64) for _ in range(2)]
    mask = attend(lambda q, k, x, y: x < y)
    assert refusals(mask, *rows(), *given, launches=1) == []  # a launch takes longer still
    device = dataclasses.replace(cost.DEVICES["H100"], launch=0.0)
    monkeypatch.setattr(estimate, "gpu_of", lambda graph_module: device)
    (reason,) = refusals(mask, *rows(), *given, launches=2)
    assert reason.endswith("what it is computed from takes longer to read")


def test_memory_that_is_updated_before_the_attention_is_read_before() -> None:
    function = attend(lambda q, k, lengths: (k < lengths[:, None, None, None]) & (k <= q))

    def update(graph_module: GraphModule) -> None:
        graph = graph_module.graph
        (node,) = (n for n in graph.nodes if n.target is attention.default)
        (lengths,) = (n for n in graph.find_nodes(op="placeholder") if n.meta["val"].dtype == torch.int64)
        with graph.inserting_before(node):
            none = graph.call_function(torch.ops.aten.full.default, ([1], 3), {"dtype": torch.int64})
            none.meta["val"] = lengths.meta["val"].new_full((1,), 3)
            written = graph.call_function(torch.ops.aten.copy_.default, (lengths, none))
            written.meta["val"] = lengths.meta["val"]

    inputs = [*rows(), torch.tensor([20])]
    refusals(function, *(x.clone() for x in inputs), launches=1)
    assert refusals(function, *inputs, launches=2, change=update) == []
    assert inputs[3].item() == 3


def test_a_mask_that_is_also_returned_is_made_for_that_alone() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        mask = window(1, 2, 70, 70)
        return attention(q, k, v, mask, scale=0.3), mask

    assert refusals(function, *rows(), launches=3) == []


def test_attention_without_a_kernel_keeps_its_mask() -> None:
    inputs = [x.double() for x in rows()]
    assert refusals(attend(lambda q, k: (k <= q)[None, None]), *inputs, launches=2) == []
