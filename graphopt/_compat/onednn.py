"""What oneDNN does on this processor."""

from __future__ import annotations

import functools

import torch


@functools.cache
def multiplies_fast(dtype: torch.dtype) -> bool:
    """Whether torch multiplies CPU tensors of this dtype by oneDNN or a BLAS, and not by loops of its own."""
    if dtype is torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype is not torch.float16 or bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
