"""Compiled attention against its meaning in float64: instruction sets, masks, grouped heads, strided caches."""

from __future__ import annotations

import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from graphopt.backends.cpp import attention as lowering

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
MASKS = ("none", "bool", "bool by head", "bool of queries", "additive", "additive float32")
pytestmark = pytest.mark.usefixtures("cpp_library")
kernels = torch.ops.graphopt_cpp


def meaning(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float, softcap: float, window: int
) -> Tensor:
    q, k, v = q.double(), k.double(), v.double()
    groups = q.shape[1] // k.shape[1]
    scores = q @ k.repeat_interleave(groups, 1).transpose(-1, -2) * scale
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask.double()
    i, j = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])[None]
    scores = scores.masked_fill(j > i, -math.inf) if causal else scores
    scores = scores.masked_fill(j <= i - window, -math.inf) if window else scores
    hidden = (scores == -math.inf).all(-1, keepdim=True)
    weights = torch.where(hidden, 0.0, torch.softmax(scores, -1)) if k.shape[2] else scores
    return weights @ v.repeat_interleave(groups, 1)


def check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    softcap: float = 0.0,
    window: int = 0,
) -> Tensor:
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out = kernels.attention(q, k, v, mask, causal, scale, softcap, window)
    expected = meaning(q, k, v, mask, causal, scale, softcap, window)
    assert out.dtype == q.dtype and out.shape == expected.shape
    assert out.transpose(1, 2).is_contiguous(), "laid out as [B, S, H, Dv]"
    tolerance = TOLERANCE[q.dtype]
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance, equal_nan=True)
    return out


def cache(rows: int, batch: int, heads: int, dim: int, dtype: torch.dtype) -> Tensor:
    """[B, H, T, D] seen in storage [capacity, B, H, D]."""
    return torch.randn(rows + 3, batch, heads, dim).to(dtype)[:rows].permute(1, 2, 0, 3)


def masked(kind: str, batch: int, heads: int, queries: int, keys: int, dtype: torch.dtype) -> Tensor | None:
    if kind == "bool":
        return torch.rand(batch, 1, queries, keys) < 0.7
    if kind == "bool by head":
        return torch.rand(heads, queries, keys) < 0.7
    if kind == "bool of queries":
        return torch.rand(queries, 1) < 0.7
    if kind == "additive":
        return torch.randn(1, 1, queries, keys).to(dtype)
    if kind == "additive float32":
        mask = torch.randn(batch, heads, 1, keys)
        return mask.masked_fill(mask > 1, -math.inf)
    return None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", MASKS)
