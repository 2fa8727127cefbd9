"""Measure what this machine can do at best, to judge benchmarks by: read memory, multiply matrices."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from graphopt.commands.figures import Limits

_READ_BYTES = 512 * 2**20  # far beyond every cache
_SIDE = 2048
_SECONDS = 1.5


def measure_limits(dtype: str) -> Limits:
    """The best of a few ways to read a large buffer with all threads; a square matrix product in `dtype`."""
    buffer = torch.ones(_READ_BYTES // 4)
    readers: list[Callable[[], object]] = [buffer.sum, buffer.max, lambda: torch.dot(buffer, buffer)]
    read = min(_fastest(reader, _SECONDS / len(readers)) for reader in readers)
    square = torch.randn(_SIDE, _SIDE, dtype=getattr(torch, dtype))
    product = _fastest(lambda: square @ square, _SECONDS)
    return Limits(_READ_BYTES / read, 2 * _SIDE**3 / product, torch.get_num_threads())


def _fastest(function: Callable[[], object], seconds: float) -> float:
    """The shortest of the calls that fit in `seconds` (three at least)."""
    function()
    times: list[float] = []
    while len(times) < 3 or sum(times) < seconds:
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return min(times)
