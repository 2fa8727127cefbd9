"""What decode attention costs as caches grow: every form of cache, and torch's own attention, in SmolLM2's shape.

    python -m tests.benchmarks.cache_attention [--json attention.json] [--seconds 1.0]

One token attends to 30 layers of 3 key/value heads of 64, with 128 and with 4096 rows in the cache. Printed is the
growth of the time in units of the floor: the time in which this machine reads the rows that are read more, as stored.
Systems take turns; the shortest of each counts. Run it while nothing else runs.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from graphopt import cost
from graphopt.backends import cpp
from graphopt.quantization import cache_operations as layout
from graphopt.runtime import kv, kv_paged, kv_quantized
from graphopt.runtime.kv_tensor import held_bytes

LAYERS, HEADS, KV_HEADS, SIZE = 30, 9, 3, 64
SHORT, LONG = 128, 4096
kernels = torch.ops.graphopt_cpp
Run = Callable[[], object]


@dataclasses.dataclass(frozen=True)
class Growth:
    """Milliseconds for all layers at the short and the long context; read: bytes that the long one reads more.

    bandwidth: bytes a second.
    """

    form: str
    dtype: str
    short: float
    long: float
    read: float
    bandwidth: float

    @property
    def floors(self) -> float:
        """How many times the floor the cost grows by."""
        return (self.long - self.short) / (1e3 * self.read / self.bandwidth)


def caches(length: int, dtype: torch.dtype) -> list[Tensor]:
    """Keys or values of all layers, as they lie in growing caches."""
    made = []
    for _ in range(LAYERS):
        rows = kv.allocate([1, KV_HEADS, length, SIZE], 2, dtype=dtype, device=torch.device("cpu"))
        rows.data.normal_()
        made.append(rows)
    return made


def runs(length: int, dtype: torch.dtype) -> dict[str, tuple[Run, float]]:
    """For each form, a call that attends in every layer, and the bytes of keys and values that it reads."""
    q = torch.randn(1, HEADS, 1, SIZE).to(dtype)
    keys, values = caches(length, dtype), caches(length, dtype)
    plain = sum(cache.numel() * cache.element_size() for cache in (*keys, *values))
    settings = (False, SIZE**-0.5, 0.0, 0)

    def each(call: Callable[..., Tensor], *operands: list[list[Tensor]]) -> Run:
        return lambda: [call(*(part for operand in layer for part in operand)) for layer in zip(*operands, strict=True)]

    found: dict[str, tuple[Run, float]] = {
        "torch": (
            each(
                lambda k, v: torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True),
                [[k] for k in keys],
                [[v] for v in values],
            ),
            plain,
        ),
        "exact": (
            each(lambda k, v: kernels.attention(q, k, v, None, *settings), [[k] for k in keys], [[v] for v in values]),
            plain,
        ),
        "paged": (
            each(
                lambda *given: kernels.attention_paged(q, *given, None, length, *settings),
                [kv_paged.reserve(k, 0) for k in keys],
                [kv_paged.reserve(v, 0) for v in values],
            ),
            plain,
        ),
    }
    for kind in layout.KINDS:
        own = [
            [kv_quantized.reserve(one, 0, kind, is_key) for one in side]
            for side, is_key in ((keys, True), (values, False))
        ]
        stored = held_bytes(part for side in own for layer in side for part in layer[:2])
        found[kind] = (
            each(lambda *given, kind=kind: kernels.attention_quantized(q, *given, None, length, kind, *settings), *own),
            stored,
        )
    return found


def shortest(calls: dict[str, tuple[Run, float]], seconds: float) -> dict[str, float]:
    """Milliseconds of each call: the shortest of those that fit in its share of the time, taken in turns."""
    best = dict.fromkeys(calls, float("inf"))
    end = time.perf_counter() + seconds * len(calls)
    while time.perf_counter() < end:
        for name, (call, _) in calls.items():
            for _ in range(3):
                started = time.perf_counter()
                call()
                best[name] = min(best[name], 1e3 * (time.perf_counter() - started))
    return best


def measure(dtype: torch.dtype, seconds: float) -> list[Growth]:
    bandwidth = cost.read_bandwidth(512 * 2**20, seconds)
    short, long = runs(SHORT, dtype), runs(LONG, dtype)
    times = [shortest(calls, seconds) for calls in (short, long)]
    bandwidth = max(bandwidth, cost.read_bandwidth(512 * 2**20, seconds))
    name = str(dtype).removeprefix("torch.")
    return [
        Growth(form, name, times[0][form], times[1][form], long[form][1] - short[form][1], bandwidth) for form in long
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seconds", type=float, default=1.0)
    asked = parser.parse_args()
    reason = cpp.unavailable_reason()
    if reason is not None:
        parser.exit(1, f"{reason}\n")
    found = [growth for dtype in (torch.float32, torch.bfloat16) for growth in measure(dtype, asked.seconds)]
    for growth in found:
        print(
            f"{growth.dtype:9} {growth.form:6} {growth.short:6.2f} ms {growth.long:7.2f} ms"
            f"  {growth.floors:5.2f} floors of {growth.read / 2**20:.1f} MiB at {growth.bandwidth / 1e9:.1f} GB/s"
        )
    if asked.json is not None:
        entries = [dataclasses.asdict(growth) | {"floors": growth.floors} for growth in found]
        asked.json.write_text(json.dumps(entries, indent=2) + "\n")


if __name__ == "__main__":
    main()
