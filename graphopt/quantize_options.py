"""What a user may ask of weight quantisation: the frozen dataclass `graphopt.Quantize`, validated before any
work.

`options={"quantize": "int4"}` is short for `options={"quantize": graphopt.Quantize("int4")}`.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any, Protocol, runtime_checkable

from graphopt.errors import OptionError, nearest

ROUNDINGS = ("nearest", "gptq", "awq", "smoothquant")
SCHEMES = ("int8", "int4", "q4_k", "fp8", "nf4", "mxfp4", "int8-dynamic", "fp8-dynamic")
GROUP_SIZES = {"int8": (0, 32, 64, 128), "int4": (32, 64, 128), "nf4": (32, 64, 128)}
DEFAULT_GROUP_SIZE = {"int8": 64, "int4": 32, "nf4": 64}


@runtime_checkable
class Calibrated(Protocol):
    """What options need to know of a `graphopt.Calibration`: its digest tells two of them apart."""

    @property
    def digest(self) -> str: ...


@dataclasses.dataclass(frozen=True)
class Quantize:
    """How weights are stored in the compiled program. The answers change: quantisation is never on by itself.

    scheme: "int8", "int4" and "nf4" (one scale for each group of a row), "fp8" (e4m3, one scale for each row), "mxfp4"
        (e2m1 in groups of 32 with a power of two as scale), "q4_k" (GGUF's: four bits in groups of 32, their scales and
        minimums in six bits; 4.6 bits to a weight, where "int4" takes 5); "int8-dynamic" and "fp8-dynamic" have one
        scale for each row and round their inputs too, with one scale for each token.
    group_size: 32, 64 or 128 for "int4" (default 32), "nf4" (default 64) and "int8" (default 64; 0 means the whole
        row, which has cost SmolLM2 five times as much perplexity for 3 % fewer bytes); None for the others.
    symmetric: "int4" only: codes stand for multiples of the scale around 0, else for steps above the group's
        minimum.
    modules: regular expression; only weights whose dotted name ("model.layers.0.mlp.up_proj.weight") it
        finds.
    skip: regular expression; weights whose name it finds stay as they are.
    embeddings: whether tables that are only looked up in are quantised too. A table that is also the weight
        of a linear (tied) has one pack for both uses.
    lm_head: the linear that scores the vocabulary. True gives it the scheme, but "int8" where that has four bits
        (four cost SmolLM2 7 % of perplexity in the head alone); a scheme's name gives it that; False leaves it.
    calibration: what `graphopt.calibrate` returned. rounding: "nearest", or, with a calibration, "gptq",
        "awq" or
        "smoothquant" (for the dynamic schemes). Weights that the calibration has not seen get the nearest
        codes.
    max_error: for scheme "auto", which gives each weight the scheme that needs the fewest bytes in all while
        the root mean square of the relative errors of the layers' outputs (without a calibration: of the
        weights) stays below it; sensitive weights stay as they are.
    assigned: scheme by weight name, as `graphopt.plan` chose them ("" leaves a weight as it is).
    reasons: for reports, why weights that are assigned "" stay as they are, by name; `graphopt.load_gguf` gives them.
    """

    scheme: str
    group_size: int | None = None
    symmetric: bool = False
    modules: str | None = None
    skip: str | None = None
    embeddings: bool = False
    lm_head: bool | str = True
    calibration: Calibrated | None = None
    rounding: str = "nearest"
    max_error: float | None = None
    assigned: tuple[tuple[str, str], ...] = ()
    reasons: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        _one_of("scheme", self.scheme, (*SCHEMES, "auto"))
        if self.group_size is not None:
            allowed = GROUP_SIZES.get(self.scheme, ())
            if not allowed:
                raise OptionError(
                    f"Quantize(group_size={self.group_size!r}): scheme {self.scheme!r} has no group size; leave it out"
                )
            _one_of("group_size", self.group_size, allowed)
        for name in ("symmetric", "embeddings"):
            _boolean(name, getattr(self, name))
        if self.symmetric and self.scheme != "int4":
            raise OptionError(f"Quantize(symmetric=True) is for scheme 'int4', not {self.scheme!r}")
        for name in ("modules", "skip"):
            _pattern(name, getattr(self, name))
        if not isinstance(self.lm_head, bool):
            _one_of("lm_head", self.lm_head, SCHEMES, "True, False, ")
        if self.calibration is not None and not isinstance(self.calibration, Calibrated):
            raise OptionError(
                f"Quantize(calibration={self.calibration!r}) must be what graphopt.calibrate(...) returns"
            )
        _one_of("rounding", self.rounding, ROUNDINGS)
        if self.rounding != "nearest" and self.calibration is None:
            raise OptionError(
                f"Quantize(rounding={self.rounding!r}) needs calibration=graphopt.calibrate(model, inputs)"
            )
        if self.rounding == "smoothquant" and not self.scheme.endswith("-dynamic"):
            raise OptionError(
                f"Quantize(rounding='smoothquant') is for schemes that round the input too, not {self.scheme!r}"
            )
        if (self.scheme == "auto") != (self.max_error is not None):
            raise OptionError(
                "Quantize('auto', max_error=...) takes both or neither; got"
                f" scheme={self.scheme!r}, max_error={self.max_error!r}"
            )
        if self.max_error is not None and not (isinstance(self.max_error, (int, float)) and 0 < self.max_error < 1):
            raise OptionError(f"Quantize(max_error={self.max_error!r}) must be a number between 0 and 1")

    @classmethod
    def parse(cls, given: object) -> Quantize | None:
        """A `Quantize` from the value of the option: None, a scheme's name, or a `Quantize`."""
        if given is None or isinstance(given, cls):
            return given
        if isinstance(given, str):
            return cls(given)
        raise OptionError(
            f"option 'quantize' must be one of {', '.join(map(repr, SCHEMES))}, a graphopt.Quantize, or None,"
            f" got {given!r} ({type(given).__name__})"
        )

    def wants(self, name: str) -> str:
        """Why the weight of that dotted name is left out by the user's patterns; "" if it is not."""
        if self.modules is not None and not re.search(self.modules, name):
            return f"modules={self.modules!r} does not name it"
        if self.skip is not None and re.search(self.skip, name):
            return f"skip={self.skip!r} names it"
        return ""


def depends_on_values(given: object) -> bool:
    """Whether the option `quantize` lets the weights' values decide about schemes, so that no other weights
    may reuse it."""
    return isinstance(given, Quantize) and given.scheme == "auto" and not given.assigned


def _one_of(name: str, given: object, allowed: tuple[Any, ...], before: str = "") -> None:
    # `in` alone would let True pass for 1.
    if not any(type(given) is type(value) and given == value for value in allowed):
        hint = nearest(given, allowed) if isinstance(given, str) else ""
        raise OptionError(f"Quantize({name}={given!r}){hint}: allowed are {before}{', '.join(map(repr, allowed))}")


def _boolean(name: str, given: object) -> None:
    if not isinstance(given, bool):
        raise OptionError(f"Quantize({name}={given!r}) must be True or False")


def _pattern(name: str, given: object) -> None:
    if given is None:
        return
    if not isinstance(given, str):
        raise OptionError(f"Quantize({name}={given!r}) must be a regular expression (str) or None")
    try:
        re.compile(given)
    except re.error as error:
        raise OptionError(f"Quantize({name}={given!r}) is not a regular expression: {error}") from None
