"""The dialect `torch.ops.graphopt.*`: the few operations that generic fusion cannot derive from ATen.

The body of each operation is its meaning in plain PyTorch. It serves as the documentation, the shape rule
(fake implementation), the fallback of every lowering, and the oracle of the tests.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from graphopt.errors import KVCapacityError

_library = torch.library.Library("graphopt", "DEF")
_meanings: dict[torch._ops.OpOverload, Callable[..., object]] = {}
_called_whole: set[torch._ops.OpOverload] = set()


def operation(
    schema: str, shape: Callable[..., object] | None = None, *, repeatable: bool = True, traceable: bool = True
) -> Callable[[Callable[..., object]], torch._ops.OpOverload]:
    """Register a function as dialect operation `schema`; its body is used on real and on fake tensors.

    shape: what to run on fake tensors where the body is long; it must give the same shapes, dtypes and strides.
    repeatable: whether two calls with equal arguments may be merged into one. traceable: False where the body looks at
    values: compilers then call the operation as a whole.
    """
    tags = [torch.Tag.pt2_compliant_tag] + [torch.Tag.nondeterministic_seeded] * (not repeatable)

    def register(meaning: Callable[..., object]) -> torch._ops.OpOverload:
        _library.define(meaning.__name__ + schema, tags=tags)
        _library.impl(meaning.__name__, meaning, "CompositeExplicitAutograd")
        torch.library.register_fake(f"graphopt::{meaning.__name__}", shape or meaning, lib=_library)
        overload: torch._ops.OpOverload = getattr(torch.ops.graphopt, meaning.__name__).default
        _meanings[overload] = meaning
        if not traceable:
            _called_whole.add(overload)
        return overload

    return register


def meaning(op: object) -> Callable[..., object] | None:
    """The plain PyTorch function that defines `op`, or None when `op` is not of the dialect."""
    return _meanings.get(op) if isinstance(op, torch._ops.OpOverload) else None


def is_traceable(op: object) -> bool:
    """Whether the meaning of `op` may be traced on fake values and stand in a graph instead of it."""
    return op not in _called_whole


def operations() -> tuple[torch._ops.OpOverload, ...]:
    """Every operation of the dialect."""
    return tuple(_meanings)


def _linear_shape(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@operation("(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor", _linear_shape)
def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., K] times weight [N, K] transposed, plus bias [N]: [..., N], in the dtype of x."""
    return F.linear(x, weight, bias)


