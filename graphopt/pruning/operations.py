"""The dialect operation of pruned weights. Its body is its meaning, as in `graphopt.ops`.

A pass writes `prune_weight` on the runtime weight; at call time the smaller weight is made once (`packing`) and again
whenever the weight, or one that the removal rests on, has changed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from graphopt.errors import StalePruningError
from graphopt.ops import operation
from graphopt.pruning import lines


def _pruned_shape(
    weight: Tensor, rows: str, columns: str, transposed: bool, zero: Sequence[Tensor], zero_lines: Sequence[str]
) -> Tensor:
    turned = weight.t() if transposed else weight
    kept = (rows, columns)[: turned.dim()]
    shape = [len(lines.numbers(part)) if part else size for part, size in zip(kept, turned.shape, strict=True)]
    return weight.new_empty(shape)


@operation(
    "(Tensor weight, str rows, str columns, bool transposed, Tensor[] zero, str[] zero_lines) -> Tensor",
    _pruned_shape,
)
def prune_weight(
    weight: Tensor, rows: str, columns: str, transposed: bool, zero: Sequence[Tensor], zero_lines: Sequence[str]
) -> Tensor:
    """The given rows and columns of a weight [N, K] (or, transposed, of one kept as [K, N]; or a bias [N]).

    rows, columns: as `lines.spell` writes them; "" keeps all. The result is dense. zero, zero_lines: what the removal
    rests on, for each tensor "dim lines": elements that must be zero ("1 0:64" are the first 64 columns).
    Raises StalePruningError when one of them is not.
    """
    for tensor, spelled in zip(zero, zero_lines, strict=True):
        dim, _, which = spelled.partition(" ")
        index = torch.tensor(lines.numbers(which), device=tensor.device)
        if bool(tensor.index_select(int(dim), index).any()):
            raise StalePruningError("a head or channel that was dead when the graph was compiled is alive again")
    kept = weight.t() if transposed else weight
    for number, spelled in enumerate((rows, columns)):
        if spelled:
            kept = kept.index_select(number, torch.tensor(lines.numbers(spelled), device=weight.device))
    return kept.clone(memory_format=torch.contiguous_format)
