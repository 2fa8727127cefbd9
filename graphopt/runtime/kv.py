"""Room for growing KV caches: appending to a cache costs the new rows, not a copy of the old ones.

`kv_reserve(past, count, dim)` returns a tensor whose first rows are those of `past`. If `past` is a view
of memory that was handed out here and nothing lies behind its last row, the result is a longer view of the
same memory; else the rows are copied once into new memory with room to spare. So slices of Go append, and
so forks, crops and reordered caches stay right: the first to append wins the room, all others copy.

The knowledge about a buffer hangs on the buffer itself (the `_base` of every view of it), so that it lives
and dies with the memory: no registry that could mistake a reused address. A cache written in place by
somebody else is told by the version counter that all views of a buffer share.

What a caller can notice: a cache shares the memory of the cache it grew from, so a write into one in place
shows in the other (a warning says so when the cache grows next); and `torch.save` stores the room as well
(clone first).
"""

from __future__ import annotations

import ctypes
import itertools
import threading
import warnings
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from graphopt import _compat, ops
from graphopt.runtime import prologue
from graphopt.runtime.counters import counters

_GROWTH = 1.5
_FLOOR = 32
_GOLDEN = 0.6180339887498949
_lock = threading.Lock()
_turns = itertools.count()
_compiled: list[Callable[[list[tuple[Any, ...]]], list[Tensor | None]]] = []


class Buffer(ctypes.Structure):
    """What is known of one buffer [capacity, *rest]: kept as an attribute of the buffer tensor.

    row: elements between two rows. used: rows handed out. version: the version counter after the last append. In memory
    it is what `backends/cpp/src/reserve.h` reads and writes.
    rest: the sizes of a cache without `dim`. strides: those of every cache that is a view of the buffer.
    """

    _fields_: ClassVar = [(name, ctypes.c_int64) for name in ("dim", "row", "capacity", "used", "version")]
    dim: int
    row: int
    capacity: int
    used: int
    version: int

    def __init__(self, base: Tensor, dim: int, used: int) -> None:
        row, *strides = base.stride()
        super().__init__(dim, row, base.shape[0], used, base._version)
        self.rest = tuple(base.shape[1:])
        self.strides = (*strides[:dim], row, *strides[dim:])


def reserve_many(calls: list[tuple[Any, ...]]) -> list[Tensor]:
    """`reserve` with each of the given arguments; a model has two caches for each layer."""
    views: list[Tensor | None] = [None] * len(calls)
    if _compiled:
        with _lock:
            views = _compiled[0](calls)
    return [
        _reserve(*call) if view is None else _marked(view, call[2]) for view, call in zip(views, calls, strict=True)
    ]


def reserve_with(function: Callable[[list[tuple[Any, ...]]], list[Tensor | None]]) -> None:
    """Have the commonest case done by a compiled function from now on; where it gives None, it did nothing."""
    _compiled[:] = [function]


@prologue.call_time(ops.kv_reserve, together=reserve_many)
def reserve(past: Tensor, count: int, dim: int, capacity: int | None = None) -> Tensor:
    """A tensor that continues `past` by `count` undefined rows along `dim`: the same memory if that is safe.

    past [..., S, ...] of any strides; the result [..., S + count, ...] has the strides of `ops.kv_reserve`.
    The first S rows of the result must not be written. Thread-safe: of two callers with one `past`, one gets
    a copy. capacity: the rows that memory is taken for, where it should not grow; more raise KVCapacityError.
    """
    return reserve_many([(past, count, dim, capacity)])[0]


def _reserve(past: Tensor, count: int, dim: int, capacity: int | None = None) -> Tensor:
    length = past.shape[dim]
    ops.check_capacity(length + count, capacity)
    base = past._base
    buffer: Buffer | None = getattr(base, "_graphopt_kv", None)
    if buffer is None or base is None or not _is_view_of(past, base, buffer, dim, length):
        return _copy(past, count, dim, capacity or _roomy(length + count, _some_growth()))
    first = past.storage_offset() // buffer.row
    end = first + length
    with _lock:
        if end + count <= buffer.capacity and _is_free(buffer, past, end):
            buffer.used = end + count
            return _view(base, buffer, first, length + count)
    return _copy(past, count, dim, capacity or _roomy(length + count, _GROWTH))


