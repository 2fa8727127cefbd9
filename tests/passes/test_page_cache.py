"""page_cache: what it rewrites, and what it refuses and why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from graphopt import report
from graphopt.runtime import kv_paged

B, H, D = 2, 3, 8


def rows(count: int, dtype: torch.dtype = torch.float32, batch: int = B) -> Tensor:
    return torch.randn(batch, H, count, D).to(dtype)


def run(function: Callable[..., Any], *inputs: Tensor, **options: Any) -> tuple[Any, int, list[str]]:
    """The compiled function's result, the rewrites and the refusals of the pass."""
    chosen = {"target": "reference", "strict": True, "kv_cache": "paged", **options}
    with report.collecting() as collected, torch.no_grad():
        result = torch.compile(function, backend="graphopt", options=chosen)(*inputs)
    (entry,) = [entry for graph in collected.graphs for entry in graph.passes if entry.name == "page_cache"]
    return result, entry.rewrites, [refusal.reason for refusal in entry.refusals]


def decode(q: Tensor, k_past: Tensor, v_past: Tensor, k_new: Tensor, v_new: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    k, v = torch.cat([k_past, k_new], 2), torch.cat([v_past, v_new], 2)
    return F.scaled_dot_product_attention(q, k, v), k, v


def refused(function: Callable[..., Any], *inputs: Tensor, reason: str) -> None:
    expected = function(*(value.clone() for value in inputs))
    result, rewrites, reasons = run(function, *inputs)
    assert rewrites == 0 and [reason in given for given in reasons] == [True], reasons
    torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("length", [5, 16, 100])
def test_attention_reads_blocks(length: int, batch: int) -> None:
    inputs = [rows(count, batch=batch) for count in (1, length, length, 1, 1)]
    result, rewrites, reasons = run(decode, *inputs, verify="all")
    assert rewrites == 1 and not reasons
    torch.testing.assert_close(result, decode(*inputs))


def test_a_graph_that_starts_caches() -> None:
    def start(q: Tensor, k_new: Tensor, v_new: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        nothing = torch.tensor([])
        k, v = torch.cat([nothing, k_new], -2), torch.cat([nothing, v_new], -2)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True), k, v

    q, k, v = rows(70), rows(70), rows(70)
    result, rewrites, _ = run(start, q, k, v)
    assert rewrites == 1
    torch.testing.assert_close(result, (F.scaled_dot_product_attention(q, k, v, is_causal=True), k, v))


def test_symbolic_lengths_make_one_graph() -> None:
    options = {"target": "reference", "strict": True, "kv_cache": "paged"}
    compiled = torch.compile(decode, backend="graphopt", options=options)
    with report.collecting() as collected, torch.no_grad():
        for length in (60, 90, 7):
            inputs = [rows(count) for count in (1, length, length, 1, 1)]
            for cache in inputs[1:3]:
                torch._dynamo.mark_dynamic(cache, 2)
            torch.testing.assert_close(compiled(*inputs), decode(*inputs))
    assert len(collected.graphs) == 1


def test_refuses_a_cache_that_something_else_reads() -> None:
    def read_twice(*inputs: Tensor) -> tuple[Tensor, ...]:
        out, k, v = decode(*inputs)
        return out, k, v, k.sum(2)

    refused(read_twice, rows(1), rows(50), rows(50), rows(1), rows(1), reason="also read by aten.sum")


def test_refuses_a_fixed_cache() -> None:
    def write(q: Tensor, k: Tensor, v: Tensor, new: Tensor, place: Tensor) -> Tensor:
        k.index_copy_(2, place, new)
        v.index_copy_(2, place, new)
        return F.scaled_dot_product_attention(q, k, v)

    inputs = rows(1), rows(50), rows(50), rows(1), torch.tensor([7])
    refused(write, *inputs, reason="fixed size: kv_cache is for growing caches")


def test_says_what_cannot_be_kept_in_blocks() -> None:
    assert "float8" in kv_paged.unsupported_reason(torch.empty(1, 1, 4, 8, dtype=torch.float8_e4m3fn))
    assert "[batch, heads" in kv_paged.unsupported_reason(torch.empty(4, 8))
