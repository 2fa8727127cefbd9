"""Quantised KV caches at call time: a tensor that reads as the cache and holds its codes.

A compiled graph returns `QuantizedCache` tensors. A graph that gets one back takes the parts out (`reserve`), writes
new rows into the tail, and attention reads the parts themselves. All memory is that of `kv.py`, so that forks of one
cache share codes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from torch import Tensor

from graphopt.quantization import cache_operations as layout
from graphopt.runtime import epilogue, kv, prologue
from graphopt.runtime.kv_tensor import CacheTensor, tail_of

# Packed rows come a group at a time and stay: a thirty-second more room than needed, so that memory stays small.
_GROWTH = 33 / 32


@dataclasses.dataclass(frozen=True)
class Part:
    """Keys or values of one layer, as `cache_operations` lays them out. tail: [B, H, TAIL or more, D]."""

    codes: Tensor
    params: Tensor
    tail: Tensor
    length: int
    kind: str
    keys: bool

    @property
    def recent(self) -> Tensor:
        """The rows in full precision [B, H, length - packed, D]."""
        count = self.length - self.codes.shape[2]
        return self.tail.narrow(2, self.tail.shape[2] - count, count)

    def read(self) -> Tensor:
        """All rows [B, H, length, D]."""
        return layout.whole(self.codes, self.params, self.tail, self.length, self.kind, self.keys)

    def memory(self) -> tuple[Tensor, ...]:
        """The tensors that the part lies in."""
        return self.codes, self.params, self.tail

    def each(self, function: Callable[[Tensor], Tensor]) -> Part:
        """The part whose three tensors are `function` of this one's: for what happens along batch or heads."""
        return dataclasses.replace(
            self, codes=function(self.codes), params=function(self.params), tail=function(self.tail)
        )

    def packed(self) -> Part:
        """The same rows with as many of them packed as their number asks for."""
        more = layout.packed_rows(self.length) - self.codes.shape[2]
        if more <= 0:
            return self
        recent = self.recent
        codes, params = layout.quantize_rows(recent[:, :, :more], self.kind, self.keys)
        kept = recent[:, :, more:]
        return dataclasses.replace(
            self, codes=_extended(self.codes, codes), params=_extended(self.params, params), tail=_tail_of(kept)
        )

    def cropped(self, length: int) -> Part:
        """The first `length` rows. Rows of a group that is cut through were quantised and stay as they read now."""
        still = min(layout.packed_rows(length), self.codes.shape[2])
        if still == self.codes.shape[2]:
            tail = _tail_of(self.recent[:, :, : length - still])
        else:
            tail = _tail_of(self.read()[:, :, still:length])
        params = self.params[:, :, : still // layout.GROUP if self.keys else still]
        return dataclasses.replace(self, codes=self.codes[:, :, :still], params=params, tail=tail, length=length)


def _extended(past: Tensor, rows: Tensor) -> Tensor:
    """`past` with `rows` behind it along dimension 2, in place where nobody else has taken the room."""
    length, count = past.shape[2], rows.shape[2]
    grown: Tensor = kv.reserve(past, count, 2, int((length + count) * _GROWTH) + 1)
    # Through `data`, as a compiled graph writes: the version counter is left to tell of writes by others.
    grown.data.narrow(2, length, count).copy_(rows)
    return grown


def _tail_of(rows: Tensor) -> Tensor:
    """Memory for a tail that ends with `rows`, all TAIL of it in sight, with room for a few more."""
    return tail_of(rows, layout.TAIL, layout.RECENT)


def part_of(rows: Tensor, kind: str, keys: bool) -> Part:
    """Rows [B, H, S, D] as a part."""
    packed = layout.packed_rows(rows.shape[2])
    codes, params = layout.quantize_rows(rows[:, :, :packed], kind, keys)
    codes, params = (_extended(given[:, :, :0], given) for given in (codes, params))
    return Part(codes, params, _tail_of(rows[:, :, packed:]), rows.shape[2], kind, keys)


class QuantizedCache(CacheTensor):
    """A KV cache [B, H, S, D] of keys or of values whose rows are quantised; see `CacheTensor`."""

    part: Part
    described = "a quantised KV cache, whose rows are codes (option 'kv_dtype')"


@prologue.call_time(layout.kv_quantized_reserve)
def reserve(past: Tensor, count: int, kind: str, keys: bool) -> list[Tensor]:
    """The parts of `past` (plain, or a `QuantizedCache` of this kind), the tail with `count` undefined rows."""
    held = past.part if isinstance(past, QuantizedCache) else None
    if held is None or (held.kind, held.keys) != (kind, keys):
        held = part_of(past.plain() if isinstance(past, CacheTensor) else past, kind, keys)
    room = kv.reserve(held.tail[:, :, -layout.TAIL :], count, 2, max(2 * layout.TAIL, layout.TAIL + count))
    return [held.codes, held.params, room]


@epilogue.after_call(layout.kv_quantized_cache)
def returned(codes: Tensor, params: Tensor, tail: Tensor, length: int, kind: str, keys: bool) -> Tensor:
    """The cache that a graph returns, once it has written the new rows into the tail."""
    return QuantizedCache.of(Part(codes, params, tail, length, kind, keys).packed())


@epilogue.after_call(layout.kv_quantize)
def quantized(rows: Tensor, kind: str, keys: bool) -> Tensor:
    """The cache that a first graph returns."""
    return QuantizedCache.of(part_of(rows, kind, keys))
