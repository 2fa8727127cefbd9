"""What do quantisation and a pass cost and gain? Bytes, predicted and measured time and error of several options.

python examples/research_options.py [options.png]
"""

import sys

import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaModel

from graphopt import search


def small_llama() -> LlamaModel:
    """One layer with random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_cache=False,
    )
    return LlamaModel(config).eval()


def main(path: str) -> None:
    """Sweep two options, print the table, draw it."""
    torch.set_num_threads(1)  # what else the machine does disturbs one thread least
    found = search.sweep(
        small_llama(),
        torch.arange(8)[None],
        grid={"quantize": [None, "int8", "int4"], "disable": [(), ("recognize_rms_norm",)]},
        fixed={"target": "reference"},
        roofline="H100",
        rounds=5,
        plot=path,
    )
    Console(width=120).print(found)
    exact = [row for row in found.rows if row.options["quantize"] is None]
    assert all(row.error < 1e-5 for row in exact)
    print(f"written to {path}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "options.png")
