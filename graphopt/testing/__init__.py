"""Test helpers for authors of passes and kernels; the project's own tests use nothing else."""

from graphopt.testing.checks import assert_not_applied, check_graph, check_pass
from graphopt.testing.traced import Traced, TracedGraph, trace

__all__ = ["Traced", "TracedGraph", "assert_not_applied", "check_graph", "check_pass", "trace"]
