"""`graphopt bench`: run systems side by side on the same work, and check that they answer alike."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
import statistics
import time
from collections.abc import Sequence

import numpy

from graphopt.commands.figures import Agreement, BenchResult, Cost, Figures
from graphopt.commands.models import DTYPES, ModelSource, find_model
from graphopt.commands.progress import Step
from graphopt.commands.systems import System, parse_systems
from graphopt.commands.worker import Worker, workers
from graphopt.commands.works import WORKS, Answers, WorkRequest
from graphopt.errors import OptionError

# Encoded vectors count as equal within this share of their largest entry (tokens are compared exactly).
_TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}
# Two logits are a near tie if they are no further apart than this many units of rounding of the largest one.
_NEAR_TIE = 2
_EPSILON = {"float32": 2.0**-23, "bfloat16": 2.0**-7, "float16": 2.0**-10}
SETTLE_SECONDS = 0.004  # the threads of a worker that has just stopped spin for a moment
# The first step of a turn finds caches that other processes have filled; a generation has hundreds that do not.
_STEPS_A_TURN = {"decode": 16, "prefill": 1, "encode": 1}


@dataclasses.dataclass(frozen=True)
class Plan:
    """A validated request: what to run, on which systems, how often."""

    source: ModelSource
    systems: list[System]
    works: list[str]
    dtype: str
    batch: int
    lengths: dict[str, int]
    checked: int
    rounds: int
    cold: bool


def plan(
    model: str,
    works: str,
    systems: str,
    dtype: str,
    batch: int,
    lengths: dict[str, int],
    checked: int = 64,
    rounds: int = 16,
    cold: bool = True,
) -> Plan:
    """Check everything that can be wrong before any work. Raises OptionError or NotInstalledError."""
    wanted = [work.strip() for work in works.split(",") if work.strip()]
    for work in wanted:
        if work not in WORKS:
            raise OptionError(f"unknown work {work!r}; known are {', '.join(WORKS)}")
    if not wanted:
        raise OptionError(f"no work given; known are {', '.join(WORKS)}")
    if dtype not in DTYPES:
        raise OptionError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    for name, value in {"batch": batch, "tokens": checked, "rounds": rounds, **lengths}.items():
        if value < 1:
            raise OptionError(f"{name} must be at least 1, got {value}")
    if rounds < 2:
        raise OptionError("rounds must be at least 2, so that there is a spread")
    source = find_model(model)
    chosen = parse_systems(systems, source)
    if "encode" in wanted and any(system.library == "llama_cpp" for system in chosen):
        raise OptionError("work 'encode' is not for llama.cpp, which is run for the logits of the last token")
    return Plan(source, chosen, wanted, dtype, batch, lengths, checked, rounds, cold)


def run(plan: Plan, step: Step) -> BenchResult:
    """Measure all works of the plan, showing each step."""
    from graphopt.commands.limits import measure_limits

    with step("measure what this machine can do"):
        limits = measure_limits(plan.dtype)
    costs: dict[str, Cost] = {}
    rows: list[Figures] = []
    for work in plan.works:
        request = WorkRequest(work, plan.batch, plan.lengths[work], plan.checked, static_cache=False)
        with workers(plan.systems, plan.cold) as running:
            for worker in running:
                with step(f"{work}, {worker.system.name}: load {plan.source.name}"):
                    worker.call("load", plan.source, plan.dtype, worker.system)
            costs[work], found = compare(running, request, plan.dtype, plan.rounds, step)
            rows += found
    with step("measure the machine again"):
        limits = limits.best(measure_limits(plan.dtype))
    return BenchResult(
        plan.source.name, plan.dtype, plan.batch, machine(), versions(), limits, plan.cold, costs, tuple(rows)
    )


def compare(
    running: Sequence[Worker], request: WorkRequest, dtype: str, rounds: int, step: Step
) -> tuple[Cost, list[Figures]]:
    """One work on workers that have loaded the model: check all against the first, time them in turns."""
    answers: list[Answers] = []
    costs: list[Cost] = []
    for worker in running:
        with step(f"{request.kind}, {worker.system.name}: compile and compare answers"):
            own = dataclasses.replace(request, static_cache=worker.system.static_cache)
            costs.append(worker.call("prepare", own))
            answers.append(worker.call("check", answers[0].given if answers else None))
    times: list[list[float]] = [[] for _ in running]
    with step(f"{request.kind}: time {len(running)} systems in turns, {rounds} rounds") as retitle:
        for turn in range(rounds):
            retitle(f"{request.kind}: round {turn + 1} of {rounds}")
            for place in range(len(running)):
                index = (turn + place) % len(running)
                time.sleep(SETTLE_SECONDS)
                times[index] += running[index].call("steps", _STEPS_A_TURN[request.kind])
    return costs[0], [
        Figures(
            worker.system.name,
            request.kind,
            tuple(times[index]),
            _compile_seconds(worker.system, answers[index], times[index]),
            worker.call("peak"),
            agree(answers[index], answers[0], request.kind, dtype),
        )
        for index, worker in enumerate(running)
    ]


def agree(answers: Answers, reference: Answers, work: str, dtype: str) -> Agreement:
    """Compare what a system answered with the reference's answers to the same inputs."""
    errors = numpy.abs(answers.values - reference.values).max(axis=-1)
    if work == "encode":
        equal = errors <= _TOLERANCE[dtype] * numpy.abs(reference.values).max(axis=-1)
        return Agreement(int(equal.sum()), equal.size, 0, float(errors.max()))
    equal = answers.chosen == reference.chosen
    gaps = reference.values.max(axis=-1) - numpy.take_along_axis(
        reference.values, answers.chosen[..., None], axis=-1
    ).squeeze(-1)
    near_ties = ~equal & (gaps <= _NEAR_TIE * _EPSILON[dtype] * numpy.abs(reference.values).max(axis=-1))
    return Agreement(int(equal.sum()), equal.size, int(near_ties.sum()), float(errors.max()))


def machine() -> str:
    """The processor's name, as the system gives it."""
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """The versions of what was measured."""
    found = {}
    for package in ("graphopt", "torch", "transformers", "torchao", "llama-cpp-python"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _compile_seconds(system: System, answers: Answers, times: Sequence[float]) -> float:
    """What the first calls took beyond what such calls take later."""
    if system.arguments is None:
        return 0.0
    return max(0.0, sum(answers.seconds) - len(answers.seconds) * statistics.median(times) / 1e3)
