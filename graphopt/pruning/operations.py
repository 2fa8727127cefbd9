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
from graphopt.pruning import bounds, lines


def _pruned_shape(
    weight: Tensor, rows: str, columns: str, transposed: bool, facts: Sequence[Tensor], conditions: Sequence[str]
) -> Tensor:
    turned = weight.t() if transposed else weight
    kept = {dim: len(lines.numbers(part)) for dim, part in enumerate((rows, columns)) if part}
    return weight.new_empty([kept.get(dim, size) for dim, size in enumerate(turned.shape)])


@operation(
    "(Tensor weight, str rows, str columns, bool transposed, Tensor[] facts, str[] conditions) -> Tensor",
    _pruned_shape,
)
def prune_weight(
    weight: Tensor, rows: str, columns: str, transposed: bool, facts: Sequence[Tensor], conditions: Sequence[str]
) -> Tensor:
    """The given rows and columns of a weight [N, K] (or, transposed, of one kept as [K, N]; [N]; [E, ...]).

    rows, columns: as `lines.spell` writes them; "" keeps all. The result is dense. facts, conditions: weights, and what
    must hold of each for the removal to be right: "zero 1 0:64" (its first 64 columns are zero), "minus_inf 0 3:4" (its
    fourth element is minus infinity), "bound ..." (what `bounds.Block.spell` wrote; the other weights of the block
    follow, under "with").
    Raises StalePruningError when a condition does not hold.
    """
    for number, condition in enumerate(conditions):
        kind, _, rest = condition.partition(" ")
        if lines.is_about_lines(condition) and not lines.hold(facts[number], condition):
            raise StalePruningError("a head, channel or expert that was dead when this was compiled is alive again")
        if kind == "bound" and not bounds.Block.read(rest).holds(facts[number:]):
            raise StalePruningError("heads that could be left out within max_error no longer can")
    kept = weight.t() if transposed else weight
    for dim, spelled in enumerate((rows, columns)):
        if spelled:
            kept = kept.index_select(dim, torch.tensor(lines.numbers(spelled), device=weight.device))
    return kept.clone(memory_format=torch.contiguous_format)
