"""graphopt: a torch.compile backend. `torch.compile(model, backend="graphopt", options={...})`."""

from __future__ import annotations

from graphopt.errors import GraphoptError, OptionError
from graphopt.explanation import explain
from graphopt.options import Options
from graphopt.pipeline import graph_pass
from graphopt.prune_options import PruneHeads, PruneLayers, Sparsify
from graphopt.pruning.export import export_pruned
from graphopt.pruning.importance import Importance, head_importance
from graphopt.pruning.layers import LayerImportance, layer_importance
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
    "LayerImportance",
    "OptionError",
    "Options",
    "Plan",
    "PruneHeads",
    "PruneLayers",
    "Quantize",
    "Report",
    "Sparsify",
    "calibrate",
    "counters",
    "explain",
    "export_pruned",
    "graph_pass",
    "head_importance",
    "layer_importance",
    "load_checkpoint",
    "load_gguf",
    "load_quantized",
    "plan",
    "release_weights",
    "save_quantized",
]
