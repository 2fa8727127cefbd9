"""Which weights may be packed, for the passes that multiply by them or look rows up."""

from __future__ import annotations

import torch
from torch import fx

from graphopt import capture, views
from graphopt.quantization import operations
from graphopt.quantization.release import is_released
from graphopt.quantization.schemes import Scheme


def is_turned(used: fx.Node) -> bool:
    """Whether the node is a parameter with its last two dimensions exchanged, and nothing else."""
    value, root = used.meta["val"], views.root(used)
    if used.target is not torch.ops.aten.permute.default or used.args[0] is not root:
        return False
    *leading, rows, columns = range(value.dim())
    return used.args[1] == [*leading, columns, rows]


def why_not(used: fx.Node, scheme: Scheme | None, *, transposed: bool = False) -> str:
    """Why the weight that a node reads, [..., N, K] or, transposed, [..., K, N], cannot be packed; "" if it can.

    scheme: None to ask for any scheme that takes the weight's values and makes it smaller.
    """
    root = views.root(used)
    value = root.meta["val"]
    if not views.is_constant_input(used):
        return "the weight is computed in the graph or an argument of the call"
    if used is not root and not is_turned(used):
        return "the weight is a view of a part of a parameter"
    if not value.dtype.is_floating_point or value.element_size() < 2:
        return f"the weight is kept in {value.dtype}"
    if any(not isinstance(size, int) for size in value.shape):
        return "the weight has a symbolic size"
    if value.numel() == 0:
        return "the weight has no elements"
    if scheme is None:
        return ""
    rows, columns = operations.matrix(used.meta["val"].shape, transposed=transposed)
    before, after = rows * columns * value.element_size(), scheme.nbytes(rows, columns)
    if after >= before:
        return f"as {scheme.name} it would take {after} bytes instead of {before}"
    tensor = capture.weight_tensor(root)
    if tensor is not None and not is_released(tensor) and not scheme.can_pack(tensor):
        return f"the weight holds infinities, NaN or values too large for {scheme.name}"
    return ""
