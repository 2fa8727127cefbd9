"""graphopt: a torch.compile backend. `torch.compile(model, backend="graphopt", options={...})`."""

from __future__ import annotations

from graphopt.errors import GraphoptError, OptionError
from graphopt.explanation import explain
from graphopt.options import Options
from graphopt.pipeline import graph_pass
from graphopt.prune_options import PruneHeads
from graphopt.pruning.importance import Importance, head_importance
from graphopt.quantization.calibration import Calibration, calibrate
from graphopt.quantization.checkpoint import load_checkpoint
from graphopt.quantization.gguf_file import load_gguf
from graphopt.quantization.plan import Plan, plan
from graphopt.quantization.release import release_weights
from graphopt.quantization.store import load_quantized, save_quantized
from graphopt.quantize_options import Quantize
from graphopt.report import Report, counters

__all__ = [
    "Calibration",
    "GraphoptError",
    "Importance",
    "OptionError",
    "Options",
    "Plan",
    "PruneHeads",
    "Quantize",
    "Report",
    "calibrate",
    "counters",
    "explain",
    "graph_pass",
    "head_importance",
    "load_checkpoint",
    "load_gguf",
    "load_quantized",
    "plan",
    "release_weights",
    "save_quantized",
]
