"""The options of the backend: one frozen dataclass, validated before any work is done.

`torch.compile(model, backend="graphopt", options={...})` takes the same names as `Options(...)`.
Environment variables of the form GRAPHOPT_<NAME> give defaults for the debugging switches only.
"""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, cast

from graphopt.errors import OptionError, nearest
from graphopt.prune_options import PruneHeads, Pruning, parse_prune
from graphopt.quantize_options import Quantize

MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
TARGETS = ("auto", "cpu", "inductor", "triton", "reference")
KV_CACHES = ("paged",)
KV_DTYPES = ("int8", "fp8", "int4")
VERIFY = ("off", "sample", "all")


@dataclasses.dataclass(frozen=True)
class Options:
    """What a user may choose.

    mode: how much compile time to spend: "default"; "reduce-overhead" records CUDA graphs; "max-autotune" also times
        configurations of kernels; "max-autotune-no-cudagraphs" only times them.
    target: where the graph is lowered to; "auto" takes "cpu" for tensors on the CPU and "inductor", which uses no
        kernel of graphopt's own, for others; "triton" generates the kernels of a GPU; "reference" runs every operation
        by its meaning.
    quantize: how weights are quantised: a scheme's name ("int8", "int4", ...) or a `graphopt.Quantize`; None does not.
    prune_heads: which heads and channels may be left out although they are alive: a `graphopt.PruneHeads`; None: none.
    prune: what else may be left out: "2:4" or a `graphopt.Sparsify` (two of each four weights), a
        `graphopt.PruneLayers` (whole layers), or a tuple of one of each; None: nothing.
    kv_capacity: rows that growing KV caches take memory for at once; one row more raises KVCapacityError. None lets
        them grow, by half of what they hold at most.
    kv_cache: "paged" keeps growing KV caches in blocks that copies and continuations of one prompt share; None keeps
        each in memory of its own.
    kv_dtype: keep growing KV caches as "int8", "fp8" (e4m3) or "int4" (lossy); None keeps the model's own dtype.
    passes: extra passes, each made with `@graph_pass`.
    disable: names of passes to leave out.
    limit: stop after this many rewrites in one compiled graph (for bisecting); None means no limit.
    cost_model: what a fused region costs, asked instead of `graphopt.cost` wherever regions are formed or judged: a
        function from the region (a GraphModule) to a `graphopt.cost.Cost`.
    strict: turn every fallback (a pass that raised, a graph left to torch) into an error.
    verify: check rewrites against the nodes they replace: "off", "sample" (each distinct one once, few inputs), "all".
    dump: directory that receives the graph after each pass that changed it, or None.
    debug: what is said on standard error while compiling: 0 nothing; 1 a line for each pass; 2 also how each operation
        is lowered and what passes refused; 3 also what each pass changed; 4 also the generated kernels.
    """

    mode: str = "default"
    target: str = "auto"
    quantize: Quantize | str | None = None
    prune_heads: PruneHeads | None = None
    prune: str | Pruning | tuple[Pruning, ...] | None = None
    kv_capacity: int | None = None
    kv_cache: str | None = None
    kv_dtype: str | None = None
    passes: tuple[Callable[..., int], ...] = ()
    disable: tuple[str, ...] = ()
    limit: int | None = None
    cost_model: Callable[[Any], Any] | None = None
    strict: bool = False
    verify: str = "off"
    dump: str | None = None
    debug: int = 0

    def __post_init__(self) -> None:
        _one_of("mode", self.mode, MODES)
        _one_of("target", self.target, TARGETS)
        _one_of("verify", self.verify, VERIFY)
        object.__setattr__(self, "quantize", Quantize.parse(self.quantize))
        PruneHeads.parse(self.prune_heads)
        object.__setattr__(self, "prune", parse_prune(self.prune))
        if self.cost_model is not None and not callable(self.cost_model):
            raise OptionError(
                f"option 'cost_model' must be a function from a region to a graphopt.cost.Cost, got {self.cost_model!r}"
            )
        _boolean("strict", self.strict)
        _integer("debug", self.debug, 0, 4)
        if self.kv_capacity is not None:
            _integer("kv_capacity", self.kv_capacity, 1, None)
        if self.kv_dtype is not None:
            _one_of("kv_dtype", self.kv_dtype, KV_DTYPES)
            if self.kv_capacity is not None:
                raise OptionError(
                    "option 'kv_capacity' does not go with 'kv_dtype': quantised caches grow as they fill"
                )
        if self.kv_cache is not None:
            _one_of("kv_cache", self.kv_cache, KV_CACHES)
            for name in ("kv_capacity", "kv_dtype"):
                if getattr(self, name) is not None:
                    raise OptionError(
                        f"option {name!r} does not go with 'kv_cache': blocks are taken as needed, in the model's dtype"
                    )
        if self.limit is not None:
            _integer("limit", self.limit, 0, None)
        object.__setattr__(self, "passes", _sequence("passes", self.passes))
        object.__setattr__(self, "disable", _sequence("disable", self.disable))
        for function in self.passes:
            if not hasattr(function, "graph_pass"):
                raise OptionError(
                    f"option 'passes' holds {function!r}, which is not a pass: decorate it with"
                    " @graphopt.graph_pass(...)"
                )
        if any(not isinstance(name, str) for name in self.disable):
            raise OptionError(f"option 'disable' must hold names of passes (str), got {self.disable!r}")
        if isinstance(self.dump, os.PathLike):
            object.__setattr__(self, "dump", os.fspath(self.dump))
        if self.dump is not None and not isinstance(self.dump, str):
            raise OptionError(f"option 'dump' must be a directory (str or Path) or None, got {self.dump!r}")

    def check_disabled(self, known: Collection[str]) -> None:
        """Raise OptionError if `disable` names none of the `known` passes; of GRAPHOPT_DISABLE, which many programs
        may see, it is only told."""
        for name in self.disable:
            if name not in known:
                hint = nearest(name, sorted(known))
                message = f"there is no pass {name!r}{hint}; `graphopt passes` lists those of the library"
                if name not in _from_environment().get("disable", ()):
                    raise OptionError(f"option 'disable': {message}")
                warnings.warn(f"GRAPHOPT_DISABLE: {message}", stacklevel=2)

    @classmethod
    def parse(cls, mode: object = None, options: object = None) -> Options:
        """Options from what torch.compile hands over: `mode` and `options`, either may be None."""
        values: dict[str, Any] = dict(_from_environment())
        if isinstance(options, Options):
            return dataclasses.replace(options, mode=mode) if isinstance(mode, str) else options
        if options is not None:
            if not isinstance(options, Mapping):
                raise OptionError(f"options must be a dict or graphopt.Options, got {type(options).__name__}")
            values.update(options)
        if mode is not None:
            values["mode"] = mode
        known = [field.name for field in dataclasses.fields(cls)]
        for name in values:
            if name not in known:
                raise OptionError(
                    f"unknown option {name!r}{nearest(name, known)}; options are {', '.join(sorted(known))}"
                )
        return cls(**values)


