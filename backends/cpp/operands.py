"""What all compiled kernels ask of their operands, phrased as reasons to decline."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def declined(operands: Sequence[Tensor]) -> str | None:
    """Why no compiled kernel takes these operands (real or fake) together; None if nothing speaks against it."""
    if any(operand.device.type != "cpu" for operand in operands):
        return "not on the CPU"
    if any(operand.layout != torch.strided for operand in operands):
        return "a sparse operand"
    names = [name(operand.dtype) for operand in operands]
    if operands[0].dtype not in DTYPES:
        return f"dtype {names[0]} is none of {', '.join(map(name, DTYPES))}"
    if len(set(names)) > 1:
        return f"operands of several dtypes: {', '.join(names)}"
    return None


def name(dtype: torch.dtype) -> str:
    """The dtype as users write it, without the module."""
    return str(dtype).removeprefix("torch.")
