"""Pruned weights at call time: made at the first call that needs them and again when a weight has changed."""

from __future__ import annotations

from torch import Tensor

from graphopt.pruning import operations
from graphopt.runtime import packs, prologue


@prologue.call_time(operations.prune_weight, packs_weights=True)
@packs.packed
def pack_pruned(
    weight: Tensor, rows: str, columns: str, transposed: bool, facts: list[Tensor], conditions: list[str]
) -> Tensor:
    """`graphopt.prune_weight` under the guard of `runtime.packs`."""
    pruned: Tensor = operations.prune_weight(
        weight.detach(), rows, columns, transposed, [fact.detach() for fact in facts], conditions
    )
    return pruned
