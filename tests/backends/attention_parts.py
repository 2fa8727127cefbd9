"""Caches in parts, as attention kernels read them: how rows become parts, and what the parts stand for.

One `Parts` for each form of caches, so that kernels of every backend are checked on the same cases.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from graphopt import ops
from graphopt.quantization import cache_operations as quantized
from graphopt.runtime import kv_paged, kv_quantized
from graphopt.runtime.kv_paged import BLOCK, TAIL

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


@dataclasses.dataclass(frozen=True)
class Parts:
    """A form of caches. of: rows [B, H, S, D], the number of new rows, keys or values -> the parts.

    rows: parts, length, keys or values -> all rows in float64. told: what attention is told besides. sizes: of heads.
    """

    name: str
    attention: torch._ops.OpOverload
    of: Callable[[Tensor, int, bool], list[Tensor]]
    rows: Callable[[list[Tensor], int, bool], Tensor]
    told: tuple[Any, ...] = ()
    sizes: tuple[int, ...] = (1, 2, 17, 40, 80, 128)

    def operands(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        """The parts of keys and of values, and the rows that they stand for."""
        new, length = q.shape[2], k.shape[2]
        k_parts, v_parts = self.of(k, new, True), self.of(v, new, False)
        return [*k_parts, *v_parts], self.rows(k_parts, length, True), self.rows(v_parts, length, False)


def expected(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **how: Any) -> Tensor:
    """Attention over rows, in float64."""
    wide = mask.double() if mask is not None and mask.dtype != torch.bool else mask
    return ops.meaning(ops.attention)(q.double(), k.double(), v.double(), wide, **how)  # type: ignore[misc]


def operands(heads: tuple[int, int], rows: int, keys: int, size: int, batch: int = 1) -> list[Tensor]:
    """q, k and v for so many query and key/value heads; a channel of the keys is large for all tokens."""
    q, k, v = (torch.randn(batch, h, n, size) for h, n in ((heads[0], rows), (heads[1], keys), (heads[1], keys)))
    k[..., size // 2] *= 30
    return [q, k, v]


def masked(shape: str, hidden: int, batch: int, rows: int, keys: int) -> Tensor | None:
    """A mask that hides `hidden` keys, but not all; "additive": random numbers."""
    place = torch.arange(keys)
    if shape == "left":
        return (place >= min(hidden, keys - 1))[None, None, None]
    if shape == "right":
        return (place < max(1, keys - hidden))[None, None, None].expand(batch, 1, rows, keys)
    return torch.randn(batch, 1, rows, keys) if shape == "additive" else None


@st.composite
def cases(draw: Any) -> tuple[list[Tensor], Tensor | None, dict[str, Any]]:
    """q, k, v, a mask, and the settings of attention, of any shape that kernels take and some that they do not."""
    batch, group = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    rows, keys = draw(st.integers(1, 18)), draw(st.integers(1, 200))
    mask = masked(
        draw(st.sampled_from(("none", "left", "right", "additive"))), draw(st.integers(0, 120)), batch, rows, keys
    )
    how = {
        "is_causal": draw(st.booleans()),
        "scale": 0.3,
        "softcap": draw(st.sampled_from((0.0, 5.0))),
        "window": draw(st.sampled_from((0, 3))),
    }
    return operands((2 * group, 2), rows, keys, 16, batch=batch), mask, how


def pages(rows: Tensor, new: int = 1, keys: bool = True) -> list[Tensor]:
    """The parts of rows [B, H, S, D]: blocks in random order in a pool with others between, that hold NaN."""
    batch, heads, length, size = rows.shape
    count = (length - min(new, length)) // BLOCK
    table = torch.randperm(2 * batch * count + 1)[: batch * count].view(batch, count)
    pool = torch.full((2 * batch * count + 1, heads, BLOCK, size), math.nan, dtype=rows.dtype)
    pool[table.flatten()] = rows[:, :, : count * BLOCK].unflatten(2, (count, BLOCK)).transpose(1, 2).flatten(0, 1)
    recent = rows[:, :, count * BLOCK :]
    tail = rows.new_full((TAIL + new, batch, heads, size), math.nan).permute(1, 2, 0, 3)
    tail[:, :, tail.shape[2] - recent.shape[2] :] = recent
    return [pool[0], table, tail]


def _quantized(kind: str) -> Parts:
    def rows(parts: list[Tensor], length: int, keys: bool) -> Tensor:
        # In float64; `quantized.whole` would round to the dtype of the tail.
        codes, params, tail = parts
        packed = quantized.dequantize_rows(codes, params, kind, keys, torch.float64)
        return torch.cat([packed, tail[:, :, tail.shape[2] - (length - codes.shape[2]) :].double()], 2)

    return Parts(
        kind,
        quantized.attention_quantized,
        lambda given, new, keys: kv_quantized.reserve(given, 0, kind, keys),
        rows,
        (kind,),
        (2, 16, 40, 80, 96, 128),
    )


PAGED = Parts(
    "paged", kv_paged.attention_paged, pages, lambda parts, length, keys: kv_paged.whole(*parts, length).double()
)
FORMS = {form.name: form for form in (PAGED, *map(_quantized, quantized.KINDS))}