def test_masks_of_each_kind(isa: str, dtype: torch.dtype, kind: str) -> None:
    for queries, keys in ((1, 1), (1, 130), (3, 64), (16, 65), (17, 64), (50, 130)):
        q = torch.randn(2, queries, 6, 32).to(dtype).transpose(1, 2)
        k, v = cache(keys, 2, 3, 32, dtype), cache(keys, 2, 3, 32, dtype)
        check(q, k, v, masked(kind, 2, 6, queries, keys, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads"), ((1, 1), (9, 3), (8, 1), (5, 5), (14, 2), (64, 32)))
def test_grouped_heads(isa: str, threads: int, dtype: torch.dtype, heads: int, kv_heads: int) -> None:
    """Also heads that lie side by side and are served together, all of them or (64 of 32) some at a time."""
    for queries, keys in ((2, 300), (49, 70)):
        q = torch.randn(2, heads, queries, 64).to(dtype)
        check(q, torch.randn(2, kv_heads, keys, 64).to(dtype), torch.randn(2, kv_heads, keys, 64).to(dtype))
        check(q, cache(keys, 2, kv_heads, 64, dtype), cache(keys, 2, kv_heads, 64, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", (1, 3, 17, 31, 33, 64, 80, 96))
def test_odd_head_sizes(isa: str, dtype: torch.dtype, dim: int) -> None:
    k = cache(70, 1, 2, dim, dtype)
    for queries in (3, 20):
        q = torch.randn(1, 2, queries, dim).to(dtype)
        for dim_v in (dim, 40):
            check(q, k, cache(70, 1, 2, dim_v, dtype))


@pytest.mark.parametrize("queries", (1, 2, 5, 16, 17, 40, 48, 97))
def test_causal_window_and_softcap(isa: str, queries: int) -> None:
    q, k, v = torch.randn(2, 4, queries, 16), torch.randn(2, 2, 90, 16), torch.randn(2, 2, 90, 16)
    mask = torch.rand(2, 1, queries, 90) < 0.5
    for causal in (False, True):
        for window in (0, 1, 4, 100):
            for softcap in (0.0, 2.0):
                check(q, k, v, None, causal, 0.5, softcap, window)
                check(q, k, v, mask, causal, 0.5, softcap, window)
                check(q, k, v, mask.float(), causal, 0.5, softcap, window)


def test_keys_are_split_among_threads(isa: str, threads: int) -> None:
    for batch, kv_heads, keys in ((1, 1, 5000), (1, 3, 1000), (5, 1, 700), (3, 3, 130)):
        q = torch.randn(batch, kv_heads * 2, 1, 64)
        check(q, cache(keys, batch, kv_heads, 64, q.dtype), cache(keys, batch, kv_heads, 64, q.dtype))


@settings(max_examples=80, deadline=None)
@given(
    batch=st.integers(1, 3),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 5),
    queries=st.one_of(st.integers(1, 18), st.integers(17, 110)),
    keys=st.integers(1, 140),
    dim=st.integers(1, 70),
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from(MASKS),
    causal=st.booleans(),
)
def test_any_shape(
    batch: int,
    kv_heads: int,
    group: int,
    queries: int,
    keys: int,
    dim: int,
    dtype: torch.dtype,
    kind: str,
    causal: bool,
) -> None:
    q = torch.randn(batch, queries, kv_heads * group, dim).to(dtype).transpose(1, 2)
    k, v = cache(keys, batch, kv_heads, dim, dtype), cache(keys, batch, kv_heads, dim, dtype)
    check(q, k, v, masked(kind, batch, kv_heads * group, queries, keys, dtype), causal)


def test_more_heads_than_are_packed_at_a_time(isa: str, threads: int) -> None:
    q = torch.randn(2, 4, 20, 128)
    k, v = cache(18_000, 2, 2, 128, q.dtype), cache(18_000, 2, 2, 128, q.dtype)
    check(q, k, v)


@pytest.mark.parametrize("queries", (17, 100))
def test_blocks_that_a_mask_hides_are_not_read(isa: str, queries: int) -> None:
    """The rest of a cache of fixed size: what it holds, even NaN, reaches nothing that the mask keeps from it."""
    q, k, v = torch.randn(1, 2, queries, 16), torch.randn(1, 2, 300, 16), torch.randn(1, 2, 300, 16)
    mask = torch.ones(queries, 300, dtype=torch.bool)
    mask[:, 128:] = False
    expected = check(q, k[:, :, :128], v[:, :, :128])
    k[:, :, 192:], v[:, :, 192:] = math.nan, math.nan
    torch.testing.assert_close(kernels.attention(q, k, v, mask, False, 0.25, 0.0, 0), expected)


@pytest.mark.parametrize("queries", (3, 30))
@pytest.mark.parametrize("additive", (False, True))
def test_a_row_that_sees_no_key_is_zero_as_in_torch(isa: str, additive: bool, queries: int) -> None:
    q, k, v = torch.randn(1, 2, queries, 16), torch.randn(1, 2, 70, 16), torch.randn(1, 2, 70, 16)
    mask = torch.ones(1, 1, queries, 70, dtype=torch.bool)
    mask[..., 1, :] = False
    mask[..., 2, :64] = False
    given = torch.zeros(mask.shape).masked_fill(~mask, -math.inf) if additive else mask
    out = check(q, k, v, given)
    assert (out[:, :, 1] == 0).all()
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, given))


@pytest.mark.parametrize("queries", (3, 30))
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_as_in_torch(isa: str, dtype: torch.dtype, queries: int) -> None:
    if isa == "amx" and dtype == torch.bfloat16 and queries > 16:
        pytest.skip("torch's own attention serves here")
    q, k, v = (torch.randn(1, 2, n, 16).to(dtype) for n in (queries, 70, 70))
    for where, value in ((q, math.nan), (k, math.nan), (v, math.nan), (v, math.inf), (k, math.inf)):
        kept = where[0, 1, 2, 5].clone()
        where[0, 1, 2, 5] = value
        out = check(q, k, v)
        assert not out[0, 0].isnan().any()
        where[0, 1, 2, 5] = kept
    out = check(torch.full_like(q, math.nan), k, v)
    assert out.isnan().all()


def test_large_scores_do_not_overflow(isa: str) -> None:
    q, k, v = 200 * torch.randn(1, 1, 1, 64), 200 * torch.randn(1, 1, 200, 64), torch.randn(1, 1, 200, 64)
    check(q, k, v)
    check(q, k, v, softcap=30.0)


@pytest.mark.parametrize("shape", ((0, 2, 1, 8), (1, 2, 0, 8)))
def test_empty(shape: tuple[int, ...]) -> None:
    keys = torch.randn(shape[0], 2, 5, 8)
    assert kernels.attention(torch.randn(shape), keys, keys, None, False, 1.0, 0.0, 0).shape == shape


def test_without_keys_the_result_is_torchs() -> None:
    q, none = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 0, 8)
    out = kernels.attention(q, none, none, None, False, 1.0, 0.0, 0)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, none, none), equal_nan=True)


