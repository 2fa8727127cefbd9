"""Quantised KV caches at call time: a tensor that reads as the cache and holds its codes.

A compiled graph returns a `QuantizedCache` where the model's own code would hold a tensor of all keys or values.
Whoever reads it (slices, prints, saves it) gets the numbers that attention sees. A graph that gets one back takes the
parts out (`reserve`), writes new rows into the tail, and attention reads the parts themselves.

Dynamo takes the class for a plain tensor of its shape: that is what `__torch_function__` arranges, so that the captured
graph is the same with and without quantisation. All memory is that of `kv.py`, so that forks of one cache share codes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from graphopt import _compat
from graphopt.quantization import cache_operations as layout
from graphopt.runtime import epilogue, kv, prologue

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

    def nbytes(self) -> int:
        """Bytes of memory that the part holds, room for growth included."""
        return sum(tensor.untyped_storage().nbytes() for tensor in (self.codes, self.params, self.tail))

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
    tail: Tensor = kv.allocate(
        (*rows.shape[:2], layout.TAIL, rows.shape[3]),
        2,
        dtype=rows.dtype,
        device=rows.device,
        capacity=layout.TAIL + layout.RECENT,
    )
    if rows.shape[2]:
        tail.data.narrow(2, layout.TAIL - rows.shape[2], rows.shape[2]).copy_(rows)
    return tail


def part_of(rows: Tensor, kind: str, keys: bool) -> Part:
    """Rows [B, H, S, D] as a part."""
    packed = layout.packed_rows(rows.shape[2])
    codes, params = layout.quantize_rows(rows[:, :, :packed], kind, keys)
    codes, params = (_extended(given[:, :, :0], given) for given in (codes, params))
    return Part(codes, params, _tail_of(rows[:, :, packed:]), rows.shape[2], kind, keys)


class QuantizedCache(Tensor):
    """A KV cache [B, H, S, D] of keys or of values whose rows are quantised; it reads as a plain tensor.

    Cropping, copying, and reordering, selecting and repeating along the batch keep it quantised; any other operation
    sees `dequantize()`, a plain tensor, and that is what torch.save stores. `nbytes` is the memory that it holds.
    """

    part: Part

    @staticmethod
    def of(part: Part) -> QuantizedCache:
        """The tensor of a part."""
        batch, heads, _, size = part.tail.shape
        # Code that reads the memory behind torch's back gets NaN, not wrong numbers.
        nothing = torch.full((), float("nan"), dtype=part.tail.dtype, device=part.tail.device)
        shape = (batch, heads, part.length, size)
        made: QuantizedCache = Tensor._make_subclass(QuantizedCache, nothing.expand(shape))
        made.part = part
        _compat.suggest_dynamic(made, 2)
        return made

    def dequantize(self) -> Tensor:
        """A plain tensor [B, H, S, D] of the numbers that attention sees."""
        with torch._C.DisableTorchFunctionSubclass():
            return self.part.read()

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if torch.compiler.is_compiling() or func in _OF_THE_SHAPE:
                return func(*args, **(kwargs or {}))
            _refuse_writes(func, args, kwargs or {})
            kept = _still_quantized(func, args, kwargs or {})
            if kept is not None:
                return kept
            plain = pytree.tree_map_only(QuantizedCache, _read, (args, dict(kwargs or {})))
            return func(*plain[0], **plain[1])

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantizedCache:
        copied = QuantizedCache.of(self.part.each(torch.clone))
        memo[id(self)] = copied
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.dequantize().__reduce_ex__(protocol)

    @property
    def nbytes(self) -> int:  # type: ignore[override]
        """Bytes of memory that the cache holds, room for growth included."""
        return self.part.nbytes()


def _read(cache: QuantizedCache) -> Tensor:
    return cache.part.read()


def _readers_of(*attributes: str) -> frozenset[Any]:
    return frozenset(getattr(Tensor, name).__get__ for name in attributes)


_OF_THE_SHAPE = _readers_of("shape", "dtype", "device", "layout", "ndim", "requires_grad", "grad_fn", "is_leaf") | {
    Tensor.size,
    Tensor.dim,
    Tensor.numel,
    Tensor.is_floating_point,
    Tensor.element_size,
    Tensor.__len__,
}
_THE_SAME = _readers_of("data") | {Tensor.contiguous, Tensor.detach}
_ALONG_THE_BATCH = (Tensor.index_select, torch.index_select, Tensor.repeat_interleave, torch.repeat_interleave)


def _still_quantized(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """What the operations of transformers' caches give on a quantised one, or None for all others."""
    if not args or not isinstance(args[0], QuantizedCache):
        return None
    part = args[0].part
    if func in _ALONG_THE_BATCH and _dimension(func, args, kwargs) == 0:
        return QuantizedCache.of(part.each(lambda tensor: func(tensor, *args[1:], **kwargs)))
    if func is Tensor.__getitem__:
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        if len(index) == 2 and isinstance(index[0], Tensor) and index[1] is Ellipsis and index[0].dim() == 1:
            return QuantizedCache.of(part.each(lambda tensor: tensor[index]))
        length = _crop(index, part.length)
        return None if length is None else QuantizedCache.of(part.cropped(length))
    if func in (Tensor.clone, torch.clone):
        return QuantizedCache.of(part.each(torch.clone))
    return args[0] if func in _THE_SAME else None


def _refuse_writes(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    name = getattr(func, "__name__", "")
    in_place = name in ("__setitem__", "__set__") or (name.endswith("_") and not name.endswith("__"))
    if isinstance(kwargs.get("out"), QuantizedCache) or (in_place and args and isinstance(args[0], QuantizedCache)):
        raise TypeError(
            f"{name} would write into a quantised KV cache, whose rows are codes (option 'kv_dtype'): write into"
            " dequantize(), a plain tensor, and give that to the model instead"
        )


def _dimension(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    position = 1 if func in (Tensor.index_select, torch.index_select) else 2
    return args[position] if len(args) > position else kwargs.get("dim")


def _crop(index: tuple[Any, ...], length: int) -> int | None:
    """How many rows `[..., :n, :]` or `[:, :, :n]` keeps; None for other indices."""
    everything = slice(None)
    if index[:1] == (Ellipsis,) and len(index) == 3 and index[2] == everything:
        rows = index[1]
    elif index[:2] == (everything, everything) and len(index) in (3, 4) and index[3:] in ((), (everything,)):
        rows = index[2]
    else:
        return None
    if not isinstance(rows, slice) or rows.start not in (None, 0) or rows.step not in (None, 1):
        return None
    return int(rows.indices(length)[1])


@prologue.call_time(layout.kv_quantized_reserve)
def reserve(past: Tensor, count: int, kind: str, keys: bool) -> list[Tensor]:
    """The parts of `past` (plain, or a `QuantizedCache` of this kind), the tail with `count` undefined rows."""
    held = past.part if isinstance(past, QuantizedCache) else None
    if held is None or (held.kind, held.keys) != (kind, keys):
        held = part_of(_read(past) if isinstance(past, QuantizedCache) else past, kind, keys)
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
