"""Test helpers for authors of passes and kernels; the project's own tests use nothing else.

The strategies in `graphopt.testing.strategies` need hypothesis; everything here needs torch alone.
"""

from graphopt.testing.checks import assert_not_applied, check_graph, check_pass
from graphopt.testing.kernels import check_kernel, check_model
from graphopt.testing.near_misses import NearMiss, check_near_misses, near_misses
from graphopt.testing.traced import Traced, TracedGraph, trace

__all__ = [
    "NearMiss",
    "Traced",
    "TracedGraph",
    "assert_not_applied",
    "check_graph",
    "check_kernel",
    "check_model",
    "check_near_misses",
    "check_pass",
    "near_misses",
    "trace",
]
