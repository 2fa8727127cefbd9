"""The Hypothesis strategies: `from graphopt.testing import strategies` (needs hypothesis)."""

from graphopt.testing.blocks import transformer_blocks
from graphopt.testing.programs import Program, hostile_tensors, programs

__all__ = ["Program", "hostile_tensors", "programs", "transformer_blocks"]
