"""Generated attention under the interpreter against the dialect's meaning."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from triton.runtime.interpreter import InterpreterBuilder

import graphopt.ops  # noqa: F401  (registers the dialect)
from graphopt.backends.triton.attention_split import SPLIT_KEYS
from graphopt.backends.triton.check import TARGETS, compile_for
from graphopt.passes.fuse.form_regions import form_regions
from tests.backends.graphs import run

attention = torch.ops.graphopt.attention

SHAPES = [(2, 4, 20, 20, 16, 16, 4), (1, 4, 1, 33, 16, 16, 2), (1, 8, 70, 70, 8, 24, 2), (1, 6, 5, 130, 20, 20, 1)]
"""batch, heads, queries, keys, head size, value size, KV heads"""


def assert_agrees(*inputs: torch.Tensor, tolerance: float = 1e-4, launches: int = 1, **settings: Any) -> str:
    def function(*tensors: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = attention(*tensors, scale=0.3, **settings)
        return result

    wide = [t.float() if t.is_floating_point() else t for t in inputs]
    got, compiled = run(function, *inputs, prepare=form_regions)
    assert compiled[0].fallbacks == [] and compiled[0].launches == launches
    want = function(*inputs)
    strides = zip(got.stride(), want.stride(), got.shape, strict=True)
    assert all(mine == eager for mine, eager, size in strides if size != 1)
    torch.testing.assert_close(got.float(), function(*wide), rtol=tolerance, atol=tolerance)
    return compiled[0].source


def operands(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    batch, heads, queries, keys, size, width, kv_heads = shape
    sizes = [(batch, heads, queries, size), (batch, kv_heads, keys, size), (batch, kv_heads, keys, width)]
    return [torch.randn(s).to(dtype) for s in sizes]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "settings",
    [{}, {"is_causal": True}, {"softcap": 5.0}, {"is_causal": True, "window": 7}],
    ids=["full", "causal", "softcap", "window"],
)
def test_settings(shape: tuple[int, ...], settings: dict[str, Any]) -> None:
    assert_agrees(*operands(shape), **settings)


@pytest.mark.parametrize("shape", SHAPES[:2])
def test_masks_broadcast(shape: tuple[int, ...]) -> None:
    batch, _, queries, keys, *_ = shape
    assert_agrees(*operands(shape), torch.rand(batch, 1, queries, keys) > 0.4)
    assert_agrees(*operands(shape), torch.randn(queries, keys))


def test_a_row_that_sees_nothing_is_zero() -> None:
    mask = torch.ones(1, 1, 20, 20, dtype=torch.bool)
    mask[..., 3, :] = False
    assert_agrees(*operands((1, 2, 20, 20, 16, 16, 2)), mask)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_operands(dtype: torch.dtype) -> None:
    assert_agrees(*operands((1, 4, 33, 70, 32, 32, 2), dtype), tolerance=2e-2)


def test_few_queries_read_each_key_once_for_all_heads_of_its_group() -> None:
    source = assert_agrees(*operands((2, 8, 1, 40, 16, 16, 2)))
    assert "cdiv(4, 16) * 4" in source.split("def call", 1)[1]


def test_causal_walk_ends_at_the_diagonal() -> None:
    assert "last_0" in assert_agrees(*operands((1, 2, 200, 200, 16, 16, 2)), is_causal=True)


def test_a_cache_seen_through_views_is_not_copied() -> None:
    def function(q: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
        keys = cache.permute(1, 2, 0, 3)
        result: torch.Tensor = attention(q, keys, keys, scale=0.3)
        return result

    q, cache = torch.randn(1, 4, 3, 16), torch.randn(50, 1, 2, 16)
    got, compiled = run(function, q, cache, prepare=form_regions)
    assert compiled[0].launches == 1 and compiled[0].fallbacks == []
    torch.testing.assert_close(got, function(q, cache), rtol=1e-4, atol=1e-4)


LONG = 2 * SPLIT_KEYS + 70
SPLITS = [(1, 6, 1, LONG, 16, 16, 2), (2, 4, 3, LONG, 24, 40, 4), (1, 2, 2, 20 * SPLIT_KEYS + 1, 16, 16, 1)]


@pytest.mark.rotate(one_in=3)
@pytest.mark.parametrize("shape", SPLITS)
@pytest.mark.parametrize("settings", [{}, {"is_causal": True}, {"softcap": 5.0}, {"window": 7}], ids=str)
def test_keys_of_few_queries_are_shared_out(shape: tuple[int, ...], settings: dict[str, Any]) -> None:
    assert_agrees(*operands(shape), **settings)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_shared_out_sixteen_bit_operands(dtype: torch.dtype) -> None:
    assert_agrees(*operands(SPLITS[0], dtype), tolerance=2e-2)


def test_up_to_one_run_of_keys_and_many_queries_are_not_shared_out() -> None:
    assert_agrees(*operands((1, 4, 1, SPLIT_KEYS, 16, 16, 2)))
    assert_agrees(*operands((1, 4, 20, LONG, 16, 16, 2)))


def test_runs_that_see_nothing_add_nothing() -> None:
    visible = torch.zeros(1, 1, 1, LONG, dtype=torch.bool)
    visible[..., SPLIT_KEYS + 3 : SPLIT_KEYS + 9] = True
    assert_agrees(*operands(SPLITS[0]), visible)
    nothing = torch.zeros_like(visible)
    assert_agrees(*operands(SPLITS[0]), nothing)


@pytest.mark.parametrize("kind", ["bool", "additive"])
@pytest.mark.parametrize("keys", [200, LONG])
def test_blocks_that_the_mask_hides_are_not_read(kind: str, keys: int) -> None:
    """As of a cache of fixed size: whoever reads the rows behind the used ones is found out."""
    q, k, v = operands((2, 6, 2, keys, 16, 16, 2))
    visible = torch.zeros(2, 1, 2, keys, dtype=torch.bool)
    visible[0, :, :, 3:50] = visible[1, :, 1, :60] = visible[1, :, 0, 70] = True
    mask = visible if kind == "bool" else torch.where(visible, 0.5, -math.inf)

    def function(*tensors: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = attention(*tensors, scale=0.3)
        return result

    expected = function(q, k, v, mask)
    k[:, :, 128:] = v[:, :, 128:] = math.nan
    got, (compiled,) = run(function, q, k, v, mask, prepare=form_regions)
    assert compiled.fallbacks == []
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_what_is_not_finite_in_one_run_shows() -> None:
    q, k, v = operands(SPLITS[0])
    k[0, 0, SPLIT_KEYS + 5, 3] = math.nan

    def function(*tensors: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = attention(*tensors, scale=0.3)
        return result

    got, _ = run(function, q, k, v, prepare=form_regions)
    assert got[:, :3].isnan().all() and got[:, 3:].isfinite().all()


def test_two_layers_take_turns_with_the_scratch_memory() -> None:
    def function(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        first: torch.Tensor = attention(q, k, v, scale=0.3)
        second: torch.Tensor = attention(first, v, k, scale=0.3)
        return second

    inputs = operands(SPLITS[0])
    got, compiled = run(function, *inputs, prepare=form_regions)
    torch.testing.assert_close(got, function(*inputs), rtol=1e-4, atol=1e-4)
    assert len(re.findall(r"scratch\d+ = torch.empty", compiled[0].source)) == 1 and compiled[0].launches == 2
    assert len(re.findall(r"scratch\d+ = torch.zeros", compiled[0].source)) == 1


@pytest.mark.parametrize("shape", SPLITS)
def test_who_comes_last_does_not_show(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """The last program merges the runs in their own order: equal bits, whatever order the programs ran in."""
    inputs = operands(shape)
    first, (compiled,) = run(lambda *tensors: attention(*tensors, scale=0.3), *inputs, prepare=form_regions)
    ordered = InterpreterBuilder.set_grid_idx

    def from_the_last(self: InterpreterBuilder, x: int, y: int, z: int) -> None:
        ordered(self, self.grid_dim[0] - 1 - x, y, z)

    monkeypatch.setattr(InterpreterBuilder, "set_grid_idx", from_the_last)
    assert compiled(*inputs)[0].equal(first)


def test_counts_are_zero_after_each_launch() -> None:
    """So that layers, configurations that are timed, and replays of a recording may share them."""
    inputs = operands(SPLITS[1])
    _, (compiled,) = run(lambda *tensors: attention(*tensors, scale=0.3), *inputs, prepare=form_regions)
    (kernel,) = compiled.kernels.values()
    assert [(s.name, s.zeroed) for s in kernel.scratch] == [("parts", False), ("arrived", True)]
    seen: list[torch.Tensor] = []
    launch = compiled.namespace["launch"]

    def twice(kernel: Any, grid: int, *tensors: torch.Tensor, **constants: Any) -> None:
        q, k, v, out, parts, arrived = tensors
        parts.fill_(math.nan)
        for result in (out, torch.empty_like(out)):
            launch(kernel, grid, q, k, v, result, parts, arrived, **constants)
            seen.extend([result.clone(), arrived.clone()])

    compiled.namespace["launch"] = twice
    (got,) = compiled(*inputs)
    assert len(seen) == 4 and seen[0].equal(seen[2]) and got.equal(seen[0])
    assert seen[1].shape == (2 * 4,) and not seen[1].any() and not seen[3].any()


@pytest.mark.parametrize("nan_rows", [False, True])
def test_no_keys_at_all_still_write_the_answer(nan_rows: bool) -> None:
    def function(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = attention(q, k, v, scale=0.3, nan_rows=nan_rows)
        return result

    q, k, v = operands((1, 6, 1, 30, 16, 16, 2))
    for rows in (k, v):
        torch._dynamo.mark_dynamic(rows, 2)
    _, (compiled,) = run(function, q, k, v, prepare=form_regions)
    tensors = iter((q, k[:, :, :0], v[:, :, :0]))
    wanted = [node.meta["val"] for node in compiled._graph_module.graph.find_nodes(op="placeholder")]
    (got,) = compiled(*(next(tensors) if isinstance(value, torch.Tensor) else 0 for value in wanted))
    assert got.isnan().all() if nan_rows else not got.any()


@pytest.mark.parametrize("target", TARGETS)
def test_sums_are_released_before_they_are_counted_and_acquired_before_they_are_read(target: str) -> None:
    """In the machine code: a barrier, then an addition that is a release and an acquire for the whole device."""
    _, (compiled,) = run(
        lambda *tensors: attention(*tensors, scale=0.3), *operands(SPLITS[0], torch.bfloat16), prepare=form_regions
    )
    (kernel,) = compiled.kernels.values()
    code = compile_for(kernel, target).asm
    if target.startswith("sm"):
        before, after = code["ptx"].split("atom.global.gpu.acq_rel.add.u32")
        stored = before.rindex("st.global")
        assert "bar.sync" in before[stored:] and "bar.sync" in after[: after.index("ld.global")]
    else:
        before, after = code["amdgcn"].split("global_atomic_add ")
        assert "s_barrier" in before[before.rindex("global_store") :]
        release = before[before.rindex("s_barrier") :]
        assert re.search(r"buffer_wbl2 sc1\s+s_waitcnt vmcnt\(0\)", release)
        assert after.index("buffer_inv sc1") < after.index("s_barrier") < after.index("global_load")


def test_one_kernel_for_all_lengths() -> None:
    def function(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = attention(q, k, v, scale=0.3)
        return result

    for keys in (30, LONG):
        inputs = operands((1, 6, 1, keys, 16, 16, 2))
        for rows in inputs[1:]:
            torch._dynamo.mark_dynamic(rows, 2)
        got, (compiled,) = run(function, *inputs, prepare=form_regions)
        assert compiled.launches == 1 and compiled.fallbacks == []
        torch.testing.assert_close(got, function(*inputs), rtol=1e-4, atol=1e-4)
