"""Which heads and channels of a model are dead, and graphs without them; see docs/explanation/pruning.md."""

from graphopt.pruning import packing as packing  # what `prune_weight` does at call time
