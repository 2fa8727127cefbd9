"""What a user may ask of lossy pruning: frozen dataclasses (`graphopt.PruneHeads`, ...), validated before any work."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from graphopt.errors import OptionError
from graphopt.quantize_options import Calibrated

CHOICES = ("gradient", "greedy", "norm", "random")


@dataclasses.dataclass(frozen=True)
class PruneHeads:
    """Which attention heads, and FFN channels, the compiled program leaves out. The answers change.

    max_error: certified. In each layer as many heads go as an upper bound allows that holds for every input: the
        largest root mean square, over its channels, of what the attention's output of a token changes by.
    keep: measured. The share of all heads of a graph that stay, between 0 and 1. keep_channels: that of FFN channels.
    choice: what tells them apart: "gradient" (of the loss, by `calibration=graphopt.head_importance(...)`), "greedy"
        (least error of each layer's output, by `calibration=graphopt.calibrate(...)`), "norm" (of the weights that read
        them), "random" (fixed by name).
    calibration: what the choice needs.
    """

    max_error: float | None = None
    keep: float | None = None
    keep_channels: float | None = None
    choice: str = "gradient"
    calibration: Calibrated | None = None

    def __post_init__(self) -> None:
        if (self.max_error is None) == (self.keep is None and self.keep_channels is None):
            raise OptionError(
                "PruneHeads(...) takes max_error (certified), or keep and keep_channels (measured); got"
                f" max_error={self.max_error!r}, keep={self.keep!r}, keep_channels={self.keep_channels!r}"
            )
        if self.max_error is not None and not (_is_number(self.max_error) and self.max_error > 0):
            raise OptionError(f"PruneHeads(max_error={self.max_error!r}) must be a number greater than 0")
        for name in ("keep", "keep_channels"):
            value = getattr(self, name)
            if value is not None and not (_is_number(value) and 0 < value <= 1):
                raise OptionError(f"PruneHeads({name}={value!r}) must be a number greater than 0, at most 1")
        if self.choice not in CHOICES:
            raise OptionError(f"PruneHeads(choice={self.choice!r}): allowed are {', '.join(map(repr, CHOICES))}")
        needs = self.max_error is None and self.choice in ("gradient", "greedy")
        if needs and not isinstance(self.calibration, Calibrated):
            makes = "head_importance" if self.choice == "gradient" else "calibrate"
            raise OptionError(f"PruneHeads(choice={self.choice!r}) needs calibration=graphopt.{makes}(model, inputs)")

    @classmethod
    def parse(cls, given: object) -> PruneHeads | None:
        """A `PruneHeads` from the value of the option: None or a `PruneHeads`."""
        if given is None or isinstance(given, cls):
            return given
        raise OptionError(
            f"option 'prune_heads' must be a graphopt.PruneHeads or None, got {given!r} ({type(given).__name__})"
        )


@dataclasses.dataclass(frozen=True)
class Sparsify:
    """Weights of linears with two zeros in each four neighbours of a row. The answers change.

    pattern: "2:4", what GPUs have kernels for. choice: which two become zero: "magnitude" (the smaller ones) or "wanda"
        (the smaller products of magnitude and norm of the input channel, by `calibration=graphopt.calibrate(...)`).
    modules: regular expression; only weights whose dotted name ("model.layers.0.mlp.up_proj.weight") it finds. skip:
        regular expression; weights whose name it finds stay as they are.
    """

    pattern: str = "2:4"
    choice: str = "magnitude"
    calibration: Calibrated | None = None
    modules: str | None = None
    skip: str | None = "lm_head|embed"

    def __post_init__(self) -> None:
        if self.pattern != "2:4":
            raise OptionError(f"Sparsify(pattern={self.pattern!r}): allowed is '2:4'")
        if self.choice not in ("magnitude", "wanda"):
            raise OptionError(f"Sparsify(choice={self.choice!r}): allowed are 'magnitude', 'wanda'")
        if (self.choice == "wanda") != isinstance(self.calibration, Calibrated):
            raise OptionError(
                "Sparsify(choice='wanda', calibration=graphopt.calibrate(model, inputs)) takes both or neither;"
                f" got choice={self.choice!r}, calibration={self.calibration!r}"
            )
        for name in ("modules", "skip"):
            given = getattr(self, name)
            try:
                re.compile(given or "")
            except (re.error, TypeError) as error:
                raise OptionError(f"Sparsify({name}={given!r}) is no regular expression: {error}") from None

    def why_not(self, name: str) -> str:
        """Why the user leaves the weight of this name as it is, or ""."""
        if self.modules is not None and not re.search(self.modules, name):
            return f"modules={self.modules!r} does not find it"
        return f"skip={self.skip!r} finds it" if self.skip and re.search(self.skip, name) else ""


@dataclasses.dataclass(frozen=True)
class PruneLayers:
    """Which layers the compiled program leaves out as a whole. The answers change.

    keep: the share of the layers that stay, between 0 and 1; those go without which the answer changes least, by
        `calibration=graphopt.layer_importance(model, inputs)`. drop: instead, the dotted names of layers
        ("model.layers.3").
    """

    keep: float | None = None
    calibration: Calibrated | None = None
    drop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.drop, tuple) or not all(isinstance(name, str) for name in self.drop):
            raise OptionError(f"PruneLayers(drop={self.drop!r}) must be a tuple of names of layers (str)")
        if (self.keep is None) != bool(self.drop):
            raise OptionError(
                f"PruneLayers(...) takes keep with a calibration, or drop; got keep={self.keep!r}, drop={self.drop!r}"
            )
        if self.keep is not None and not (_is_number(self.keep) and 0 < self.keep <= 1):
            raise OptionError(f"PruneLayers(keep={self.keep!r}) must be a number greater than 0, at most 1")
        if (self.keep is not None) != isinstance(self.calibration, Calibrated):
            raise OptionError("PruneLayers(keep=...) needs calibration=graphopt.layer_importance(model, inputs)")


Pruning = Sparsify | PruneLayers


def parse_prune(given: object) -> tuple[Pruning, ...]:
    """What the option `prune` asks for: "2:4", a `Sparsify`, a `PruneLayers`, several of them in a tuple, or None."""
    parts = given if isinstance(given, (list, tuple)) else () if given is None else (given,)
    found = tuple(Sparsify() if part == "2:4" else part for part in parts)
    if any(not isinstance(part, Pruning) for part in found) or len({type(part) for part in found}) != len(found):
        raise OptionError(
            "option 'prune' must be '2:4', a graphopt.Sparsify, a graphopt.PruneLayers, a tuple of one of each,"
            f" or None, got {given!r} ({type(given).__name__})"
        )
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
