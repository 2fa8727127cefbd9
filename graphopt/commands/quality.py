"""`graphopt quality`: what quantisation costs on a text, as perplexity and as KL divergence from the original
model."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from graphopt.commands.models import DTYPES, find_model, load_model
from graphopt.commands.progress import steps
from graphopt.errors import OptionError

if TYPE_CHECKING:
    import torch

    from graphopt.quantization.calibration import Calibration
    from graphopt.quantization.plan import Plan
    from graphopt.quantize_options import Quantize


@dataclasses.dataclass(frozen=True)
class Quality:
    """Two models on one text of `tokens` predicted tokens.

    kl: mean over the tokens of KL(original || quantised) in nats. same_choice: share of tokens whose most
        likely
    continuation is the same. plan: scheme, bytes and errors of each weight.
    """

    perplexity_before: float
    perplexity_after: float
    kl: float
    same_choice: float
    tokens: int
    plan: Plan

    def to_json(self) -> str:
        """All figures as JSON text; the calibration is named by its digest."""
        return json.dumps(dataclasses.asdict(self), indent=1, default=str)


def measure(model: Any, ids: torch.Tensor, quantize: Quantize, target: str = "auto") -> Quality:
    """Run a causal language model and its quantised compiled form on token ids [texts, length]."""
    import torch

    from graphopt.backend import graphopt as backend
    from graphopt.quantization.plan import plan

    chosen = plan(model, quantize)
    torch.compiler.reset()  # Dynamo compiles a function eight times at most, then runs it as it is
    options: dict[str, Any] = {"quantize": chosen.quantize, "target": target}
    compiled = torch.compile(model, backend=backend, options=options)
    losses, other_losses, divergence, same = 0.0, 0.0, 0.0, 0
    with torch.no_grad():
        for text in ids:
            # One text at a time: the logits of a whole vocabulary are the largest tensors here.
            before = _log_probabilities(model, text)
            after = _log_probabilities(compiled, text)
            wanted = text[1:, None]
            losses -= before.gather(-1, wanted).sum().item()
            other_losses -= after.gather(-1, wanted).sum().item()
            divergence += (before.exp() * (before - after)).sum().item()
            same += int((before.argmax(-1) == after.argmax(-1)).sum())
    tokens = ids.shape[0] * (ids.shape[1] - 1)
    return Quality(
        math.exp(losses / tokens), math.exp(other_losses / tokens), divergence / tokens, same / tokens, tokens, chosen
    )


def _log_probabilities(model: Any, text: torch.Tensor) -> torch.Tensor:
    """Log-probabilities [length - 1, vocabulary] of each next token, in float32."""
    import torch

    return torch.log_softmax(model(input_ids=text[None], use_cache=False).logits[0, :-1].float(), -1)


def tokens_of(tokenizer: Any, path: Path, length: int, limit: int) -> torch.Tensor:
    """The first `limit` tokens of a text file as rows [texts, length]. Raises OptionError if it is too
    short."""
    import torch

    if not path.is_file():
        raise OptionError(f"text {str(path)!r}: there is no such file")
    ids = tokenizer(path.read_text(errors="replace"), add_special_tokens=False)["input_ids"][:limit]
    rows = len(ids) // length
    if not rows:
        raise OptionError(f"text {str(path)!r} has {len(ids)} tokens: fewer than one piece of {length}")
    return torch.tensor(ids[: rows * length]).reshape(rows, length)


def asked(schemes: Sequence[str], group: int | None, rounding: str, max_error: str) -> list[dict[str, Any]]:
    """The arguments of each `Quantize` that a command line asks for: "auto" once for each budget in `max_error`."""
    try:
        budgets: list[float | None] = [float(budget) for budget in max_error.split(",") if budget.strip()]
    except ValueError as error:
        raise OptionError(f"max-error {max_error!r} must be numbers between 0 and 1, with commas") from error
    found: list[dict[str, Any]] = []
    for scheme in schemes:
        if scheme == "auto":
            found += [{"scheme": scheme, "rounding": rounding, "max_error": each} for each in budgets or [None]]
        else:
            found.append({"scheme": scheme, "group_size": group, "rounding": rounding})
    return found


def run(
    name: str,
    text: Path,
    asked: Sequence[dict[str, Any]],
    dtype: str,
    length: int,
    limit: int,
    calibration: Path | None,
    console: Console,
) -> list[Quality]:
    """Measure each of the asked `Quantize` (given by its arguments) on the text. Wrong options raise before
    any work.

    calibration: a text file whose first `limit` tokens are the inputs for the roundings that need some.
    """
    if dtype not in DTYPES:
        raise OptionError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if length < 2:
        raise OptionError(f"length must be 2 or more, got {length}")
    from graphopt.quantization.calibration import calibrate
    from graphopt.quantize_options import Quantize

    # A stand-in shows what is wrong with the options before a model is loaded.
    for arguments in asked:
        Quantize(**arguments, calibration=_Pending() if calibration is not None else None)
    source = find_model(name)
    step = steps(Console(stderr=True) if not console.is_terminal else console)
    with step(f"load {source.name}"):
        loaded = load_model(source, dtype)
    if loaded.tokenizer is None or not loaded.generates:
        raise OptionError(f"model {name!r} has no tokenizer or predicts no text: perplexity has no meaning for it")
    ids = tokens_of(loaded.tokenizer, text, length, limit)
    inputs: Calibration | None = None
    if calibration is not None:
        rows = tokens_of(loaded.tokenizer, calibration, length, limit)
        with step(f"calibrate on {rows.numel()} tokens"):
            inputs = calibrate(loaded.model, [{"input_ids": row[None], "use_cache": False} for row in rows])
    found = []
    for arguments in asked:
        with step(f"measure {arguments['scheme']} on {ids.numel()} tokens"):
            found.append(measure(loaded.model, ids, Quantize(**arguments, calibration=inputs)))
    return found


@dataclasses.dataclass(frozen=True)
class _Pending:
    """Stands for a calibration that is still to be made."""

    digest: str = "pending"


def table(found: Sequence[Quality]) -> Table:
    """One row for each measured scheme."""
    shown = Table("scheme", "rounding", "MB", "perplexity", "change", "KL", "same choice", title=_title(found))
    for quality in found:
        quantize = quality.plan.quantize
        change = quality.perplexity_after / quality.perplexity_before - 1
        shown.add_row(
            _name(quality),
            quantize.rounding,
            f"{quality.plan.bytes_after / 1e6:.1f}",
            f"{quality.perplexity_after:.3f}",
            f"{change:+.2%}",
            f"{quality.kl:.5f}",
            f"{quality.same_choice:.1%}",
        )
    return shown


def plot(found: Sequence[Quality], path: Path) -> None:
    """Draw KL divergence against the bytes of the weights; the plans of "auto" are joined by a line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(6, 4))
    plans = sorted((one.plan.bytes_after / 1e6, one.kl) for one in found if one.plan.quantize.scheme == "auto")
    if plans:
        axis.plot(*zip(*plans, strict=True), marker="o", color="#e45756", label="auto")
        axis.legend()
    for one in found:
        place = one.plan.bytes_after / 1e6, one.kl
        if one.plan.quantize.scheme == "auto":
            label = f"{one.plan.quantize.max_error:g}"
        else:
            axis.scatter(*place, color="#4c78a8")
            label = _name(one)
        axis.annotate(label, place, xytext=(5, 3), textcoords="offset points", fontsize=8)
    axis.margins(x=0.15, y=0.1)
    axis.set_yscale("log")
    axis.set_xlabel("MB of weights")
    axis.set_ylabel("KL divergence from the original, nats a token")
    axis.set_title(_title(found), fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _name(quality: Quality) -> str:
    from graphopt.quantization.schemes import canonical

    quantize = quality.plan.quantize
    if quantize.scheme == "auto":
        return f"auto {quantize.max_error:g}"
    return canonical(quantize.scheme, quantize.group_size, quantize.symmetric)


def _title(found: Sequence[Quality]) -> str:
    first = found[0]
    return (
        f"original: perplexity {first.perplexity_before:.3f} on {first.tokens} tokens,"
        f" {first.plan.bytes_before / 1e6:.1f} MB in {len(first.plan.layers)} weights"
    )