def test_other_dtypes_and_strides_are_left_to_torch() -> None:
    q, k, v = (torch.randn(1, 2, n, 8, dtype=torch.float64) for n in (3, 9, 9))
    expected = F.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(kernels.attention(q, k, v, None, False, 8**-0.5, 0.0, 0), expected)
    strided = torch.randn(1, 2, 8, 9).transpose(2, 3)
    check(torch.randn(1, 2, 3, 8), strided, strided)


def test_mismatched_heads_are_refused() -> None:
    q, k = torch.randn(1, 3, 1, 8), torch.randn(1, 2, 9, 8)
    with pytest.raises(RuntimeError, match="heads"):
        kernels.attention(q, k, k, None, False, 1.0, 0.0, 0)


@pytest.mark.parametrize("queries", (1, 20))
def test_fake_tensors_have_the_layout_of_real_ones(queries: int) -> None:
    def run() -> Tensor:
        q, k = torch.zeros(2, 4, queries, 8), torch.zeros(2, 2, 9, 8)
        return kernels.attention(q, k, k, None, False, 1.0, 0.0, 0)

    with FakeTensorMode():
        fake = run()
    real = run()
    assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"q": torch.ones(1, 2, 3, 4).double()}, "dtype float64 is none of"),
        ({"k": torch.ones(1, 2, 5, 4).half()}, "operands of several dtypes: float32, float16, float32"),
        ({"q": torch.ones(2, 3, 4)}, "q, k and v must have four dimensions"),
        ({"v": torch.ones(1, 2, 4, 5).mT}, "the rows of q, k or v are not contiguous"),
        ({"mask": torch.ones(3, 5, dtype=torch.int64)}, "a mask of dtype int64"),
        ({"mask": torch.ones(1, 1, 1, 3, 5)}, "a mask of more than four dimensions"),
        ({"v": torch.ones(1, 2, 5, 4, device="meta")}, "not on the CPU"),
    ],
)
def test_declined(change: dict[str, Tensor], reason: str) -> None:
    keys = torch.ones(1, 2, 5, 4)
    given = {"q": torch.ones(1, 2, 3, 4), "k": keys, "v": keys, "mask": torch.ones(3, 5)}
    assert lowering.unsupported_reason(**given) is None
    said = lowering.unsupported_reason(**(given | change))
    assert said is not None and re.match(reason, said)


@pytest.mark.parametrize("sizes", ((2, 2, 0, 8), (0, 2, 3, 8), (2, 2, 3, 0)))
def test_empty_attention_lies_as_its_meaning_does(sizes: tuple[int, ...]) -> None:
    """And is compiled: a lowering that gives other strides than what it stands for is refused."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.softmax(q @ k.transpose(-1, -2) * 0.3, -1) @ v

    x = torch.randn(sizes)
    with torch.no_grad():
        result = torch.compile(attend, backend="graphopt", options={"strict": True})(x, x, x)
    assert (result.shape, result.stride()) == (attend(x, x, x).shape, attend(x, x, x).stride())
