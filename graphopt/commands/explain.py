"""`graphopt explain`: compile a model for one text and report what was done to it."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from graphopt.commands.models import DTYPES, find_model, load_model
from graphopt.commands.progress import steps
from graphopt.errors import OptionError
from graphopt.report import Report


def explain_model(
    name: str, dtype: str, length: int, console: Console, roofline: str = "auto", options: dict[str, Any] | None = None
) -> Report:
    """The report of `graphopt.explain` on the named model, run without gradients on `length` tokens."""
    if dtype not in DTYPES:
        raise OptionError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    source = find_model(name)
    step = steps(Console(stderr=True) if not console.is_terminal else console)
    with step(f"load {source.name}"):
        import torch

        import graphopt

        loaded = load_model(source, dtype)
    ids = torch.arange(length)[None] % loaded.model.config.vocab_size
    with step("compile"), torch.no_grad():
        return graphopt.explain(
            loaded.model, input_ids=ids, attention_mask=torch.ones_like(ids), roofline=roofline, options=options
        )
