"""Lines of weights: lists of row or column numbers as short text, and which lines of a weight are zero or -inf.

What a line holds is a fact about a weight's present value: `prune_weight` looks again when the weight has changed.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Sequence

import torch

from graphopt import _compat
from graphopt.quantization.release import is_released

_SCREENED = 8


def spell(numbers: Iterable[int]) -> str:
    """Ascending line numbers as ranges: [0, 1, 2, 5] is "0:3,5:6"."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][1] == number:
            parts[-1][1] += 1
        elif parts and parts[-1][1] > number:
            raise ValueError(f"line numbers must ascend, got {number} after {parts[-1][1] - 1}")
        else:
            parts.append([number, number + 1])
    return ",".join(f"{low}:{high}" for low, high in parts)


def numbers(spelled: str) -> list[int]:
    """The line numbers that `spell` wrote."""
    pairs = [part.split(":") for part in spelled.split(",") if part]
    return list(itertools.chain.from_iterable(range(int(low), int(high)) for low, high in pairs))


def zero_lines(weight: torch.Tensor, dim: int) -> tuple[int, ...]:
    """The indices along `dim` of a weight of any shape at which all its elements are zero.

    A few elements of each line are looked at first: a weight without such lines costs next to nothing.
    """
    if weight.numel() == 0:
        return ()
    lines = weight.detach().movedim(dim, 0)
    found = torch.arange(lines.shape[0], device=weight.device)
    if lines.dim() > 1:
        screened = lines.flatten(2)[:, :_SCREENED, :1] if lines.dim() > 2 else lines[:, :_SCREENED]
        found = found[(screened == 0).flatten(1).all(1)]
    kept = lines.index_select(0, found)
    zero = (kept == 0) if kept.dim() == 1 else (kept == 0).flatten(1).all(1)
    return tuple(found[zero].tolist())


def excluding_lines(weight: torch.Tensor, dim: int) -> tuple[int, ...]:
    """The elements of a vector that are minus infinity; none of tensors of other shapes."""
    if weight.dim() != 1 or dim != 0:
        return ()
    return tuple(torch.isneginf(weight.detach()).nonzero().flatten().tolist())


LINES = {"zero": zero_lines, "minus_inf": excluding_lines}
"""What lines of weights are looked for, and how."""

_HOLDS: dict[str, Callable[[torch.Tensor], bool]] = {
    "zero": lambda named: not bool(named.any()),
    "minus_inf": lambda named: bool(torch.isneginf(named).all()),
    "not_minus_inf": lambda named: not bool(torch.isneginf(named).any()),
}


def hold(weight: torch.Tensor, condition: str) -> bool:
    """Whether the lines of a weight are as the condition says: "zero 1 0:64" names what they hold, dimension and lines.

    They hold "zero", "minus_inf" or "not_minus_inf".
    """
    value, dim, which = condition.split(" ")
    return _HOLDS[value](weight.index_select(int(dim), torch.tensor(numbers(which), device=weight.device)))


def is_about_lines(condition: str) -> bool:
    """Whether `hold` knows what the condition says."""
    return condition.split(" ")[0] in _HOLDS


def can_be_read(tensor: object) -> bool:
    """Whether the elements of a weight are at hand: a plain, dense, floating point tensor with memory."""
    return (
        isinstance(tensor, torch.Tensor)
        and type(tensor) in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)
        and tensor.layout == torch.strided
        and tensor.device.type != "meta"
        and tensor.is_floating_point()
        and tensor.element_size() > 1
        and not is_released(tensor)
    )


def digest(weights: Sequence[object]) -> str:
    """Which lines of the weights are zero or minus infinity, as a short text; "" if none is.

    Part of the key of compiled graphs: those for other weights with other dead rows are other graphs.
    """
    found = []
    with _compat.without_modes(), torch.no_grad():
        for index, weight in enumerate(weights):
            if isinstance(weight, torch.Tensor) and can_be_read(weight):
                known = [find(weight, dim) for find in LINES.values() for dim in range(weight.dim())]
                found += [(index, known)] if any(known) else []
    return hashlib.sha256(repr(found).encode()).hexdigest() if found else ""
