"""Translation validation: each rewrite is cut out of its graph as a before/after pair and run on many inputs."""

from graphopt.verify.checker import Checker, Failure
from graphopt.verify.cut import Pair, cut

__all__ = ["Checker", "Failure", "Pair", "cut"]
