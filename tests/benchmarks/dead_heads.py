"""What exact pruning gains: a third of the heads and a quarter of the FFN channels zeroed by hand, compiled both ways.

    python -m tests.benchmarks.dead_heads smollm2 | minilm [--turns 30] [--layers 0]

Prints the sizes of the matrices before and after, the largest difference from eager, and the time of encoding 256
tokens and (smollm2) of decoding one token, pruned and unpruned in turns: smallest and median.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from graphopt.commands.models import find_model, load_model
from graphopt.runtime import packs

HEADS, CHANNELS = 1 / 3, 1 / 4
READS_HEADS = ("o_proj", "attention.output.dense", "c_proj", "out_lin")
READS_CHANNELS = ("down_proj", "output.dense")


@torch.no_grad()
def kill(model: Any, seed: int = 0) -> None:
    """Zero what reads a random third of the heads and a random quarter of the FFN channels of each layer."""
    generator = torch.Generator().manual_seed(seed)
    size = getattr(model.config, "head_dim", None) or model.config.hidden_size // model.config.num_attention_heads
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear):
            continue
        if name.endswith(READS_HEADS):
            heads = module.in_features // size
            for head in torch.randperm(heads, generator=generator)[: round(heads * HEADS)].tolist():
                module.weight[:, head * size : (head + 1) * size] = 0
        elif name.endswith(READS_CHANNELS):
            gone = torch.randperm(module.in_features, generator=generator)[: round(module.in_features * CHANNELS)]
            module.weight[:, gone] = 0


def sizes(model: Any) -> dict[tuple[tuple[int, ...], tuple[int, ...]], int]:
    """How many matrices went from which shape to which."""
    found: dict[tuple[tuple[int, ...], tuple[int, ...]], int] = {}
    for parameter in model.parameters():
        for made in packs.made_from(parameter):
            if made.function.endswith("pack_pruned") and made.sources[0] is parameter and parameter.dim() == 2:
                key = tuple(parameter.shape), tuple(made.result.shape)
                found[key] = found.get(key, 0) + 1
    return found


def in_turns(calls: dict[str, Callable[[], Any]], turns: int) -> dict[str, list[float]]:
    """Milliseconds of each call, one after the other in each turn."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(turns):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            found[name].append((time.perf_counter() - started) * 1e3)
    return found


def show(what: str, found: dict[str, list[float]]) -> None:
    for name, times in found.items():
        print(f"{what} {name}: min {min(times):.2f} ms, median {statistics.median(times):.2f} ms", flush=True)
    pruned, plain = found["pruned"], found["plain"]
    print(f"{what}: plain/pruned min {min(plain) / min(pruned):.2f}, median of turns "
          f"{statistics.median(b / a for a, b in zip(pruned, plain, strict=True)):.2f}", flush=True)  # fmt: skip


def compiled(model: Any, **options: Any) -> Any:
    return torch.compile(model.forward, backend="graphopt", dynamic=options.pop("dynamic", None), options=options)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=("smollm2", "minilm"))
    parser.add_argument("--turns", type=int, default=30)
    parser.add_argument("--layers", type=int, default=0, help="only the first layers; 0 for all")
    parser.add_argument("--dtype", default="float32")
    chosen = parser.parse_args()
    model = load_model(find_model(chosen.model), chosen.dtype).model
    if chosen.layers:
        stack = model.model if hasattr(model, "model") else model.encoder
        name = "layers" if hasattr(stack, "layers") else "layer"
        setattr(stack, name, getattr(stack, name)[: chosen.layers])
        model.config.num_hidden_layers = chosen.layers
    kill(model)
    ids = torch.randint(3, model.config.vocab_size, (1, 256), generator=torch.Generator().manual_seed(0))
    writes = model.can_generate()
    extra = {"use_cache": False} if writes else {}
    want = model(input_ids=ids, **extra)[0]
    subjects = {"pruned": compiled(model), "plain": compiled(copy.deepcopy(model), disable=("prune_dead",))}
    for name, subject in subjects.items():
        got = subject(input_ids=ids, **extra)[0]
        relative = ((got - want).norm() / want.norm()).item()
        print(f"encode {name}: relative difference from eager {relative:.2e}", flush=True)
    for (before, after), count in sizes(model).items():
        print(f"{count} matrices {list(before)} -> {list(after)}", flush=True)
    show("encode", in_turns({n: lambda s=s: s(input_ids=ids, **extra) for n, s in subjects.items()}, chosen.turns))
    if writes:
        decode(model, ids, chosen.turns)


def decode(model: Any, ids: torch.Tensor, turns: int) -> None:
    """One token after 256 others, from a cache made by eager."""
    torch.compiler.reset()
    subjects = {
        "pruned": compiled(model, dynamic=True),
        "plain": compiled(copy.deepcopy(model), disable=("prune_dead",), dynamic=True),
    }
    first = model(input_ids=ids, use_cache=True)
    want = model(input_ids=ids[:, :1], past_key_values=copy.deepcopy(first.past_key_values)).logits
    states = {name: copy.deepcopy(first.past_key_values) for name in subjects}
    for name, subject in subjects.items():
        got = subject(input_ids=ids[:, :1], past_key_values=states[name]).logits
        print(f"decode {name}: relative difference from eager {((got - want).norm() / want.norm()).item():.2e}")
    for name, subject in subjects.items():
        subject(input_ids=ids[:, :1], past_key_values=states[name])
    calls = {n: lambda n=n, s=s: s(input_ids=ids[:, :1], past_key_values=states[n]) for n, s in subjects.items()}
    show("decode", in_turns(calls, turns))


if __name__ == "__main__":
    main()
