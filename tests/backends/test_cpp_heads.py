"""Heads in chains: turned, normalised, stored in a cache and met there; and which nodes of a graph are written so."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from graphopt import ops, shapes
from graphopt.backends.cpp import chain, heads, lowerings
from graphopt.lowering import choose
from tests.backends.test_cpp_chain import texts

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
pytestmark = pytest.mark.usefixtures("cpp_library")
kernels = torch.ops.graphopt_cpp
aten = torch.ops.aten


def error_in_units(got: Tensor, want: Tensor) -> float:
    """The largest error in units of the last place at the size of the largest element, or of 1."""
    assert got.shape == want.shape and got.dtype == want.dtype
    size = max(1.0, float(want.double().abs().max()))
    return float((got.double() - want.double()).abs().max()) / size / torch.finfo(want.dtype).eps


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", (False, True))
@pytest.mark.parametrize("of_each", (False, True), ids=("for all sequences", "for each"))
def test_heads_are_turned_as_eager_does(isa: str, interleaved: bool, of_each: bool, dtype: torch.dtype) -> None:
    for size in (2, 6, 34, 64, 80):
        batch, length, count = 2, 3, 5
        x = torch.randn(batch, length, count * size).to(dtype)
        cos, sin = (torch.randn(batch if of_each else 1, 1, length, size).to(dtype) for _ in range(2))
        (got,) = kernels.chain([x], [cos, sin], [], f"rope v0 w0 w1 {size} {int(interleaved)}; out v1")
        want = ops.rope(x.unflatten(-1, (count, size)).transpose(1, 2), cos, sin, interleaved)
        # In float32 a product may go into the sum unrounded.
        assert error_in_units(got, want.transpose(1, 2).flatten(2)) <= (dtype == torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_heads_are_normalised_one_by_one(isa: str, dtype: torch.dtype) -> None:
    x, scale = torch.randn(2, 3, 5 * 24).to(dtype), torch.rand(24).to(dtype)
    (got,) = kernels.chain([x], [scale], [], "rms_norm v0 w0 1e-06 0.0 1.0 24; out v1")
    assert error_in_units(got, ops.rms_norm(x.unflatten(-1, (5, 24)), scale, 1e-6).flatten(2)) <= 4
    (plain,) = kernels.chain([x], [], [], "rms_norm v0 - 1e-06 0.0 1.0 24; out v1")
    assert error_in_units(plain, ops.rms_norm(x.unflatten(-1, (5, 24)), None, 1e-6).flatten(2)) <= 4


def room(batch: int, count: int, length: int, size: int, dtype: torch.dtype, by_rows: bool) -> Tensor:
    """A cache [B, H, T, D] in memory of its own order, or with the rows of all sequences side by side."""
    if by_rows:
        return torch.randn(length, batch, count, size).to(dtype).permute(1, 2, 0, 3)
    return torch.randn(batch, count, length, size).to(dtype)


def attended(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None, *how: float
) -> Tensor:
    scale, softcap, window, nan_rows = how or (0.3, 0.0, 0, 0)
    named = "-" if mask is None else "w0"
    text = f"attend v0 v1 v2 r0 r1 {named} {scale} {softcap} {window} {int(nan_rows)}; out v3"
    (out,) = kernels.chain([q, k, v], [] if mask is None else [mask], [keys, values], text)
    return out  # type: ignore[no-any-return]


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_attention_over_rooms(data: st.DataObject) -> None:
    """Against the operator over rooms that were written before it: bit for bit, also on threads without processors."""
    draw = data.draw
    dtype = draw(st.sampled_from(DTYPES))
    batch, length, groups, kv_heads = (draw(st.integers(1, most)) for most in (3, 4, 3, 3))
    size, size_v, past = (
        draw(st.sampled_from([4, 24, 64])),
        draw(st.sampled_from([4, 20, 64])),
        draw(st.integers(0, 300)),
    )
    by_rows, softcap, window = draw(st.booleans()), draw(st.sampled_from([0.0, 3.0])), draw(st.sampled_from([0, 7]))
    torch.manual_seed(draw(st.integers(0, 99)))
    keys = room(batch, kv_heads, past + length, size, dtype, by_rows)
    values = room(batch, kv_heads, past + length, size_v, dtype, by_rows)
    q, k, v = (
        torch.randn(batch, length, count * width).to(dtype)
        for count, width in ((groups * kv_heads, size), (kv_heads, size), (kv_heads, size_v))
    )
    mask = draw(st.sampled_from([None, torch.bool, dtype, torch.float32]))
    if mask is not None:
        seen = torch.rand(batch, 1, length, past + length) > draw(st.sampled_from([0.3, 0.99]))
        mask = seen if mask is torch.bool else torch.zeros(seen.shape, dtype=mask).masked_fill(~seen, -torch.inf)
    stored = [
        torch.cat([cache[:, :, :past], new.unflatten(-1, (kv_heads, -1)).transpose(1, 2)], 2)
        for cache, new in ((keys, k), (values, v))
    ]
    how = 0.2, softcap, window, draw(st.booleans())
    before = torch.get_num_threads()
    torch.set_num_threads(draw(st.integers(1, 5)))
    try:
        got = attended(q, k, v, keys, values, mask, *how)
        written = keys.clone(), values.clone()
        heads_of_q = q.unflatten(-1, (-1, size)).transpose(1, 2)
        want = kernels.attention(heads_of_q, keys, values, mask, False, *how)
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, written, stored))
    torch.testing.assert_close(got, want.transpose(1, 2).flatten(2), rtol=0, atol=0, equal_nan=True)


def test_fewer_threads_than_asked_for() -> None:
    """A limit of OpenMP's, or a caller that is a parallel region: what falls to threads that do not come is done."""
    program = (
        "import torch; from graphopt.backends import cpp\n"
        "assert not cpp.unavailable_reason(); torch.set_num_threads(4)\n"
        "rows, rooms = [torch.randn(1, 128) for _ in range(3)], [torch.randn(1, 2, 900, 64) for _ in range(2)]\n"
        "call = torch.ops.graphopt_cpp\n"
        "got = call.chain(rows, [], rooms, 'attend v0 v1 v2 r0 r1 - 0.1 0 0 0; out v3')[0]\n"
        "q = rows[0].view(1, 1, 2, 64).transpose(1, 2)\n"
        "print(torch.equal(got, call.attention(q, *rooms, None, False, 0.1, 0.0, 0).flatten()[None]))"
    )
    limited = {**os.environ, "OMP_THREAD_LIMIT": "2"}
    done = subprocess.run([sys.executable, "-c", program], env=limited, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_on_every_instruction_set(isa: str, threads: int, dtype: torch.dtype) -> None:
    for batch, length, past in ((1, 1, 0), (1, 1, 200), (2, 3, 77)):
        keys, values = (room(batch, 3, past + length, 64, dtype, True) for _ in range(2))
        q, k, v = (torch.randn(batch, length, count * 64).to(dtype) for count in (9, 3, 3))
        got = attended(q, k, v, keys, values)
        want = F.scaled_dot_product_attention(
            q.double().unflatten(-1, (9, 64)).transpose(1, 2),
            keys.double(),
            values.double(),
            scale=0.3,
            enable_gqa=True,
        )
        assert error_in_units(got, want.transpose(1, 2).flatten(2).to(dtype)) <= 8


ATTEND = "attend v0 v1 v2 r0 r1 - 1 0 0 0"


@pytest.mark.parametrize(
    ("rows", "rooms", "text", "message"),
    [
        ([(2, 8), (2, 8), (2, 8)], [(1, 2, 1, 4)] * 2, ATTEND, "2 rows of 8, 8 and 8 elements do not fit"),
        ([(2, 9), (2, 8), (2, 8)], [(1, 2, 3, 4)] * 2, ATTEND, "2 rows of 9, 8 and 8 elements do not fit"),
        ([(3, 8), (3, 8), (3, 8)], [(2, 2, 3, 4)] * 2, ATTEND, "3 rows of 8, 8 and 8 elements do not fit"),
        ([(2, 8), (2, 8), (2, 8)], [(1, 2, 3, 4), (1, 2, 5, 4)], ATTEND, "do not go together"),
        ([(2, 8), (2, 8), (2, 8)], [(1, 2, 3, 4)], ATTEND, "no room 1"),
        ([(2, 8), (2, 8), (2, 8)], [(1, 2, 12)] * 2, ATTEND, "no rooms of keys and values"),
        ([(2, 8), (2, 8), (2, 8)], [(1, 2, 3, 4)] * 2, "attend v0 v1 v2 r0 r1 w0 1 0 0 0", "no weight 0"),
        ([(2, 8), (2, 8), (2, 8)], [(1, 2, 3, 4)] * 2, "attend v0 v1 v2 r0 r1 - 1 -1 0 0", "softcap -1"),
        ([(2, 8), (2, 8), (2, 8)], [(1, 2, 3, 4)] * 2, "attend v0 v1 v2 r0 r1 -", "attend takes 10 operands, got 6"),
        ([(2, 8)], [], "rms_norm v0 - 1e-06 0 1 3", "rows of 8 elements have no heads of 3"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(rows: Any, rooms: Any, text: str, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        values, caches = ([torch.ones(size) for size in sizes] for sizes in (rows, rooms))
        kernels.chain(values, [], caches, f"{text}; out v{len(rows)}")


@pytest.mark.parametrize("size", [(1, 1, 3, 8), (1, 1, 2, 4), (2, 8, 2)])
def test_angles_of_other_rows_are_refused(size: tuple[int, ...]) -> None:
    with pytest.raises(RuntimeError, match="do not turn 4 rows of heads of 8 elements"):
        kernels.chain([torch.ones(4, 8)], [torch.ones(1, 1, 2, 8), torch.ones(size)], [], "rope v0 w0 w1 8 0; out v1")


def test_a_room_of_another_dtype_is_refused() -> None:
    rows, rooms = [torch.ones(1, 8)] * 3, [torch.ones(1, 2, 3, 4, dtype=torch.bfloat16)] * 2
    with pytest.raises(RuntimeError, match="rows of float do not go into a room of c10::BFloat16"):
        kernels.chain(rows, [], rooms, "attend v0 v1 v2 r0 r1 - 1 0 0 0; out v3")


def test_memory_for_results_is_given() -> None:
    x, out = torch.randn(2, 8), torch.empty(2, 8)
    kernels.chain_into([x], [], [], [out], "relu v0; out v1")
    assert torch.equal(out, x.relu())
    for wrong in (torch.empty(2, 9), torch.empty(2, 8, dtype=torch.bfloat16), torch.empty(8, 2).t()):
        with pytest.raises(RuntimeError, match="2 rows of 8 elements do not go into memory"):
            kernels.chain_into([x], [], [], [wrong], "relu v0; out v1")
    with pytest.raises(RuntimeError, match="memory for 1 of 2 results"):
        kernels.chain_into([x], [], [], [out], "relu v0; relu v1; out v1 v2")


# What is written so. --------------------------------------------------------------------------------------------------

SIZE = 8


def shown(rows: Tensor) -> Tensor:
    return rows.unflatten(-1, (-1, SIZE)).transpose(1, 2)


def appended(past: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    room, length = ops.kv_reserve(past, new.shape[2], 2), past.shape[2]
    return room, aten.slice_scatter.default(room, new, 2, length, length + new.shape[2])


def block(
    x: Tensor, past_keys: Tensor, past_values: Tensor, cos: Tensor, sin: Tensor, *weights: Tensor,
    turned: Callable[..., Tensor] = lambda x, cos, sin: ops.rope(x, cos, sin),
    extra: Callable[[dict[str, Tensor]], Any] = lambda values: None,
    **how: Any,
) -> Any:  # fmt: skip
    q, k, v = ops.parallel_linear(x, list(weights[:3]), [None] * 3)
    key_room, keys = appended(past_keys, turned(shown(k), cos, sin))
    value_room, values = appended(past_values, shown(v))
    y = ops.attention(turned(shown(q), cos, sin), keys, values, None, **{"scale": 0.3, **how})
    out = ops.linear(y.transpose(1, 2).flatten(2), weights[3]) + x
    found = extra({"keys": keys, "values": values, "y": y, "q": q, "out": out, "room": key_room})
    key_room.copy_(keys), value_room.copy_(values)
    return [each for each in (out, keys, values, found) if each is not None]


def block_inputs(dtype: torch.dtype = torch.float32, length: int = 1) -> tuple[Tensor, ...]:
    torch.manual_seed(3)
    cos, sin = torch.randn(2, 1, 1, length, SIZE).to(dtype).unbind()
    pasts = (torch.randn(5, 2, 2, SIZE).to(dtype).permute(1, 2, 0, 3) for _ in range(2))
    weights = (torch.randn(n, k).to(dtype) / k**0.5 for n, k in ((32, 16), (16, 16), (16, 16), (16, 32)))
    return torch.randn(2, length, 16).to(dtype), *pasts, cos, sin, *weights


def formed(function: Callable[..., Any], *inputs: Tensor) -> tuple[fx.GraphModule, list[str]]:
    """The graph of a function with heads as rows, and the steps of its chains; checks that it answers as before."""
    graph_module = make_fx(function, tracing_mode="fake")(*inputs)
    want = graph_module(*inputs)
    choose(graph_module, lowerings())
    heads.write_as_rows(graph_module)
    chain.form(graph_module)
    graph_module.graph.lint()
    graph_module.recompile()
    for mine, theirs in zip(tree_leaves(graph_module(*inputs)), tree_leaves(want), strict=True):
        assert error_in_units(mine, theirs) <= 8
        assert not shapes.difference(theirs, mine)
    return graph_module, texts(graph_module)


@pytest.mark.parametrize("length", (1, 3))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_a_block_is_one_chain(dtype: torch.dtype, length: int) -> None:
    _, (steps,) = formed(block, *block_inputs(dtype, length))
    assert steps == (
        "linear plain v0 w0 - w1 - w2 -; rope v1 w3 w4 8.0 0.0; rope v2 w3 w4 8.0 0.0;"
        " attend v4 v5 v3 r0 r1 - 0.3 0.0 0.0 0.0; linear plain v6 w5 -; add v7 v0; out v8"
    )


def test_interleaved_pairs_softcap_and_window() -> None:
    def function(*inputs: Tensor) -> Any:
        return block(*inputs, turned=lambda x, cos, sin: ops.rope(x, cos, sin, True), softcap=5.0, window=4)

    _, (steps,) = formed(function, *block_inputs())
    assert "rope v2 w3 w4 8.0 1.0; attend v4 v5 v3 r0 r1 - 0.3 5.0 4.0 0.0;" in steps


def test_heads_that_are_normalised() -> None:
    def function(scale: Tensor, *inputs: Tensor) -> Any:
        def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
            return ops.rope(ops.rms_norm(x.transpose(1, 2), scale, 1e-6).transpose(1, 2), cos, sin)

        return block(*inputs, turned=turned)

    _, (steps,) = formed(function, torch.rand(SIZE), *block_inputs())
    assert "rms_norm v1 w3 1e-06 0.0 1.0 8.0; rope v4 w4 w5 8.0 0.0; rms_norm v2 w3 1e-06 0.0 1.0 8.0;" in steps


@pytest.mark.parametrize("has_scale", (True, False))
def test_rows_that_are_normalised_before_they_are_heads(has_scale: bool) -> None:
    def function(scale: Tensor, x: Tensor, past_keys: Tensor, past_values: Tensor, *others: Tensor) -> Any:
        weights = others[2:]
        q, k, v = ops.parallel_linear(x, list(weights[:3]), [None] * 3)
        key_room, keys = appended(past_keys, shown(ops.rms_norm(k, scale if has_scale else None, 1e-6)))
        value_room, values = appended(past_values, shown(v))
        y = ops.attention(shown(q), keys, values, None, scale=0.3)
        out = ops.linear(y.transpose(1, 2).flatten(2), weights[3])
        key_room.copy_(keys), value_room.copy_(values)
        return out, keys, values

    _, (steps,) = formed(function, torch.rand(16), *block_inputs())
    assert f"rms_norm v2 {'w3' if has_scale else '-'} 1e-06 0.0 1.0 16.0; attend v1 v4 v3" in steps


def test_without_positions() -> None:
    _, (steps,) = formed(lambda *inputs: block(*inputs, turned=lambda x, cos, sin: x), *block_inputs())
    assert "linear plain v0 w0 - w1 - w2 -; attend v1 v2 v3 r0 r1 - 0.3" in steps


def one_angle(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return ops.rope(x, cos[..., :1].expand(1, 1, 1, SIZE), sin)


def angles_of_each_head(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return ops.rope(x, cos.repeat(1, x.shape[1], 1, 1), sin)


@pytest.mark.parametrize(
    "how",
    [
        pytest.param({"extra": lambda values: values["keys"] * 2}, id="the cache has another reader"),
        pytest.param({"extra": lambda values: values["room"] * 2}, id="its room has another reader"),
        pytest.param({"extra": lambda values: values["y"] * 2}, id="attention has another reader"),
        pytest.param({"is_causal": True}, id="the first keys only"),
        pytest.param({"turned": lambda x, cos, sin: x * cos}, id="something else is done to heads"),
        pytest.param({"turned": one_angle}, id="one angle for all"),
        pytest.param({"turned": angles_of_each_head}, id="angles of each head"),
    ],
)
def test_left_alone(how: Any) -> None:
    assert not any("attend" in steps for steps in formed(lambda *given: block(*given, **how), *block_inputs())[1])


@pytest.mark.parametrize(
    "inputs",
    [
        pytest.param(block_inputs(torch.float64), id="float64"),
        pytest.param(block_inputs(length=9), id="more than sixteen rows"),
    ],
)
def test_other_rows_are_left_alone(inputs: tuple[Tensor, ...]) -> None:
    assert not any("attend" in steps for steps in formed(block, *inputs)[1])


def test_rows_in_the_middle_of_a_room_are_left_alone() -> None:
    def function(x: Tensor, room: Tensor, *weights: Tensor) -> Any:
        q, k, v = ops.parallel_linear(x, list(weights[:3]), [None] * 3)
        keys, values = (ops.kv_reserve(room, 2, 2) for _ in range(2))
        seen = [aten.slice_scatter.default(cache, shown(new), 2, 5, 6) for cache, new in ((keys, k), (values, v))]
        y = ops.attention(shown(q), *seen, None, scale=0.3)
        return ops.linear(y.transpose(1, 2).flatten(2), weights[3])

    x, past, _, _, _, *weights = block_inputs()
    graph_module = make_fx(function, tracing_mode="fake")(x, past, *weights)
    choose(graph_module, lowerings())
    heads.write_as_rows(graph_module)
    chain.form(graph_module)
    assert not any("attend" in steps for steps in texts(graph_module))
