"""Products in float32, bfloat16 and float16 beside eager's and Inductor's: linears, a training step, experts.

    python -m tests.benchmarks.two_byte_products [--json products.json] [--turns 15]

Where the processor has no instructions for two-byte numbers, torch multiplies them by loops of its own. Systems take
turns; the medians count. Run it while nothing else runs.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import MixtralConfig, MixtralForCausalLM

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclasses.dataclass(frozen=True)
class Timing:
    """The median milliseconds of one call."""

    work: str
    dtype: str
    system: str
    milliseconds: float


class Block(nn.Module):
    """A convolution into 144 patches of each image, attention, and two linears."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 64, 8, 8)
        self.qkv, self.out = nn.Linear(64, 192), nn.Linear(64, 64)
        self.up, self.down = nn.Linear(64, 256), nn.Linear(256, 64)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2)
        q, k, v = (part.unflatten(-1, (4, 16)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(x)))


def linear(rows: int, dtype: torch.dtype) -> tuple[nn.Module, Callable[[nn.Module], object]]:
    x = torch.randn(rows, 576, dtype=dtype)

    def call(model: nn.Module) -> object:
        with torch.no_grad():
            return model(x)

    return nn.Linear(576, 1536, bias=False), call


def training_step(dtype: torch.dtype) -> tuple[nn.Module, Callable[[nn.Module], object]]:
    images = torch.randn(4, 3, 96, 96, dtype=dtype)

    def call(model: nn.Module) -> object:
        model.zero_grad()
        return model(images).square().mean().backward()

    return Block(), call


def mixture(tokens: int) -> tuple[nn.Module, Callable[[nn.Module], object]]:
    config = MixtralConfig(
        vocab_size=1000, hidden_size=512, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=2, num_local_experts=8,
    )  # fmt: skip
    ids = torch.randint(0, 1000, (1, tokens))

    def call(model: nn.Module) -> object:
        with torch.no_grad():
            return model(ids, use_cache=False)

    return MixtralForCausalLM(config).eval(), call


def works(dtype: torch.dtype) -> dict[str, tuple[nn.Module, Callable[[nn.Module], object]]]:
    """Each model and a call of it, compiled or not."""
    found = {f"linear 1536x576, {rows} rows": linear(rows, dtype) for rows in (17, 128, 512)}
    found["training step"] = training_step(dtype)
    return found | {f"8 experts, {tokens} tokens": mixture(tokens) for tokens in (1, 64)}


def measure(work: str, dtype: torch.dtype, turns: int) -> list[Timing]:
    model, call = works(dtype)[work]
    model.to(dtype)
    systems: dict[str, nn.Module] = {"eager": model}
    for backend in ("inductor", "graphopt"):
        torch.compiler.reset()
        systems[backend] = torch.compile(model, backend=backend, dynamic=False)
    times: dict[str, list[float]] = {name: [] for name in systems}
    for turn in range(turns + 2):
        for name, system in systems.items():
            started = time.perf_counter()
            call(system)
            if turn > 1:
                times[name].append(time.perf_counter() - started)
    kind = str(dtype).removeprefix("torch.")
    return [Timing(work, kind, name, 1e3 * statistics.median(found)) for name, found in times.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--turns", type=int, default=15)
    asked = parser.parse_args()
    found: list[Timing] = []
    for dtype in DTYPES:
        for work in works(dtype):
            timed = measure(work, dtype, asked.turns)
            print(f"{work}, {timed[0].dtype}: " + ", ".join(f"{t.system} {t.milliseconds:.2f}" for t in timed))
            found += timed
    if asked.json is not None:
        asked.json.write_text(json.dumps([dataclasses.asdict(timing) for timing in found], indent=2) + "\n")


if __name__ == "__main__":
    main()
