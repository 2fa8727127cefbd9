"""`python -m graphopt.commands.continuations`: memory of KV caches that continue one prompt.

A prompt is read once; its cache is repeated for so many continuations (`batch_repeat_interleave`), which then go on by
themselves for some tokens. Bytes of keys and values are counted, not estimated: what caches share counts once, room
for growth counts in full.
"""

from __future__ import annotations

import json as json_format
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from graphopt.commands.models import DTYPES, find_model, load_model
from graphopt.commands.progress import Step, steps
from graphopt.errors import OptionError
from graphopt.runtime.kv_tensor import held_bytes

_WAYS: dict[str, dict[str, Any] | None] = {
    "eager, DynamicCache": None,
    "graphopt": {},
    "graphopt, paged": {"kv_cache": "paged"},
}


def measure(model: str, dtype: str, prompt: int, continuations: int, tokens: int, step: Step) -> dict[str, int]:
    """Bytes of keys and values by way of running the model. Raises OptionError before any work."""
    if dtype not in DTYPES:
        raise OptionError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if min(prompt, continuations, tokens) < 1:
        raise OptionError(f"prompt, continuations and tokens must be at least 1, got {prompt, continuations, tokens}")
    source = find_model(model)
    with step(f"load {source.name}"):
        loaded = load_model(source, dtype).model
    return {
        name: _held(loaded, options, (prompt, continuations, tokens), step, name) for name, options in _WAYS.items()
    }


@torch.no_grad()
def _held(model: Any, options: dict[str, Any] | None, counts: tuple[int, int, int], step: Step, name: str) -> int:
    from transformers import DynamicCache

    prompt, continuations, tokens = counts
    torch.compiler.reset()
    torch.manual_seed(0)
    run = model if options is None else torch.compile(model, backend="graphopt", options=options)
    given = torch.randint(0, model.config.vocab_size, (1, prompt))
    with step(f"{name}: {prompt} tokens"):
        cache = run(given, past_key_values=DynamicCache(config=model.config), logits_to_keep=1).past_key_values
    cache.batch_repeat_interleave(continuations)
    with step(f"{name}: {continuations} continuations of {tokens} tokens"):
        for _ in range(tokens):
            given = torch.randint(0, model.config.vocab_size, (continuations, 1))
            cache = run(given, past_key_values=cache).past_key_values
    return held_bytes(tensor for layer in cache.layers for tensor in (layer.keys, layer.values))


def table(held: dict[str, int], title: str) -> Table:
    """A row for each way; its bytes against the first's."""
    shown = Table(title=title)
    for heading in ("", "KV cache, MiB", "of the first"):
        shown.add_column(heading, justify="right" if heading else "left")
    first = next(iter(held.values()))
    for name, count in held.items():
        shown.add_row(name, f"{count / 2**20:.1f}", f"{count / first:.3f}")
    return shown


def main(
    model: Annotated[str, typer.Option(help="As in `graphopt bench`.")] = "smollm2",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    prompt: Annotated[int, typer.Option(help="Tokens of the prompt.")] = 1000,
    continuations: Annotated[int, typer.Option(help="How often the prompt is continued.")] = 16,
    tokens: Annotated[int, typer.Option(help="Tokens of each continuation.")] = 32,
    json: Annotated[Path | None, typer.Option(help="Write the bytes to this file.")] = None,
) -> None:
    """Measure what KV caches hold that continue one prompt."""
    console = Console()
    held = measure(model, dtype, prompt, continuations, tokens, steps(console))
    if json is not None:
        asked = {"model": model, "dtype": dtype, "prompt": prompt, "continuations": continuations, "tokens": tokens}
        json.write_text(json_format.dumps({**asked, "bytes": held}, indent=2) + "\n")
    console.print(table(held, f"{continuations} continuations of {prompt} tokens by {tokens}: {model}, {dtype}"))


if __name__ == "__main__":
    typer.run(main)
