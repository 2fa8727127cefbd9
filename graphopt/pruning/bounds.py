"""An upper bound on what leaving out heads changes, from weights alone: no data, for every input.

The input x of the value projection comes from a norm: x = g * u + s with ||u|| <= sqrt(d), whatever was normalised.
A head adds W_o (sum_j p_j (W_v x_j + b)) to the output of a token, where the p_j are not negative and sum to at most 1.
So the change is at most sqrt(d) ||W_o W_v diag(g)|| + ||W_o (W_v s + b)||, with the spectral norm;
docs/explanation/pruning.md has the proof, and the sharper of two ways to add several heads.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Block:
    """Where the matrices of one attention block stand, as plain data.

    The tensors it is asked with are W_o, W_v, then, as far as they are there, g, s and b. heads: those to leave out.
    size: channels of a head. group: query heads for each key/value head. first_row: of the values in W_v.
    gain_offset: what a norm adds to its weight (1 in Gemma). limit: what the bound may be, as a root mean square.
    """

    heads: tuple[int, ...]
    size: int
    group: int
    first_row: int
    o_transposed: bool
    v_transposed: bool
    has: tuple[bool, bool, bool]
    gain_offset: float
    limit: float

    def spell(self) -> str:
        """The block as text; `read` is its inverse."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def read(cls, text: str) -> Block:
        """The block that `spell` wrote."""
        given: dict[str, Any] = json.loads(text)
        given.update({name: tuple(given[name]) for name in ("heads", "has")})
        return cls(**given)

    def holds(self, tensors: Sequence[Tensor]) -> bool:
        """Whether the bound for `heads` is within the limit, for the weights as they are."""
        return bound(self, tensors, self.heads) <= self.limit


def bound(block: Block, tensors: Sequence[Tensor], heads: Sequence[int]) -> float:
    """The largest change of a token's output, as root mean square over its channels, when `heads` are left out."""
    if not heads:
        return 0.0
    return _combined([_Head.of(block, tensors, head) for head in heads], tensors[0].dtype)


def choose(block: Block, tensors: Sequence[Tensor], count: int) -> tuple[int, ...]:
    """As many of `count` heads as can be left out within the limit, the least first."""
    known = [_Head.of(block, tensors, head) for head in range(count)]
    chosen: list[int] = []
    for head in sorted(range(count), key=lambda head: _combined([known[head]], tensors[0].dtype)):
        if _combined([known[other] for other in (*chosen, head)], tensors[0].dtype) > block.limit:
            break
        chosen.append(head)
    return tuple(sorted(chosen))


@dataclasses.dataclass(frozen=True)
class _Head:
    """What one head adds, in float64.

    factor [N, D] has the singular values of W_o W_v diag(g); shift [N] is W_o (W_v s + b); width is d, the number of
    channels that were normalised.
    """

    factor: Tensor
    shift: Tensor
    width: int

    @classmethod
    def of(cls, block: Block, tensors: Sequence[Tensor], head: int) -> _Head:
        o, v, *rest = (tensor.detach() for tensor in tensors[: 2 + sum(block.has)])
        given = iter(rest)
        gain, shift, bias = (next(given).double().cpu() if there else None for there in block.has)
        o, v = (o.t() if block.o_transposed else o), (v.t() if block.v_transposed else v)
        first = block.first_row + head // block.group * block.size
        values = v[first : first + block.size].double().cpu()
        out = o[:, head * block.size : (head + 1) * block.size].double().cpu()
        fixed = torch.zeros(block.size, dtype=torch.float64) if bias is None else bias[first : first + block.size]
        if shift is not None:
            fixed = fixed + values @ shift
        scaled = values if gain is None else values * (gain + block.gain_offset)
        # values = L Q with orthonormal rows in Q: the product has the singular values of the narrow W_o L.
        return cls(out @ torch.linalg.qr(scaled.t()).R.t(), out @ fixed, values.shape[1])


def _combined(heads: Sequence[_Head], dtype: torch.dtype) -> float:
    rows, width = heads[0].factor.shape[0], heads[0].width
    apart = sum(_spectral(head.factor) for head in heads)
    together = _spectral(torch.cat([head.factor for head in heads], 1)) * math.sqrt(len(heads))
    shifts = sum(float(head.shift.norm()) for head in heads)
    # The program itself rounds: its norm, its probabilities and its products by a few units in the last place.
    return (min(apart, together) * math.sqrt(width) + shifts) / math.sqrt(rows) * (1 + 8 * torch.finfo(dtype).eps)


def _spectral(matrix: Tensor) -> float:
    """The largest singular value, from the eigenvalues of the smaller Gram matrix."""
    gram = matrix @ matrix.t() if matrix.shape[0] <= matrix.shape[1] else matrix.t() @ matrix
    largest = float(torch.linalg.eigvalsh(gram)[-1])
    return math.sqrt(max(largest, 0.0))
