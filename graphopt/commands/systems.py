"""The systems that a benchmark compares: how each compiles a model, with which cache and environment.

eager                     the model as it is
inductor                  torch.compile(model)
inductor-static           torch.compile(model) with a static cache
inductor-best             static cache, mode max-autotune-no-cudagraphs, weights frozen into the compiled code
torchao-int8              torchao's int8 weight-only linears under the settings of inductor-best
graphopt[:OPTION=VALUE]   this backend; more options follow after further colons
"""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
from typing import Any

from graphopt.commands.models import NotInstalledError
from graphopt.errors import OptionError, nearest
from graphopt.options import Options

TORCHAO_INSTALL = "python -m pip install torchao"


@dataclasses.dataclass(frozen=True)
class System:
    """One way to run a model. name: as the user wrote it. arguments: for `Module.compile`, None for eager."""

    name: str
    arguments: dict[str, Any] | None
    static_cache: bool = False
    int8_weights: bool = False
    environment: dict[str, str] = dataclasses.field(default_factory=dict)

    def prepare(self, model: Any) -> None:
        """Compile `model` in place (lazily: the work is done by its first calls)."""
        if self.int8_weights:
            from torchao.quantization import Int8WeightOnlyConfig, quantize_

            quantize_(model, Int8WeightOnlyConfig())
        if self.arguments is not None:
            model.compile(**self.arguments)


_FROZEN = {"TORCHINDUCTOR_FREEZING": "1"}
_BEST = {"mode": "max-autotune-no-cudagraphs"}
KNOWN = {
    "eager": System("eager", None),
    "inductor": System("inductor", {}),
    "inductor-static": System("inductor-static", {}, static_cache=True),
    "inductor-best": System("inductor-best", _BEST, static_cache=True, environment=_FROZEN),
    "torchao-int8": System("torchao-int8", _BEST, static_cache=True, int8_weights=True, environment=_FROZEN),
    "graphopt": System("graphopt", {"backend": "graphopt"}),
}


def parse_systems(text: str) -> list[System]:
    """Systems out of a list with commas. Everything wrong in it is an error now, before any work."""
    systems = [_parse(name.strip()) for name in text.split(",") if name.strip()]
    if not systems:
        raise OptionError(f"no system given; known are {', '.join(KNOWN)}")
    repeated = {system.name for system in systems if [other.name for other in systems].count(system.name) > 1}
    if repeated:
        raise OptionError(f"system {sorted(repeated)[0]!r} is given twice")
    return systems


def _parse(name: str) -> System:
    kind, *settings = name.split(":")
    if kind not in KNOWN:
        raise OptionError(f"unknown system {kind!r}{nearest(kind, KNOWN)}; known are {', '.join(KNOWN)}")
    system = KNOWN[kind]
    if system.int8_weights and importlib.util.find_spec("torchao") is None:
        raise NotInstalledError(
            f"system {kind!r} needs torchao, which is not installed. Install it with:\n  {TORCHAO_INSTALL}"
        )
    if not settings:
        return system
    if kind != "graphopt":
        raise OptionError(f"system {kind!r} takes no options; got {name!r}")
    options = dict(_setting(setting, name) for setting in settings)
    Options.parse(None, options)
    return System(name, {"backend": "graphopt", "options": options})


def _setting(text: str, name: str) -> tuple[str, Any]:
    option, equals, value = text.partition("=")
    if not equals:
        raise OptionError(f"system {name!r}: write options as OPTION=VALUE, got {text!r}")
    try:
        return option, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return option, value  # a plain word is a string