@prologue.call_time(ops.kv_allocate)
def allocate(
    size: Sequence[int], dim: int, *, dtype: torch.dtype, device: torch.device, capacity: int | None = None
) -> Tensor:
    """A new cache of the given size with undefined rows and room to grow along `dim`; capacity as in `reserve`."""
    ops.check_capacity(size[dim], capacity)
    return _new(size, dim, capacity or _roomy(size[dim], _some_growth()), dtype, device)


@prologue.call_time(ops.kv_window)
def window(room: Tensor, dim: int, start: int | None, end: int | None) -> Tensor:
    """The rows [start:end] along `dim` of reserved room: a cache that can grow in place if it ends with it."""
    return _marked(torch.ops.aten.slice.Tensor(room, dim, start, end), dim)


def _some_growth() -> float:
    """A growth factor that differs from cache to cache.

    So the caches of a model grow in different steps: no token pays for all of them, and few are held twice at
    once.
    """
    turn = next(_turns) * _GOLDEN % 1.0
    return 1.0 + (_GROWTH - 1.0) * turn


def _is_view_of(past: Tensor, base: Tensor, buffer: Buffer, dim: int, length: int) -> bool:
    return (
        dim == buffer.dim
        and past.stride() == buffer.strides
        and past.shape == (*buffer.rest[:dim], length, *buffer.rest[dim:])
        and past.dtype == base.dtype
        and past.storage_offset() % buffer.row == 0
    )


def _is_free(buffer: Buffer, past: Tensor, end: int) -> bool:
    """Whether the rows from `end` on belong to nobody; called under the lock."""
    version = past._version
    if end == buffer.used and version == buffer.version:
        return True
    # The cache was cropped, or written in place. If `past` and its base alone hold the memory, no tensor can
    # show the rows behind it, nor have been changed by a write that was meant for another cache.
    if _compat.storage_holders(past) == 2:
        buffer.version = version
        return True
    if version != buffer.version:
        warnings.warn(
            "a KV cache was written in place while caches that grew from it, or that it grew from, are alive:"
            " they share memory and show the same change (clone a cache before you write into it)",
            stacklevel=2,
        )
    return False


def _view(base: Tensor, buffer: Buffer, first: int, length: int) -> Tensor:
    size = (*buffer.rest[: buffer.dim], length, *buffer.rest[buffer.dim :])
    return _marked(base.as_strided(size, buffer.strides, first * buffer.row), buffer.dim)


def _marked(view: Tensor, dim: int) -> Tensor:
    """A cache's length changes with every token: compile the second step for any length."""
    _compat.suggest_dynamic(view, dim)
    return view


def _roomy(length: int, growth: float) -> int:
    """Rows to take memory for: at most half as many again as are needed, beyond a small floor."""
    return max(int(length * growth), length + _FLOOR)


def _copy(past: Tensor, count: int, dim: int, capacity: int) -> Tensor:
    length = past.shape[dim]
    size = list(past.shape)
    size[dim] = length + count
    room = _new(size, dim, capacity, past.dtype, past.device)
    room.narrow(dim, 0, length).copy_(past)
    buffer: Buffer | None = getattr(room._base, "_graphopt_kv", None)
    if buffer is not None:
        buffer.version = room._version
    counters["kv_copies"] += 1
    counters["kv_bytes_copied"] += past.numel() * past.element_size()
    return room


def _new(size: Sequence[int], dim: int, capacity: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    rest = (*size[:dim], *size[dim + 1 :])
    # Also under inference_mode an ordinary tensor: only those have a version counter.
    with torch.inference_mode(False):
        base = torch.empty(capacity, *rest, dtype=dtype, device=device)
    buffer = Buffer(base, dim, used=size[dim])
    if 0 not in rest:
        base._graphopt_kv = buffer  # type: ignore[attr-defined]
    return _view(base, buffer, 0, size[dim])
