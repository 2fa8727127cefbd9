"""Run a cut-out graph on real tensors while a compilation may be in progress around it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from graphopt import _compat


@contextlib.contextmanager
def real_execution() -> Iterator[None]:
    """Inside the block torch runs on real tensors, without gradients, and the random state is put back afterwards."""
    with _compat.without_modes(), torch.no_grad(), torch.random.fork_rng():
        yield


def run(function: Callable[..., Any], inputs: Sequence[Any], seed: int = 0) -> tuple[list[Any], list[Any]]:
    """Outputs of `function`, and its inputs after the call, for copies of `inputs` and a fixed random seed."""
    copies = [copy(value) for value in inputs]
    torch.manual_seed(seed)
    out = function(*copies)
    return list(out) if isinstance(out, (tuple, list)) else [out], copies


def copy(value: Any) -> Any:
    """A copy of a tensor with its own memory and the same strides; other values as they are."""
    if not isinstance(value, torch.Tensor):
        return value
    if value.layout != torch.strided:
        return value.detach().clone()
    made = empty(value.shape, value.stride(), value.dtype, value.device)
    made.as_strided(*_without_repeats(value)).copy_(value.detach().as_strided(*_without_repeats(value)))
    return made


def empty(sizes: Sequence[int], strides: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """An uninitialised tensor of the given sizes and strides; dimensions of stride 0 share memory."""
    extent = 1 + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True)) if 0 not in sizes else 0
    return torch.empty(extent, dtype=dtype, device=device).as_strided(list(sizes), list(strides))


def _without_repeats(value: torch.Tensor) -> tuple[list[int], list[int]]:
    """Sizes and strides that name each element of an expanded tensor once."""
    pairs = zip(value.shape, value.stride(), strict=True)
    return [1 if stride == 0 and size else size for size, stride in pairs], list(value.stride())
