"""For experiments: search over rewrites on the cost model (`best`), and sweep options (`sweep`)."""

from __future__ import annotations

from graphopt.search.beam import Move as Move
from graphopt.search.beam import Plan as Plan
from graphopt.search.beam import best as best
from graphopt.search.sweeping import Row as Row
from graphopt.search.sweeping import Sweep as Sweep
from graphopt.search.sweeping import sweep as sweep
