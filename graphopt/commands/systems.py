"""The systems that a benchmark compares: how each compiles a model, with which cache and environment.

eager                     the model as it is
inductor                  torch.compile(model)
inductor-static           torch.compile(model) with a static cache
inductor-best             static cache, mode max-autotune-no-cudagraphs, weights frozen into the compiled code
torchao-int8              torchao's int8 weight-only linears under the settings of inductor-best
llama.cpp[:KIND]          llama.cpp on the model's own .gguf file, or on its weights in blocks of KIND (Q8_0, Q4_0, ...)
graphopt[:OPTION=VALUE]   this backend; more options follow after further colons
graphopt-gguf             this backend, with the weights in the blocks of the model's own .gguf file
"""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
from collections.abc import Callable
from typing import Any

from graphopt.commands.models import ModelSource, NotInstalledError
from graphopt.errors import OptionError, nearest
from graphopt.options import Options

INSTALL = {
    "torchao": "python -m pip install torchao",
    "llama_cpp": "python -m pip install llama-cpp-python",
}
WRITTEN = ("F16", "BF16", "Q8_0", "Q4_0", "Q4_1")  # blocks in which llama.cpp can have a model's weights


@dataclasses.dataclass(frozen=True)
class System:
    """One way to run a model.

    name: as the user wrote it. arguments: for `Module.compile`, None for what is not compiled. weights: what becomes of
    them first: a key of `_WEIGHTS` ("file": those of the model's .gguf file are taken), or the kind of blocks that
    they are written in for llama.cpp. library: the package that it needs.
    """

    name: str
    arguments: dict[str, Any] | None
    static_cache: bool = False
    weights: str = ""
    library: str = ""
    environment: dict[str, str] = dataclasses.field(default_factory=dict)

    def prepared(self, model: Any, source: ModelSource) -> Any:
        """What runs as `model`: itself, compiled in place (lazily: its first calls do the work), or its stand-in."""
        if self.library == "llama_cpp":
            from graphopt.commands.llama_cpp import LlamaCpp

            file = source.file if self.weights == "file" else None
            return LlamaCpp(model, file, self.weights)
        arguments = self.arguments
        if self.weights:
            arguments = {**(arguments or {}), **_WEIGHTS[self.weights](model, source)}
        if arguments is not None:
            model.compile(**arguments)
        return model


def _int8_of_torchao(model: Any, source: ModelSource) -> dict[str, Any]:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig())
    return {}


def _blocks_of_the_file(model: Any, source: ModelSource) -> dict[str, Any]:
    from graphopt.quantization.gguf_file import load_gguf

    return {"options": {"quantize": load_gguf(model, source.file)}}


_WEIGHTS: dict[str, Callable[[Any, ModelSource], dict[str, Any]]] = {
    "torchao-int8": _int8_of_torchao,
    "file": _blocks_of_the_file,
}
_FROZEN = {"TORCHINDUCTOR_FREEZING": "1"}
_BEST = {"mode": "max-autotune-no-cudagraphs"}
KNOWN = {
    "eager": System("eager", None),
    "inductor": System("inductor", {}),
    "inductor-static": System("inductor-static", {}, static_cache=True),
    "inductor-best": System("inductor-best", _BEST, static_cache=True, environment=_FROZEN),
    "torchao-int8": System(
        "torchao-int8", _BEST, static_cache=True, weights="torchao-int8", library="torchao", environment=_FROZEN
    ),
    "llama.cpp": System("llama.cpp", None, weights="file", library="llama_cpp"),
    "graphopt": System("graphopt", {"backend": "graphopt"}),
    "graphopt-gguf": System("graphopt-gguf", {"backend": "graphopt"}, weights="file"),
}


def parse_systems(text: str, source: ModelSource) -> list[System]:
    """Systems for a model out of a list with commas. Everything wrong in it is an error now, before any work."""
    systems = [_parse(name.strip()) for name in text.split(",") if name.strip()]
    if not systems:
        raise OptionError(f"no system given; known are {', '.join(KNOWN)}")
    repeated = {system.name for system in systems if [other.name for other in systems].count(system.name) > 1}
    if repeated:
        raise OptionError(f"system {sorted(repeated)[0]!r} is given twice")
    for system in systems:
        if system.weights == "file" and source.gguf is None:
            advice = f"; give llama.cpp:KIND ({', '.join(WRITTEN)})" if system.library else ""
            raise OptionError(f"system {system.name!r}: model {source.name!r} comes from no .gguf file{advice}")
    return systems


def _parse(name: str) -> System:
    kind, *settings = name.split(":")
    if kind not in KNOWN:
        raise OptionError(f"unknown system {kind!r}{nearest(kind, KNOWN)}; known are {', '.join(KNOWN)}")
    system = KNOWN[kind]
    if system.library and importlib.util.find_spec(system.library) is None:
        raise NotInstalledError(
            f"system {kind!r} needs {system.library}, which is not installed. Install it with:\n"
            f"  {INSTALL[system.library]}"
        )
    if not settings:
        return system
    if kind == "llama.cpp":
        blocks = ":".join(settings)
        if blocks not in WRITTEN:
            known = f"{nearest(blocks, WRITTEN)}; known are {', '.join(WRITTEN)}"
            raise OptionError(f"system {name!r}: unknown kind of blocks {blocks!r}{known}")
        return dataclasses.replace(system, name=name, weights=blocks)
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
