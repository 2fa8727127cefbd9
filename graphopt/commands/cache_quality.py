"""`python -m graphopt.commands.cache_quality`: what the forms of KV caches cost in quality, and what they hold.

Each text is read through the cache, a few tokens at a time, so that nearly every prediction is made from cached rows in
their form. The predictions are compared with those of eager over a DynamicCache. Bytes of keys and values are counted
after every step; the most is set against an exact cache of the whole text.
"""

from __future__ import annotations

import dataclasses
import json as json_format
import math
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from graphopt.commands.models import DTYPES, find_model, load_model
from graphopt.commands.progress import Step, steps
from graphopt.commands.quality import tokens_of
from graphopt.errors import OptionError
from graphopt.options import KV_DTYPES
from graphopt.runtime.kv_tensor import held_bytes

_FORMS = ",".join(("exact", *KV_DTYPES))


@dataclasses.dataclass(frozen=True)
class CacheQuality:
    """One form of caches on texts of `tokens` predicted tokens; eager's figures have the form "eager".

    kl: mean of KL(eager || this) in nats a token. same_choice: share of tokens whose most likely continuation is the
    same. held: the most bytes that the caches of one text held. exact: bytes of just the rows of the whole text.
    """

    form: str
    perplexity: float
    kl: float
    same_choice: float
    tokens: int
    held: int
    exact: int


def measure(
    model: str, dtype: str, text: Path, forms: list[str], length: int, limit: int, at_once: int, step: Step
) -> list[CacheQuality]:
    """Eager's figures and those of each form. Raises OptionError before any work."""
    if dtype not in DTYPES:
        raise OptionError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    wrong = [form for form in forms if form not in ("exact", "paged", *KV_DTYPES)]
    if wrong:
        raise OptionError(f"forms must be of exact, paged, {', '.join(KV_DTYPES)}, got {wrong[0]!r}")
    if not 1 <= at_once < length:
        raise OptionError(f"at-once must be at least 1 and less than length, got {at_once} and {length}")
    source = find_model(model)
    with step(f"load {source.name}"):
        loaded = load_model(source, dtype)
    if loaded.tokenizer is None or not loaded.generates:
        raise OptionError(f"model {model!r} has no tokenizer or predicts no text: perplexity has no meaning for it")
    ids = tokens_of(loaded.tokenizer, text, length, limit)
    with step(f"eager on {ids.numel()} tokens"):
        read = [_read(loaded.model, row, at_once) for row in ids]
    expected, held = [one[0] for one in read], max(one[1] for one in read)
    exact = max(one[2] for one in read)
    found = [_compared("eager", ids, expected, expected, held, exact)]
    for form in forms:
        torch.compiler.reset()
        run = torch.compile(loaded.model, backend="graphopt", options=_options(form))
        with step(f"{form} on {ids.numel()} tokens"):
            read = [_read(run, row, at_once) for row in ids]
        found.append(_compared(form, ids, expected, [one[0] for one in read], max(one[1] for one in read), exact))
    return found


def _options(form: str) -> dict[str, Any]:
    if form == "exact":
        return {}
    return {"kv_cache": form} if form == "paged" else {"kv_dtype": form}


@torch.no_grad()
def _read(run: Any, text: torch.Tensor, at_once: int) -> tuple[torch.Tensor, int, int]:
    """Log-probabilities [length - 1, vocabulary] of the next tokens, the most bytes held, and the bytes of all rows."""
    from transformers import DynamicCache

    cache, parts, most = DynamicCache(config=run.config), [], 0
    for given in text[:-1].split(at_once):
        output = run(input_ids=given[None], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        parts.append(torch.log_softmax(output.logits[0].float(), -1))
        tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
        most = max(most, held_bytes(tensors))
    return torch.cat(parts), most, sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _compared(
    form: str, ids: torch.Tensor, expected: list[torch.Tensor], got: list[torch.Tensor], held: int, exact: int
) -> CacheQuality:
    loss, divergence, same = 0.0, 0.0, 0
    for text, before, after in zip(ids, expected, got, strict=True):
        loss -= after.gather(-1, text[1:, None]).sum().item()
        same += int((before.argmax(-1) == after.argmax(-1)).sum())
        for one, other in zip(before.split(256), after.split(256), strict=True):
            divergence += (one.exp() * (one - other)).sum().item()
    tokens = ids.shape[0] * (ids.shape[1] - 1)
    return CacheQuality(form, math.exp(loss / tokens), divergence / tokens, same / tokens, tokens, held, exact)


def table(found: list[CacheQuality], title: str) -> Table:
    """A row for each form."""
    shown = Table("cache", "perplexity", "change", "KL", "same choice", "MiB", "of the rows", title=title)
    for one in found:
        shown.add_row(
            one.form,
            f"{one.perplexity:.3f}",
            f"{one.perplexity / found[0].perplexity - 1:+.2%}",
            f"{one.kl:.5f}",
            f"{one.same_choice:.1%}",
            f"{one.held / 2**20:.1f}",
            f"{one.held / one.exact:.3f}",
        )
    return shown


def main(
    text: Annotated[Path, typer.Option(help="A text file; what the model is asked to predict.")],
    model: Annotated[str, typer.Option(help="As in `graphopt bench`.")] = "smollm2",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "bfloat16",
    forms: Annotated[str, typer.Option(help="exact, paged, int8, fp8, int4; with commas.")] = _FORMS,
    length: Annotated[int, typer.Option(help="Tokens of each text, read through one cache.")] = 2048,
    tokens: Annotated[int, typer.Option(help="Tokens of the text that are used at most.")] = 4096,
    at_once: Annotated[int, typer.Option(help="Tokens that are read in one step.")] = 16,
    json: Annotated[Path | None, typer.Option(help="Write all figures to this file.")] = None,
) -> None:
    """Measure the quality and the memory of the forms of KV caches."""
    console = Console()
    found = measure(model, dtype, text, forms.split(","), length, tokens, at_once, steps(console))
    if json is not None:
        entries = [dataclasses.asdict(one) for one in found]
        json.write_text(json_format.dumps({"model": model, "dtype": dtype, "forms": entries}, indent=2) + "\n")
    console.print(table(found, f"{found[0].tokens} tokens, {at_once} at a time: {model}, {dtype}"))


if __name__ == "__main__":
    typer.run(main)
