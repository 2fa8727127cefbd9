"""Paged KV caches (PagedAttention, Kwon et al. 2023): their layout, the dialect operations on them, the tensor.

The rows of a cache [B, H, S, D] are kept in blocks of BLOCK rows (`kv_blocks.py`), which caches share, and a tail:

    first [H, BLOCK, D]    the first block of a pool; block i lies i * H * BLOCK * D elements behind it in memory
    table [B, S // BLOCK]    int64: which blocks a sequence is made of
    tail [B, H, TAIL + new, D]    the last S % BLOCK rows count, those before mean nothing

What happens along the batch (beam search, `batch_repeat_interleave`), deep copies and crops change tables, not blocks.
A crop into a block takes a copy of the rows before into the tail: blocks themselves are never written twice.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from graphopt import ops
from graphopt.ops import operation
from graphopt.runtime import epilogue, kv, prologue
from graphopt.runtime.kv_blocks import BLOCK, Pool, pool_of
from graphopt.runtime.kv_tensor import CacheTensor, tail_of

TAIL = BLOCK - 1
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def unsupported_reason(rows: Tensor) -> str:
    """Why rows [B, H, S, D] (real or fake) cannot be kept in blocks, or ""."""
    if rows.dim() != 4:
        return "the cache is not [batch, heads, length, size]"
    if rows.dtype not in _DTYPES:
        return f"the cache is of {str(rows.dtype).removeprefix('torch.')}"
    if not all(isinstance(size, int) for size in (rows.shape[1], rows.shape[3])):
        return "the number of its heads or their size is not fixed"
    return ""


def _reserved_shape(past: Tensor, count: int) -> list[Tensor]:
    batch, heads, length, size = past.shape
    return [
        past.new_empty((heads, BLOCK, size)),
        past.new_empty((batch, length // BLOCK), dtype=torch.int64),
        past.new_empty((TAIL + count, batch, heads, size)).permute(1, 2, 0, 3),
    ]


@operation("(Tensor past, SymInt count) -> Tensor[]", _reserved_shape, repeatable=False, traceable=False)
def kv_paged_reserve(past: Tensor, count: int) -> list[Tensor]:
    """The first block, table and tail (see `runtime.kv_paged`) of a cache `past` [B, H, S, D].

    The tail has `count` more rows that hold nothing yet. At call time `past` may be a `PagedCache`: then no block is
    copied.
    """
    first, table, tail = _reserved_shape(past, count)
    batch, heads, length, size = past.shape
    sealed = length // BLOCK * BLOCK
    pool = past.new_zeros((max(1, table.numel()), heads, BLOCK, size))
    pool[: table.numel()] = past[:, :, :sealed].unflatten(2, (-1, BLOCK)).transpose(1, 2).flatten(0, 1)
    table = torch.arange(table.numel(), device=past.device).view(table.shape)
    tail.zero_().narrow(2, TAIL - (length - sealed), length - sealed).copy_(past[:, :, sealed:])
    return [pool[0], table, tail]


def whole(first: Tensor, table: Tensor, tail: Tensor, length: int) -> Tensor:
    """All `length` rows of a cache, from its first block, table and tail."""
    count = int(table.max()) + 1 if table.numel() else 1
    pool = first.as_strided((count, *first.shape), (first.numel(), *first.stride()))
    rows = pool[table].transpose(1, 2).flatten(2, 3)
    return torch.cat([rows, tail[:, :, tail.shape[2] - (length - rows.shape[2]) :]], 2)


def _whole_shape(first: Tensor, table: Tensor, tail: Tensor, length: int) -> Tensor:
    return tail.new_empty((tail.shape[0], tail.shape[1], length, tail.shape[3]))


@operation("(Tensor first, Tensor table, Tensor tail, SymInt length) -> Tensor", _whole_shape, traceable=False)
def kv_paged_cache(first: Tensor, table: Tensor, tail: Tensor, length: int) -> Tensor:
    """Blocks and tail as the cache [B, H, length, D] that a graph returns; at call time a `PagedCache`."""
    return whole(first, table, tail, length)


@operation("(Tensor rows) -> Tensor")
def kv_page(rows: Tensor) -> Tensor:
    """A new cache [B, H, S, D]; at call time a `PagedCache` of the same rows."""
    return rows.clone(memory_format=torch.contiguous_format)


@ops.attention_over(("first", "table", "tail"), traceable=False)
def attention_paged(first: Tensor, table: Tensor, tail: Tensor, length: int, *, keys: bool) -> Tensor:
    """`graphopt.attention` of q [B, H, S, D] over `length` keys and values that lie in blocks and tails."""
    return whole(first, table, tail, length)


OPERATIONS = ops.CacheOperations(kv_paged_reserve, kv_paged_cache, kv_page, attention_paged, TAIL)


@dataclasses.dataclass(frozen=True)
class Pages:
    """Keys or values of one layer: a table of blocks [B, length // BLOCK], and a tail [B, H, TAIL or more, D]."""

    table: Tensor
    tail: Tensor
    length: int

    @property
    def pool(self) -> Pool:
        return pool_of(self.table)

    @property
    def recent(self) -> Tensor:
        """The rows behind the blocks [B, H, length % BLOCK, D]; before `sealed`, as many as are not in blocks."""
        count = self.length - self.table.shape[1] * BLOCK
        return self.tail.narrow(2, self.tail.shape[2] - count, count)

    def read(self) -> Tensor:
        """All rows [B, H, length, D], a plain tensor."""
        return whole(self.first(), self.table, self.tail, self.length)

    def first(self) -> Tensor:
        """The first block of the pool; of an empty one, a block of nothing."""
        memory = self.pool.memory
        return memory[0] if memory.shape[0] else memory.new_empty(memory.shape[1:])

    def memory(self) -> tuple[Tensor, ...]:
        """The pool, with all that other caches have in it, the table and the tail."""
        return self.pool.memory, self.table, self.tail

    def each(self, function: Callable[[Tensor], Tensor]) -> Pages:
        """The cache whose sequences are picked by `function`, which works along the first dimension."""
        return Pages(self.pool.holding(function(self.table)), function(self.tail), self.length)

    def cropped(self, length: int) -> Pages:
        """The first `length` rows. Rows of a block that is cut through are copied into the tail."""
        kept = min(length // BLOCK, self.table.shape[1])
        if kept == self.table.shape[1]:
            return Pages(self.table, _tail_of(self.recent[:, :, : length - kept * BLOCK]), length)
        cut = self.pool.memory[self.table[:, kept]]  # [B, H, BLOCK, D]
        table = self.pool.holding(self.table[:, :kept])
        return Pages(table, _tail_of(cut[:, :, : length - kept * BLOCK]), length)

    def sealed(self) -> Pages:
        """The same rows with all whole blocks of the tail moved into the pool."""
        recent = self.recent
        count = recent.shape[2] // BLOCK * BLOCK
        if not count:
            return self
        table = self.pool.extended(self.table, recent[:, :, :count])
        return Pages(table, _tail_of(recent[:, :, count:]), self.length)


def _tail_of(rows: Tensor) -> Tensor:
    return tail_of(rows, TAIL, BLOCK)


def pages_of(rows: Tensor) -> Pages:
    """Rows [B, H, S, D] in blocks of a pool of their own."""
    count = rows.shape[2] // BLOCK * BLOCK
    pool = Pool(rows.shape[1], rows.shape[3], rows.dtype, rows.device)
    return Pages(pool.extended(None, rows[:, :, :count]), _tail_of(rows[:, :, count:]), rows.shape[2])


class PagedCache(CacheTensor):
    """A KV cache [B, H, S, D] of keys or of values in blocks that caches share; see `CacheTensor`."""

    part: Pages
    described = "a paged KV cache, whose blocks other caches may share (option 'kv_cache')"


@prologue.call_time(kv_paged_reserve)
def reserve(past: Tensor, count: int) -> list[Tensor]:
    """The parts of `past` (plain, or a `PagedCache`), the tail with `count` undefined rows."""
    held = past.part if isinstance(past, PagedCache) else None
    if held is None:
        held = pages_of(past.plain() if isinstance(past, CacheTensor) else past)
    room = kv.reserve(held.tail[:, :, -TAIL:], count, 2, max(2 * BLOCK, TAIL + count))
    return [held.first(), held.table, room]


@epilogue.after_call(kv_paged_cache)
def returned(first: Tensor, table: Tensor, tail: Tensor, length: int) -> Tensor:
    """The cache that a graph returns, once it has written the new rows into the tail."""
    return PagedCache.of(Pages(table, tail, length).sealed())


@epilogue.after_call(kv_page)
def paged(rows: Tensor) -> Tensor:
    """The cache that a first graph returns."""
    return PagedCache.of(pages_of(rows))