def _parallel_shape(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> list[Tensor]:
    return [_linear_shape(x, weight) for weight in weights]


@operation("(Tensor x, Tensor[] weights, Tensor?[] biases) -> Tensor[]", _parallel_shape)
def parallel_linear(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> list[Tensor]:
    """Several linears of one input x [..., K]: one result [..., N_i] for each weight [N_i, K]."""
    return [F.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]


def _attention_shape(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, **how: object) -> Tensor:
    batch, heads, rows, _ = q.shape
    return q.new_empty((batch, rows, heads, v.shape[-1])).transpose(1, 2)


_ATTENTION_SETTINGS = "bool is_causal=False, float scale, float softcap=0., int window=0, bool nan_rows=False"


@operation(f"(Tensor q, Tensor k, Tensor v, Tensor? mask=None, *, {_ATTENTION_SETTINGS}) -> Tensor", _attention_shape)
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    is_causal: bool = False,
    scale: float,
    softcap: float = 0.0,
    window: int = 0,
    nan_rows: bool = False,
) -> Tensor:
    """Scaled dot product attention: softmax(softcap(q k^T scale) + mask) v.

    q [B, H, S, D], k [B, Hkv, T, D], v [B, Hkv, T, Dv] with H a multiple of Hkv (query head h reads KV head
    h // (H // Hkv)); mask broadcasts to [B, H, S, T] and is boolean (True takes part) or additive.
    is_causal: query i sees key j <= i (upper left alignment, as in F.scaled_dot_product_attention).
    softcap: scores become softcap * tanh(scores / softcap); 0 means none. window: query i sees key
    j > i - window; 0 means none. nan_rows: a row whose scores are all -inf gives NaN, as a plain softmax does, instead
    of 0. Returns [B, H, S, Dv], laid out in memory as [B, S, H, Dv].
    """
    if softcap == 0.0 and window == 0 and not nan_rows:
        out = F.scaled_dot_product_attention(
            q, k, v, mask, is_causal=is_causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
    else:
        groups = q.shape[1] // k.shape[1]
        keys, values = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        scores = (q @ keys.transpose(-1, -2)) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        visible = _visible(q.shape[2], k.shape[2], is_causal, window, q.device)
        if visible is not None:
            scores = scores.masked_fill(~visible, float("-inf"))
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
        wide = scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores
        weights = torch.softmax(wide, -1) if nan_rows else torch.ops.aten._safe_softmax(wide, -1)
        out = weights.to(q.dtype) @ values
    return out.transpose(1, 2).contiguous().transpose(1, 2)


class CacheOperations(NamedTuple):
    """The operations of a form of KV caches other than plain tensors (`passes/kv_cache/forms.py` shows them at work).

    reserve: a cache as its parts, the last of which, the tail, has room for new rows. cache: parts as the cache that a
    graph returns. start: rows as such a cache. attention: see `attention_over`. tail: rows of a tail before new ones.
    """

    reserve: torch._ops.OpOverload
    cache: torch._ops.OpOverload
    start: torch._ops.OpOverload
    attention: torch._ops.OpOverload
    tail: int


def attention_over(
    parts: Sequence[str], more: str = "", *, traceable: bool = True
) -> Callable[[Callable[..., Tensor]], torch._ops.OpOverload]:
    """Register `attention` over keys and values that lie in parts: the decorated function reads their rows.

    parts: the names of the tensors that rows are made of, the last one with rows [..., D] of the cache's own size. The
    operation is NAME(q, k_PART ..., v_PART ..., mask, length, MORE, *, settings of `attention`); the function is called
    with the parts, the length and what `more` declares, once with keys=True and once with keys=False.
    """

    def register(rows_of: Callable[..., Tensor]) -> torch._ops.OpOverload:
        count = len(parts)

        @functools.wraps(rows_of)
        def attend(q: Tensor, *given: Any, **how: Any) -> Tensor:
            k_parts, v_parts, (mask, *rest) = given[:count], given[count : 2 * count], given[2 * count :]
            k, v = rows_of(*k_parts, *rest, keys=True), rows_of(*v_parts, *rest, keys=False)
            return cast(Tensor, _meanings[attention](q, k, v, mask, **how))

        def shape(q: Tensor, *given: Any, **how: Any) -> Tensor:
            return _attention_shape(q, given[count - 1], given[2 * count - 1])

        tensors = ", ".join(f"Tensor {side}_{part}" for side in "kv" for part in parts)
        return operation(
            f"(Tensor q, {tensors}, Tensor? mask, SymInt length{more}, *, {_ATTENTION_SETTINGS}) -> Tensor",
            shape,
            traceable=traceable,
        )(attend)

    return register


def _visible(rows: int, columns: int, is_causal: bool, window: int, device: torch.device) -> Tensor | None:
    if not is_causal and not window:
        return None
    i = torch.arange(rows, device=device)[:, None]
    j = torch.arange(columns, device=device)[None, :]
    visible = j <= i if is_causal else torch.ones((), dtype=torch.bool, device=device)
    return visible & (j > i - window) if window else visible


@operation("(Tensor x, Tensor cos, Tensor sin, bool interleaved=False) -> Tensor")
def rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Rotary position embedding (Su et al., 2021) of x [..., S, D] by cos and sin that broadcast to it.

    x * cos + rotate(x) * sin, where rotate maps halves (a, b) to (-b, a), or, interleaved, each pair.
    """
    if interleaved:
        rotated = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    else:
        half = x.shape[-1] // 2
        rotated = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return x * cos + rotated * sin


@operation("(Tensor x, Tensor? weight, float eps, float weight_offset=0., bool cast_first=True) -> Tensor")
def rms_norm(
    x: Tensor, weight: Tensor | None, eps: float, weight_offset: float = 0.0, cast_first: bool = True
) -> Tensor:
    """Root mean square normalisation (Zhang and Sennrich, 2019) of the last dimension, in float32.

    x [..., D], weight [D]. cast_first (Llama): round to the dtype of x, then multiply by the weight;
    otherwise (Gemma, weight_offset=1): multiply by weight_offset + weight in float32, then round.
    """
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if weight is None:
        return normed.to(x.dtype)
    if cast_first:
        scale = weight if weight_offset == 0.0 else weight + weight_offset
        return scale * normed.to(x.dtype)
    return (normed * (weight.float() + weight_offset)).to(x.dtype)


def _reserved(past: Tensor, count: int, dim: int, capacity: int | None = None) -> Tensor:
    size = list(past.shape)
    size[dim] += count
    return _room(size, dim, past.dtype, past.device)


def _room(size: Sequence[int], dim: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    rows, *rest = size[dim], *size[:dim], *size[dim + 1 :]
    return torch.zeros(rows, *rest, dtype=dtype, device=device).movedim(0, dim)


@operation("(Tensor past, SymInt count, int dim, int? capacity=None) -> Tensor", _reserved, repeatable=False)
def kv_reserve(past: Tensor, count: int, dim: int, capacity: int | None = None) -> Tensor:
    """A growing KV cache `past` with room for `count` more rows along `dim`; the new rows hold nothing yet.

    past has any shape, say [B, H, S, D] with dim 2; the result [B, H, S + count, D] lies in memory as
    [S + count, B, H, D], so that its strides do not depend on its length. At call time (`runtime/kv.py`) the rows of
    `past` are copied only if the room behind them is not free. Raises KVCapacityError for more than `capacity` rows.
    """
    check_capacity(past.shape[dim] + count, capacity)
    room = _reserved(past, count, dim)
    room.narrow(dim, 0, past.shape[dim]).copy_(past)
    return room


def check_capacity(length: int, capacity: int | None) -> None:
    """Raise KVCapacityError if a cache of `length` rows is longer than the fixed `capacity` (None: no limit)."""
    if capacity is not None and length > capacity:
        raise KVCapacityError(
            f"a KV cache of {length} rows does not fit into the fixed capacity of {capacity} (option 'kv_capacity'):"
            " crop the cache, or compile with a larger kv_capacity or without one"
        )


@operation("(Tensor(a) room, int dim, SymInt? start, SymInt? end) -> Tensor(a)")
def kv_window(room: Tensor, dim: int, start: int | None, end: int | None) -> Tensor:
    """The rows [start:end] along `dim` of what `kv_reserve` gave, as a view: what a sliding-window layer keeps."""
    view: Tensor = torch.ops.aten.slice.Tensor(room, dim, start, end)
    return view


def _written(room: Tensor, rows: Tensor, dim: int, start: int, end: int) -> Tensor:
    return room


@operation(
    "(Tensor(a!) room, Tensor rows, int dim, SymInt start, SymInt end) -> Tensor(a!)", _written, traceable=False
)
def kv_write(room: Tensor, rows: Tensor, dim: int, start: int, end: int) -> Tensor:
    """`room` with `rows` written to [start, end) along `dim`, in place.

    The version counter does not move, as with all that compiled graphs write: it is left to tell of writes by others.
    """
    room.data.narrow(dim, start, end - start).copy_(rows)
    return room


def _written_at(cache: Tensor, rows: Tensor, dim: int, places: Tensor) -> Tensor:
    return cache


@operation("(Tensor(a!) cache, Tensor rows, int dim, Tensor places) -> Tensor(a!)", _written_at, traceable=False)
def kv_write_at(cache: Tensor, rows: Tensor, dim: int, places: Tensor) -> Tensor:
    """`cache` with `rows` written along `dim` to the `places`, integers [S] on its device, in place; see `kv_write`.

    As for `index_copy`: of several rows for one place any may stay.
    """
    cache.data.index_copy_(dim, places, rows)
    return cache


WRITES = frozenset({kv_write, kv_write_at})
"""What writes rows, its second argument, into the cache that is its first, and answers the cache."""


def _allocated(
    size: Sequence[int], dim: int, *, dtype: torch.dtype, device: torch.device, capacity: int | None = None
) -> Tensor:
    return _room(size, dim, dtype, device)


@operation(
    "(SymInt[] size, int dim, *, ScalarType dtype, Device device, int? capacity=None) -> Tensor",
    _allocated,
    repeatable=False,
)
def kv_allocate(
    size: Sequence[int], dim: int, *, dtype: torch.dtype, device: torch.device, capacity: int | None = None
) -> Tensor:
    """A new KV cache of the given size that can grow along `dim`, with nothing in it yet; see `kv_reserve`."""
    check_capacity(size[dim], capacity)
    return _room(size, dim, dtype, device)
