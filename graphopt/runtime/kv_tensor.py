"""KV caches that are kept in another form than a tensor, as tensors: what they have in common.

A compiled graph returns a `CacheTensor` where the model's own code would hold a tensor of all keys or values. Whoever
reads it (slices, prints, saves it) gets the numbers that attention sees.

Dynamo takes the class for a plain tensor of its shape: that is what `__torch_function__` arranges, so that the captured
graph is the same whatever form the caches have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, Self

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from graphopt import _compat
from graphopt.runtime import kv


class Part(Protocol):
    """The keys or the values of one layer in a form of their own. tail: the newest rows [B, H, T, D], as they are."""

    @property
    def tail(self) -> Tensor: ...

    @property
    def length(self) -> int: ...

    def read(self) -> Tensor:
        """All rows [B, H, length, D], a plain tensor."""
        ...

    def memory(self) -> tuple[Tensor, ...]:
        """The tensors that the part lies in, room for growth included."""
        ...

    def each(self, function: Callable[[Tensor], Tensor]) -> Self:
        """The part whose tensors are `function` of this one's: for what happens along the batch."""
        ...

    def cropped(self, length: int) -> Self:
        """The first `length` rows."""
        ...


def tail_of(rows: Tensor, shown: int, room: int) -> Tensor:
    """Memory for a tail that ends with `rows` [B, H, n, D]: `shown` rows in sight, and `room` for a few more."""
    tail: Tensor = kv.allocate(
        (*rows.shape[:2], shown, rows.shape[3]), 2, dtype=rows.dtype, device=rows.device, capacity=shown + room
    )
    if rows.shape[2]:
        # Through `data`, as a compiled graph writes: the version counter is left to tell of writes by others.
        tail.data.narrow(2, shown - rows.shape[2], rows.shape[2]).copy_(rows)
    return tail


class CacheTensor(Tensor):
    """A KV cache [B, H, S, D] of keys or of values in a form of its own; it reads as a plain tensor.

    Cropping, copying, and reordering, selecting and repeating along the batch keep the form; any other operation sees
    `plain()`, and that is what torch.save stores. `nbytes` is the memory that it holds. Writing into it is an error.
    """

    part: Part
    described: str

    @classmethod
    def of(cls, part: Part) -> Self:
        """The tensor of a part."""
        batch, heads, _, size = part.tail.shape
        # Code that reads the memory behind torch's back gets NaN, not wrong numbers.
        nothing = torch.full((), float("nan"), dtype=part.tail.dtype, device=part.tail.device)
        made: Self = Tensor._make_subclass(cls, nothing.expand((batch, heads, part.length, size)))
        made.part = part
        _compat.suggest_dynamic(made, 2)
        return made

    def plain(self) -> Tensor:
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
            kept = _in_the_same_form(func, args, kwargs or {})
            if kept is not None:
                return kept
            plain = pytree.tree_map_only(CacheTensor, lambda cache: cache.part.read(), (args, dict(kwargs or {})))
            return func(*plain[0], **plain[1])

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        copied = self.of(self.part.each(torch.clone))
        memo[id(self)] = copied
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.plain().__reduce_ex__(protocol)

    @property
    def nbytes(self) -> int:  # type: ignore[override]
        """Bytes of memory that the cache holds, room for growth included."""
        return held_bytes([self])


def held_bytes(caches: Iterable[Tensor]) -> int:
    """Bytes of memory behind caches, plain or not, room for growth included; what several of them share counts once."""
    found = {}
    for cache in caches:
        for tensor in cache.part.memory() if isinstance(cache, CacheTensor) else (cache,):
            storage = tensor.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


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


def _in_the_same_form(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """What the operations of transformers' caches give on such a cache, or None for all others."""
    if not args or not isinstance(args[0], CacheTensor):
        return None
    cache = args[0]
    part = cache.part
    if func in _ALONG_THE_BATCH and _dimension(func, args, kwargs) == 0:
        return cache.of(part.each(lambda tensor: func(tensor, *args[1:], **kwargs)))
    if func is Tensor.__getitem__:
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        if len(index) == 2 and isinstance(index[0], Tensor) and index[1] is Ellipsis and index[0].dim() == 1:
            return cache.of(part.each(lambda tensor: tensor[index]))
        length = _crop(index, part.length)
        return None if length is None else cache.of(part.cropped(length))
    if func in (Tensor.clone, torch.clone):
        return cache.of(part.each(torch.clone))
    return cache if func in _THE_SAME else None


def _refuse_writes(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    name = getattr(func, "__name__", "")
    in_place = name in ("__setitem__", "__set__") or (name.endswith("_") and not name.endswith("__"))
    target = kwargs.get("out", args[0] if in_place and args else None)
    if isinstance(target, CacheTensor):
        raise TypeError(
            f"{name} would write into {target.described}: write into plain(), a plain tensor, and give that to the"
            " model instead"
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