def _from_environment() -> dict[str, Any]:
    values: dict[str, Any] = {}
    if (debug := os.environ.get("GRAPHOPT_DEBUG")) is not None:
        values["debug"] = _environment_integer("GRAPHOPT_DEBUG", debug)
    if (limit := os.environ.get("GRAPHOPT_LIMIT")) is not None:
        values["limit"] = _environment_integer("GRAPHOPT_LIMIT", limit)
    if dump := os.environ.get("GRAPHOPT_DUMP"):
        values["dump"] = str(Path(dump))
    if disable := os.environ.get("GRAPHOPT_DISABLE"):
        values["disable"] = tuple(name.strip() for name in disable.split(",") if name.strip())
    if verify := os.environ.get("GRAPHOPT_VERIFY"):
        values["verify"] = verify
    return values


def _environment_integer(name: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise OptionError(f"environment variable {name} must be a whole number, got {text!r}") from None


def _one_of(name: str, given: object, allowed: tuple[str, ...]) -> None:
    if given not in allowed:
        raise OptionError(
            f"option {name!r} got {given!r}{nearest(given, allowed)}; allowed are {', '.join(map(repr, allowed))}"
        )


def _boolean(name: str, given: object) -> None:
    if not isinstance(given, bool):
        raise OptionError(f"option {name!r} must be True or False, got {given!r} ({type(given).__name__})")


def _integer(name: str, given: object, low: int, high: int | None) -> None:
    whole = isinstance(given, int) and not isinstance(given, bool)
    if not (whole and low <= cast(int, given) and (high is None or cast(int, given) <= high)):
        allowed = f"{low} to {high}" if high is not None else f"{low} or more"
        raise OptionError(f"option {name!r} must be a whole number, {allowed}, got {given!r} ({type(given).__name__})")


def _sequence(name: str, given: object) -> tuple[Any, ...]:
    if not isinstance(given, (list, tuple)):
        raise OptionError(f"option {name!r} must be a list or tuple, got {given!r} ({type(given).__name__})")
    return tuple(given)
