"""Programs with KV caches for the passes that give caches another form, and how a test runs such a pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from graphopt import report

B, H, D = 2, 3, 8
PASSES = {"kv_cache": "page_cache", "kv_dtype": "quantize_cache"}


def rows(count: int, dtype: torch.dtype = torch.float32, batch: int = B, size: int = D) -> Tensor:
    return torch.randn(batch, H, count, size).to(dtype)


def step(length: int, **of: Any) -> list[Tensor]:
    """The inputs of `decode`: one query, caches of `length` rows, one new row for each."""
    return [rows(count, **of) for count in (1, length, length, 1, 1)]


def shown(cache: Tensor, keys: bool, kv_dtype: str | None = None, kv_cache: str | None = None) -> Tensor:
    """What attention sees of a cache in the form that the options ask for."""
    return cache if kv_dtype is None else torch.ops.graphopt.kv_quantize(cache, kv_dtype, keys)


def decode(q: Tensor, k_past: Tensor, v_past: Tensor, k_new: Tensor, v_new: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    k, v = torch.cat([k_past, k_new], 2), torch.cat([v_past, v_new], 2)
    return F.scaled_dot_product_attention(q, k, v), k, v


def start(q: Tensor, k_new: Tensor, v_new: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    nothing = torch.tensor([])
    k, v = torch.cat([nothing, k_new], -2), torch.cat([nothing, v_new], -2)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True), k, v


def read_twice(*inputs: Tensor) -> tuple[Tensor, ...]:
    out, k, v = decode(*inputs)
    return out, k, v, k.sum(2)


def slide(*inputs: Tensor) -> tuple[Tensor, ...]:
    out, k, v = decode(*inputs)
    return out, k[:, :, -49:], v[:, :, -49:]


def by_hand(q: Tensor, past: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    k = torch.cat([past, new], 2)
    return torch.matmul(q, k.transpose(-1, -2)).relu(), k


def keys_are_values(q: Tensor, past: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    both = torch.cat([past, new], 2)
    return F.scaled_dot_product_attention(q, both, both), both


def write_in_place(q: Tensor, k: Tensor, v: Tensor, new: Tensor, place: Tensor) -> Tensor:
    k.index_copy_(2, place, new)
    v.index_copy_(2, place, new)
    return F.scaled_dot_product_attention(q, k, v)


def compiled(function: Callable[..., Any], **form: Any) -> Callable[..., Any]:
    return torch.compile(function, backend="graphopt", options={"target": "reference", "strict": True, **form})


def run(function: Callable[..., Any], *inputs: Tensor, **form: Any) -> tuple[Any, int, list[str]]:
    """The compiled function's result, and the rewrites and refusals of the pass that `form`, an option, asks for."""
    (wanted,) = (name for option, name in PASSES.items() if option in form)
    with report.collecting() as collected, torch.no_grad():
        result = compiled(function, **form)(*inputs)
    (entry,) = [entry for graph in collected.graphs for entry in graph.passes if entry.name == wanted]
    return result, entry.rewrites, [refusal.reason for refusal in entry.refusals]


def assert_refused(function: Callable[..., Any], *inputs: Tensor, reason: str, **form: Any) -> None:
    """Check that the pass leaves the function alone, for this one reason, and that its results are eager's."""
    expected = function(*(value.clone() for value in inputs))
    result, rewrites, reasons = run(function, *inputs, **form)
    assert rewrites == 0 and [reason in given for given in reasons] == [True], reasons
    torch.testing.assert_close(result, expected)
