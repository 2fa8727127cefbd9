"""Run a graph in float64: the reference against which roundings are judged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from graphopt import ops


class Wide(TorchDispatchMode):
    """Every floating point operation inside the block runs in float64, dialect operations by their meaning.

    A cast to a narrower floating point type keeps float64. Random numbers are drawn in their own dtype, so that they
    are the same numbers.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        meaning = ops.meaning(func)
        if meaning is not None:
            with self:
                return meaning(*args, **kwargs)
        if torch.Tag.nondeterministic_seeded in func.tags:
            return tree_map(_widen_tensor, func(*args, **kwargs))
        if func is torch.ops.aten._softmax.default:
            args = (*args[:2], False)
        return func(*tree_map(_widen, args), **tree_map(_widen, kwargs))


def run_wide(function: Callable[..., Any], inputs: Sequence[Any]) -> Any:
    """`function(*inputs)` in float64, or None where an operation has no float64 form (a bit cast, a packed kernel)."""
    try:
        with Wide():  # type: ignore[no-untyped-call]
            return function(*widened(inputs))
    except (RuntimeError, TypeError, ValueError, NotImplementedError):
        return None


def widened(inputs: Sequence[Any]) -> Sequence[Any]:
    """The inputs with floating point tensors in float64; those that are in float64 already are the same tensors."""
    wide: Sequence[Any] = tree_map(_widen_tensor, tuple(inputs))
    return wide


def _widen_tensor(value: Any) -> Any:
    narrow = isinstance(value, torch.Tensor) and value.dtype.is_floating_point and value.dtype != torch.float64
    return value.double() if narrow else value


def _widen(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return torch.float64 if value.is_floating_point else value
    return _widen_tensor(value)
