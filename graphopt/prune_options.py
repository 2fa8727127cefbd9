"""What a user may ask of lossy pruning: the frozen dataclass `graphopt.PruneHeads`, validated before any work."""

from __future__ import annotations

import dataclasses
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


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
