"""All that only a GPU can show, in one call: answers of every skeleton, operators, models; speed beside Inductor.

    python -m tests.gpu.run --json gpu.json
    python -m tests.gpu.run --device cpu        # the same programs in small through Triton's interpreter, no speed

Exit status 1 when an answer differs from eager's, 2 when there is no such device.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from tests.gpu import programs, replays, speed
from tests.suite import architectures, compare, door, opinfo

MODELS = ("llama", "qwen3", "gemma2", "gpt2", "bert", "mixtral", "t5", "vit")


def main() -> None:
    """Run the parts until the time is up; print and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--minutes", type=float, default=9.0, help="no part is started after this")
    parser.add_argument("--parts", default="programs,replays,operators,models,speed")
    parser.add_argument("--operators-one-in", type=int, default=100, help="the share of OpInfo's cases")
    parser.add_argument("--json", type=pathlib.Path)
    arguments = parser.parse_args()
    if arguments.device != "cpu" and not torch.cuda.is_available():
        print("no GPU that torch can use; --device cpu runs the interpreter", file=sys.stderr)
        sys.exit(2)
    torch.set_default_device(arguments.device)
    parts: dict[str, Callable[[Run], None]] = {
        "programs": _programs, "replays": _replays, "operators": _operators, "models": _models, "speed": _speed,
    }  # fmt: skip
    unknown = set(arguments.parts.split(",")) - set(parts)
    if unknown:
        parser.error(f"unknown part {sorted(unknown)[0]!r}; allowed are {', '.join(parts)}")
    run = Run(arguments)
    for name in arguments.parts.split(","):
        parts[name](run)
    run.finish()


class Run:
    """What was asked, and what was found so far."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.device: str = arguments.device
        self.one_in: int = arguments.operators_one_in
        self.path: pathlib.Path | None = arguments.json
        self.end = time.monotonic() + 60 * arguments.minutes
        self.answers: list[dict[str, str]] = []
        self.skipped = 0
        self.figures: list[dict[str, Any]] = []

    def check(self, name: str, body: Callable[[], object]) -> None:
        """Run one comparison and keep its outcome; too late, it is counted as skipped."""
        if time.monotonic() > self.end:
            self.skipped += 1
            return
        door.fresh()
        try:
            body()
            outcome = "passed"
        except Exception as error:  # every kind of failure is an outcome of this report
            outcome = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            print(f"FAILED {name}: {outcome}")
        self.answers.append({"name": name, "outcome": outcome})
        self._write()

    def finish(self) -> None:
        """Print the sums; leave with status 1 when anything failed."""
        failed = sum(answer["outcome"] != "passed" for answer in self.answers)
        print(f"{len(self.answers) - failed} of {len(self.answers)} answers agree with eager's; {self.skipped} not run")
        for figure in self.figures:
            print("  ".join(f"{key} {value}" for key, value in figure.items()))
        self._write()
        sys.exit(1 if failed else 0)

    def _write(self) -> None:
        if self.path is not None:
            found = {"answers": self.answers, "skipped": self.skipped, "figures": self.figures}
            self.path.write_text(json.dumps(found, indent=1))


def _programs(run: Run) -> None:
    for program in programs.programs(small=run.device == "cpu"):
        for dtype in programs.DTYPES:
            run.check(f"{program.name} {dtype}", lambda p=program, d=dtype: _like_eager(p, d, run.device))  # type: ignore[misc]


def _like_eager(program: programs.Program, dtype: torch.dtype, device: str) -> None:
    inputs = program.inputs(dtype, device)
    with torch.no_grad():
        actual = door.compiled(program.function, target="triton")(*inputs)
        exact = [value.double() for value in inputs]
        compare.assert_same(actual, program.function(*inputs), oracle=lambda: program.function(*exact))


def _replays(run: Run) -> None:
    """Programs that are called again and again, recorded as CUDA graphs (`mode="reduce-overhead"`)."""
    for target in ("triton", "inductor") if run.device != "cpu" else ("triton",):
        for name, check in replays.CHECKS.items():
            run.check(f"replay {name} {target}", lambda c=check, t=target: c(run.device, t))  # type: ignore[misc]


def _operators(run: Run) -> None:
    if run.device != "cpu":
        opinfo.DEVICE = run.device
    for case in opinfo.cases():
        if door.in_rotation(str(case), run.one_in):
            run.check(str(case), lambda c=case: opinfo.check(c, target="triton", most=2))  # type: ignore[misc]


def _models(run: Run) -> None:
    for name in MODELS:
        checks = architectures.BY_NAME[name].checks
        for kind in checks if run.device != "cpu" else checks[:1]:
            run.check(f"{name} {kind}", lambda n=name, k=kind: architectures.check(n, k, target="triton"))  # type: ignore[misc]


def _speed(run: Run) -> None:
    if run.device != "cpu":
        run.figures += speed.measure(run.device, run.end)


if __name__ == "__main__":
    main()
