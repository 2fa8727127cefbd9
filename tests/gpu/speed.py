"""Decode and prefill of Llama shapes in bfloat16: eager, Inductor and graphopt by turns, beside what the GPU can do."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers

SHAPES = {  # hidden size, layers, heads, key/value heads, size between
    "1B": (2048, 16, 32, 8, 8192),
    "8B": (4096, 32, 32, 8, 14336),
}
SYSTEMS: dict[str, dict[str, Any]] = {
    "inductor": {},
    "inductor max-autotune": {"mode": "max-autotune-no-cudagraphs"},
    "graphopt": {"backend": "graphopt", "options": {"target": "triton"}},
    "graphopt int8": {"backend": "graphopt", "options": {"target": "triton", "quantize": "int8"}},
    "graphopt int4": {"backend": "graphopt", "options": {"target": "triton", "quantize": "int4"}},
}
WORKS = (("decode", 1), ("decode", 8), ("decode", 64), ("prefill", 512), ("prefill", 4096))
_CONTEXT = 512
_TURNS = 20


def measure(device: str, end: float) -> list[dict[str, Any]]:
    """Median milliseconds of each work and system, until the clock `time.monotonic()` says `end`."""
    figures = [{"limit": "copy", "GB/s": round(_copy_rate(device) / 1e9)},
               {"limit": "matmul", "TFLOP/s": round(_matmul_rate(device) / 1e12)}]  # fmt: skip
    for shape in SHAPES:
        model = _llama(shape, device)
        weights = sum(parameter.nbytes for parameter in model.parameters())
        for work, size in WORKS:
            if time.monotonic() > end:
                return figures
            for system, seconds in _by_turns(model, work, size, device):
                figure = {"shape": shape, "work": f"{work} {size}", "system": system, "ms": round(seconds * 1e3, 3)}
                if work == "decode":
                    figure["GB/s of weights in bfloat16"] = round(weights / seconds / 1e9)
                figures.append(figure)
        del model
        torch.cuda.empty_cache()
    return figures


def _llama(shape: str, device: str) -> Any:
    hidden, layers, heads, kv, between = SHAPES[shape]
    config = transformers.LlamaConfig(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv,
        intermediate_size=between, vocab_size=128256, max_position_embeddings=8192,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        return transformers.LlamaForCausalLM(config).to(torch.bfloat16).eval()


def _by_turns(model: Any, work: str, size: int, device: str) -> Iterator[tuple[str, float]]:
    systems: dict[str, Callable[..., Any]] = {"eager": model.forward}
    for name, arguments in SYSTEMS.items():
        systems[name] = torch.compile(model.forward, **arguments)
    torch._dynamo.reset()
    steps = {name: _step(call, model, work, size, device) for name, call in systems.items()}
    times: dict[str, list[float]] = {name: [] for name in systems}
    with torch.no_grad():
        for turn in range(_TURNS + 3):
            for name, step in steps.items():
                torch.cuda.synchronize()
                started = time.perf_counter()
                step()
                torch.cuda.synchronize()
                if turn >= 3:
                    times[name].append(time.perf_counter() - started)
    for name, seconds in times.items():
        yield name, statistics.median(seconds)


def _step(call: Callable[..., Any], model: Any, work: str, size: int, device: str) -> Callable[[], Any]:
    """One step; decode goes on from step to step with its own cache."""
    if work == "prefill":
        ids = torch.randint(0, 1000, (1, size), device=device)
        return lambda: call(input_ids=ids, use_cache=True, logits_to_keep=1)
    prompt = torch.randint(0, 1000, (size, _CONTEXT), device=device)
    with torch.no_grad():
        cache = model.forward(input_ids=prompt, use_cache=True, logits_to_keep=1).past_key_values
    token = prompt[:, :1]
    return lambda: call(input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1)


def _copy_rate(device: str) -> float:
    """Bytes per second, read and written, of copying 1 GiB."""
    source = torch.empty(2**29, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _seconds(lambda: target.copy_(source))


def _matmul_rate(device: str) -> float:
    """Operations per second of a large bfloat16 product."""
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device=device) for _ in range(2))
    return 2 * 8192**3 / _seconds(lambda: a @ b)


def _seconds(body: Callable[[], Any]) -> float:
    times = []
    for _ in range(12):
        torch.cuda.synchronize()
        started = time.perf_counter()
        body()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times[2:])
