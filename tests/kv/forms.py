"""The forms of caches that are tensors of their own (`runtime/kv_tensor.py`), as tests use them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from graphopt.quantization import cache_operations as layout
from graphopt.runtime import kv_paged, kv_quantized
from graphopt.runtime.kv_paged import PagedCache, pages_of
from graphopt.runtime.kv_quantized import QuantizedCache, part_of
from graphopt.runtime.kv_tensor import CacheTensor


@dataclasses.dataclass(frozen=True)
class Form:
    """of: rows [B, H, S, D] as a cache. append: a cache and new rows -> the longer cache, as a compiled graph makes it.

    exact: whether a cache reads as the very rows it was made of.
    """

    name: str
    kind: type[CacheTensor]
    of: Callable[[Tensor], CacheTensor]
    append: Callable[[Tensor, Tensor], CacheTensor]
    exact: bool = False


def rows(length: int, batch: int = 2, dtype: torch.dtype = torch.float32, size: int = 16) -> Tensor:
    made = torch.randn(batch, 3, length, size)
    made[..., 1] *= 20  # a channel that is large for all tokens
    return made.to(dtype)


def _append_paged(cache: Tensor, new: Tensor) -> CacheTensor:
    first, table, room = kv_paged.reserve(cache, new.shape[2])
    # Through `data`, as a compiled graph writes: torch's version counters do not see it.
    room.data[:, :, kv_paged.TAIL :] = new
    return kv_paged.returned(first, table, room, cache.shape[2] + new.shape[2])  # type: ignore[return-value]


def quantized(kind: str, keys: bool) -> Form:
    """The quantised form of keys or of values."""

    def append(cache: Tensor, new: Tensor) -> CacheTensor:
        codes, params, room = kv_quantized.reserve(cache, new.shape[2], kind, keys)
        room.data[:, :, layout.TAIL :] = new
        length = cache.shape[2] + new.shape[2]
        return kv_quantized.returned(codes, params, room, length, kind, keys)  # type: ignore[return-value]

    name = f"{kind} {'keys' if keys else 'values'}"
    return Form(name, QuantizedCache, lambda given: QuantizedCache.of(part_of(given, kind, keys)), append)


PAGED = Form("paged", PagedCache, lambda given: PagedCache.of(pages_of(given)), _append_paged, exact=True)
QUANTIZED = tuple(quantized(kind, keys) for kind in layout.KINDS for keys in (True, False))
