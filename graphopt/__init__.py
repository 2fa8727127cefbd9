"""graphopt: a torch.compile backend. `torch.compile(model, backend="graphopt", options={...})`."""

from __future__ import annotations

from graphopt.errors import GraphoptError, OptionError
from graphopt.explanation import explain
from graphopt.options import Options
from graphopt.pipeline import graph_pass
from graphopt.quantize_options import Quantize
from graphopt.report import Report, counters

__all__ = ["GraphoptError", "OptionError", "Options", "Quantize", "Report", "counters", "explain", "graph_pass"]
