"""Blocks of KV caches that many caches hold together: a pool that counts who holds each block.

A block is BLOCK rows of one sequence: [heads, BLOCK, size]. Once written it never changes, so that whoever holds its
number may read it at any time; rows that do not fill a block are not here but in the tail of their cache
(`kv_paged.py`). A block is free again when the last table that names it has died.
"""

from __future__ import annotations

import collections
import threading

import torch
from torch import Tensor

# Rows of a block: few, so that caches share all but the last few rows; vLLM's default.
BLOCK = 16
# Blocks come one by one and the pool moves when it is full: an eighth more than needed.
_GROWTH = 9 / 8
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class Pool:
    """The blocks of one layer's keys or values: `memory` [capacity, heads, BLOCK, size]. Thread-safe."""

    def __init__(self, heads: int, size: int, dtype: torch.dtype, device: torch.device) -> None:
        with torch.inference_mode(False):
            self.memory = torch.empty(0, heads, BLOCK, size, dtype=dtype, device=device)
            self._holders = torch.zeros(0, dtype=torch.int64)
        self._free: list[int] = []
        self._left: collections.deque[Tensor] = collections.deque()
        self._lock = threading.RLock()

    @property
    def blocks_held(self) -> int:
        """How many blocks some table names."""
        with self._lock:
            self._reclaim()
            return int((self._holders > 0).sum())

    def extended(self, table: Tensor | None, rows: Tensor) -> Tensor:
        """The table [B, P + n] of a cache whose table is [B, P] (None: P = 0) and grows by rows [B, H, n * BLOCK, D].

        Blocks of neighbouring sequences that are equal bit for bit are stored once: so the prompt of a batch that
        starts as copies of one sequence is held once.
        """
        blocks = rows.unflatten(2, (rows.shape[2] // BLOCK, BLOCK)).movedim(2, 0)  # [n, B, H, BLOCK, D]
        distinct = torch.ones(blocks.shape[:2], dtype=torch.bool, device=rows.device)
        bits = blocks.view(_BITS[rows.dtype.itemsize])
        distinct[:, 1:] = (bits[:, 1:] != bits[:, :-1]).flatten(2).any(-1)
        which = distinct.flatten().cumsum(0).view(distinct.shape) - 1
        with self._lock:
            taken = self._take(int(distinct.sum())).to(rows.device)
            self.memory[taken] = blocks[distinct]
            numbers = taken[which].t()
            return self.holding(numbers if table is None else torch.cat([table, numbers], 1))

    def holding(self, numbers: Tensor) -> Tensor:
        """A table [B, P] of these numbers, which holds their blocks as long as it lives."""
        with torch.inference_mode(False), self._lock:
            table = torch.empty(numbers.shape, dtype=torch.int64, device=numbers.device).copy_(numbers)
            holder = _Holder(self, table.detach())
            self._count(holder.numbers, 1)
        table._graphopt_blocks = holder  # type: ignore[attr-defined]
        return table

    def left(self, numbers: Tensor) -> None:
        """Note that a table has died. Called by the garbage collector, in any thread and at any time: takes no lock."""
        self._left.append(numbers)

    def _take(self, count: int) -> Tensor:
        """The numbers of so many blocks that nobody holds."""
        self._reclaim()
        if count > len(self._free):
            self._grow(count - len(self._free))
        taken = torch.tensor(self._free[len(self._free) - count :], dtype=torch.int64)
        del self._free[len(self._free) - count :]
        return taken

    def _grow(self, count: int) -> None:
        before = self.memory.shape[0]
        capacity = max(before + count, int((before + count) * _GROWTH))
        with torch.inference_mode(False):
            memory = self.memory.new_empty((capacity, *self.memory.shape[1:]))
            memory[:before] = self.memory
            holders = torch.zeros(capacity, dtype=torch.int64)
            holders[:before] = self._holders
        self.memory, self._holders = memory, holders
        self._free += range(capacity - 1, before - 1, -1)

    def _reclaim(self) -> None:
        while self._left:
            numbers = self._left.popleft()
            self._count(numbers, -1)
            named = numbers.unique().cpu()
            self._free += named[self._holders[named] == 0].tolist()

    def _count(self, numbers: Tensor, step: int) -> None:
        flat = numbers.flatten().cpu()
        self._holders.index_add_(0, flat, torch.full_like(flat, step))


class _Holder:
    """Holds the blocks of one table; does not refer to the table itself, so that both die at once."""

    def __init__(self, pool: Pool, numbers: Tensor) -> None:
        self.pool, self.numbers = pool, numbers

    def __del__(self) -> None:
        self.pool.left(self.numbers)


def pool_of(table: Tensor) -> Pool:
    """The pool that the numbers of a table mean."""
    holder: _Holder = table._graphopt_blocks  # type: ignore[attr-defined]
    return holder.pool
