"""Measure what this machine can do at best, to judge benchmarks by: read memory, multiply matrices."""

from __future__ import annotations

import torch

from graphopt import cost
from graphopt.commands.figures import Limits

_READ_BYTES = 512 * 2**20  # far beyond every cache
_SIDE = 2048
_SECONDS = 1.5


def measure_limits(dtype: str) -> Limits:
    """Bytes read and operations of a matrix product in `dtype`, each in a second, with torch's threads of now."""
    read = cost.read_bandwidth(_READ_BYTES, _SECONDS)
    return Limits(read, cost.product_rate(getattr(torch, dtype), _SIDE, _SECONDS), torch.get_num_threads())
