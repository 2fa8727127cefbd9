"""Attention on the compiled kernels: `torch.ops.graphopt_cpp.attention`.

Up to 16 query rows (decode) are split over the keys among threads (flash-decoding, Dao et al. 2023), the heads of a
group served together by one pass over their key/value head, strided caches read in place. More are computed in tiles
over packed blocks of keys (FlashAttention-2, Dao 2023). What neither takes is given to
`at::scaled_dot_product_attention` inside the operator, and so is bf16 on processors with tile registers, which torch's
own attention uses.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from graphopt import ops, shapes
from graphopt.backends.cpp import operands
from graphopt.lowering import Lowering, arguments, same_arguments
from graphopt.quantization.cache_operations import attention_quantized
from graphopt.runtime.kv_paged import attention_paged


def lowerings() -> tuple[Lowering, ...]:
    """Lowerings of the dialect's attentions; the library must be loaded."""
    kernel = torch.ops.graphopt_cpp.attention.default
    quantized = torch.ops.graphopt_cpp.attention_quantized.default
    paged = torch.ops.graphopt_cpp.attention_paged.default
    return (
        Lowering("cpp.attention", ops.attention, _attention, same_arguments(kernel)),
        Lowering("cpp.attention_quantized", attention_quantized, _with_tails, same_arguments(quantized)),
        Lowering("cpp.attention_paged", attention_paged, _with_tails, same_arguments(paged)),
    )


def unsupported_reason(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> str | None:
    """Why the kernel cannot take q [B, H, S, D], k [B, Hkv, T, D], v [B, Hkv, T, Dv], mask; None if it can."""
    rows = (q, k, v)
    reason = operands.declined(rows)
    if reason is not None:
        return reason
    if any(operand.dim() != 4 for operand in rows):
        return "q, k and v must have four dimensions"
    if not all(shapes.same(operand.stride(3), 1) for operand in rows):
        return "the rows of q, k or v are not contiguous"
    if mask is not None and mask.dtype not in (torch.bool, torch.float32, q.dtype):
        return f"a mask of dtype {operands.name(mask.dtype)}"
    if mask is not None and mask.dim() > 4:
        return "a mask of more than four dimensions"
    return None


def _attention(node: fx.Node) -> str | None:
    given = arguments(node)
    mask = given["mask"]
    q, k, v = (given[name].meta["val"] for name in ("q", "k", "v"))
    return unsupported_reason(q, k, v, None if mask is None else mask.meta["val"])


def _with_tails(node: fx.Node) -> str | None:
    given = arguments(node)
    q, k, v = (given[name].meta["val"] for name in ("q", "k_tail", "v_tail"))
    mask = given["mask"]
    return unsupported_reason(q, k, v, None if mask is None else mask.meta["val"])
