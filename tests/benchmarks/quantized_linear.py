"""What one linear costs under each quantisation scheme, beside bfloat16 and ATen's weight-only kernels.

    python -m tests.benchmarks.quantized_linear [--json linear.json] [--turns 9]

Two places of the weight: "memory", where as many weights take turns as no cache holds, and "cache", where one weight
stays. x is bfloat16, on one thread. Systems take turns; the shortest of each counts. Run it while nothing else runs.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from graphopt.backends import cpp
from graphopt.quantization import schemes

SCHEMES = ("int8", "int8-g64", "int4-g32", "q4_k", "int4-g64-sym", "nf4-g64", "mxfp4", "fp8", "int8-dynamic")
MEMORY_BYTES = 256 * 2**20
kernels = torch.ops.graphopt_cpp
Weight = list[Tensor]
Call = Callable[[Tensor, Weight], object]


@dataclasses.dataclass(frozen=True)
class Timing:
    """Microseconds of one linear; nbytes: of its weight."""

    place: str
    system: str
    rows: int
    n: int
    k: int
    nbytes: int
    microseconds: float


def systems(weight: Tensor) -> dict[str, tuple[Weight, Call]]:
    """The weight [n, k] as each system stores it, and how that one multiplies rows of x with it."""
    found: dict[str, tuple[Weight, Call]] = {"bfloat16": ([weight], lambda x, w: kernels.linear(x, w[0], None))}
    for name in SCHEMES:
        packed = schemes.named(name).pack(weight)
        found[name] = packed, lambda x, w, name=name: kernels.quantized_linear(x, w, None, name)
    codes, scales = schemes.named("int8").pack(weight)
    found["ATen int8"] = [codes, scales.to(weight.dtype)], lambda x, w: torch._weight_int8pack_mm(x, w[0], w[1])
    four = torch._convert_weight_to_int4pack_for_cpu(torch.randint(0, 16, weight.shape, dtype=torch.int32), 1)
    groups = torch.randn(weight.shape[1] // 32, weight.shape[0], 2).to(weight.dtype)
    found["ATen int4"] = [four, groups], lambda x, w: torch._weight_int4pack_mm_for_cpu(x, w[0], 32, w[1])
    return found


def measure(place: str, rows: int, n: int, k: int, turns: int) -> list[Timing]:
    x, found = torch.randn(rows, k).bfloat16(), systems(torch.randn(n, k).bfloat16())
    best = dict.fromkeys(found, float("inf"))
    sizes = {name: sum(part.numel() * part.element_size() for part in weight) for name, (weight, _) in found.items()}
    for _ in range(turns):
        for name, (weight, call) in found.items():
            copies = -(-MEMORY_BYTES // sizes[name]) if place == "memory" else 1
            weights = itertools.cycle([[part.clone() for part in weight] for _ in range(copies)])
            count = max(min(copies, 64 // rows), 3 if rows > 1 else 40)
            for _ in range(3):
                call(x, next(weights))
            started = time.perf_counter()
            for _ in range(count):
                call(x, next(weights))
            best[name] = min(best[name], (time.perf_counter() - started) / count)
    return [Timing(place, name, rows, n, k, sizes[name], 1e6 * seconds) for name, seconds in best.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--turns", type=int, default=9)
    asked = parser.parse_args()
    reason = cpp.unavailable_reason()
    if reason is not None:
        parser.exit(1, f"{reason}\n")
    torch.set_num_threads(1)
    shapes = [("memory", 1, 8192, 576), ("memory", 16, 8192, 576), ("memory", 256, 2048, 576)]
    shapes += [("cache", rows, 576, k) for k in (576, 1536) for rows in (1, 4)]
    found: list[Timing] = []
    with torch.inference_mode():
        for place, rows, n, k in shapes:
            timed = measure(place, rows, n, k, asked.turns)
            print(
                f"{place}, {rows} x {k} by {n} x {k}: " + ", ".join(f"{t.system} {t.microseconds:.1f}" for t in timed)
            )
            found += timed
    if asked.json is not None:
        asked.json.write_text(json.dumps([dataclasses.asdict(timing) for timing in found], indent=2) + "\n")


if __name__ == "__main__":
    main()
