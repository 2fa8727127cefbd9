"""Choose among the configurations of a kernel by timing them, once for each kernel, shapes, device and Triton.

What was found is kept as one small JSON file for each such set, in the user's private cache directory. A file that does
not parse, or that names anything but one of the configurations offered, is told of and ignored.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

_FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Config:
    """Values of a kernel's constants, in the order of its parameters, and how many warps and stages it runs with."""

    constants: tuple[tuple[str, int], ...]
    num_warps: int
    num_stages: int

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return {"constants": dict(self.constants), "num_warps": self.num_warps, "num_stages": self.num_stages}


Timer = Callable[[Callable[[], object]], float]
"""The time that a call takes, in any unit; raises what the call raises."""


def gpu_time(call: Callable[[], object]) -> float:
    """Median milliseconds on the GPU, with the cache emptied between calls."""
    from triton.testing import do_bench

    return float(do_bench(call, warmup=5, rep=20, return_mode="median"))


@dataclasses.dataclass
class Tuner:
    """Times configurations and remembers the best.

    directory: where results are kept. device, triton: their names, part of what a result holds for. architecture: of
    the device, where its limits are known, so that what exceeds them is not tried. timed: how many configurations were
    timed in this process.
    """

    directory: Path
    device: str
    triton: str
    architecture: str | None = None
    timer: Timer = gpu_time
    timed: int = 0

    def best(
        self, digest: str, shapes: Sequence[Any], configs: Sequence[Config], run: Callable[[Config], object]
    ) -> Config:
        """The fastest of the configurations, the first of which is the default.

        digest: of the kernel's source. shapes: of its arguments; plain data. run: launches it in a configuration; one
        that raises is out. The default is returned where none can be timed.
        """
        what = {"kernel": digest, "shapes": json.loads(json.dumps(list(shapes))), "device": self.device}
        what |= {"triton": self.triton, "configs": [config.to_json() for config in configs]}
        path = self.directory / f"{hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:32]}.json"
        known = _read(path, what, configs)
        if known is not None:
            return known
        times: dict[Config, float] = {}
        for config in configs:
            with contextlib.suppress(Exception):  # asks for more than the device has, or does not compile
                times[config] = self.timer(lambda config=config: run(config))  # type: ignore[misc]
                self.timed += 1
        chosen = min(times, key=times.__getitem__, default=configs[0])
        _write(path, {"format": _FORMAT, **what, "chosen": chosen.to_json(), "times": list(times.values())})
        return chosen


def _read(path: Path, what: Mapping[str, Any], configs: Sequence[Config]) -> Config | None:
    """The configuration that a file names; None, with a warning if there is a file that is not right."""
    try:
        found = json.loads(path.read_text())
        if found["format"] != _FORMAT or any(found[name] != value for name, value in what.items()):
            raise ValueError("it is of another kernel or format")
        return next(config for config in configs if config.to_json() == found["chosen"])
    except FileNotFoundError:
        return None
    except StopIteration:
        reason = "it names a configuration that the kernel does not have"
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
    warnings.warn(f"autotuning result {path} is ignored and made again: {reason}", stacklevel=2)
    return None


def _write(path: Path, found: Mapping[str, Any]) -> None:
    """Put a file in place at once, so that no other process reads half of it."""
    try:
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=path.stem)
        with os.fdopen(descriptor, "w") as file:
            json.dump(found, file, indent=1)
        os.replace(name, path)
    except OSError as error:
        warnings.warn(f"autotuning result {path} cannot be kept: {error}", stacklevel=2)
