"""What 2:4 weights and dropped layers cost: SmolLM2's perplexity, compiled by graphopt with the option `prune`.

    python -m tests.benchmarks.sparse_quality [--out docs/measured/pruning] [--rows 4] [--length 192]

Layers go by what the answer changes without them (`layer_importance`), or at random.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from graphopt import PruneLayers, Sparsify, calibrate, layer_importance
from graphopt.commands.models import find_model, load_model
from tests.benchmarks.pruned_quality import perplexity, text

COUNTS = (1, 2)


def pruned(model: Any, held: torch.Tensor, prune: Any) -> float:
    """Perplexity of the compiled model."""
    torch.compiler.reset()
    return perplexity(torch.compile(model, backend="graphopt", options={"target": "reference", "prune": prune}), held)


def main() -> None:
    """Print each figure as it comes; write all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("docs/measured/pruning"))
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=192)
    chosen = parser.parse_args()
    loaded = load_model(find_model("smollm2"), "float32")
    model = loaded.model.requires_grad_(False)
    ids = loaded.tokenizer(text(40 * chosen.rows * chosen.length), return_tensors="pt").input_ids[0]
    held, seen = ids[: 2 * chosen.rows * chosen.length].view(2, chosen.rows, chosen.length)
    examples = [{"input_ids": row[None], "use_cache": False} for row in seen]
    found: dict[str, float] = {}

    chosen.out.mkdir(parents=True, exist_ok=True)

    def note(what: str, value: float) -> None:
        found[what] = value
        print(f"{what}: perplexity {value:.2f}", flush=True)
        (chosen.out / "sparse-smollm2.json").write_text(json.dumps(found, indent=1) + "\n")

    note("whole", perplexity(model, held))
    note("2:4, magnitude", pruned(model, held, "2:4"))
    calibration = calibrate(model, examples, rows=256)
    note("2:4, wanda", pruned(model, held, Sparsify(choice="wanda", calibration=calibration)))
    importance = layer_importance(model, examples[:2])
    names = list(importance.changes)
    orders = {
        "least change": sorted(names, key=importance.changes.__getitem__),
        "random": [names[i] for i in torch.randperm(len(names), generator=torch.Generator().manual_seed(0))],
    }
    for count in COUNTS:
        for how, order in orders.items():
            prune = PruneLayers(drop=tuple(order[:count]))
            note(f"without {count} of {len(names)} layers, {how}", pruned(model, held, prune))


if __name__ == "__main__":
    main()
