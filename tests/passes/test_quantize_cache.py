"""quantize_cache: what it rewrites, and what it refuses and why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from graphopt import report
from graphopt.quantization import cache_operations as layout

B, H, D = 2, 3, 8
OPS = torch.ops.graphopt


def rows(count: int, dtype: torch.dtype = torch.float32, size: int = D) -> Tensor:
    return torch.randn(B, H, count, size).to(dtype)


def run(function: Callable[..., Any], *inputs: Tensor, kind: str = "int8") -> tuple[Any, int, list[str]]:
    """The compiled function's result, the rewrites and the refusals of the pass."""
    options = {"target": "reference", "strict": True, "kv_dtype": kind}
    with report.collecting() as collected, torch.no_grad():
        result = torch.compile(function, backend="graphopt", options=options)(*inputs)
    (entry,) = [entry for graph in collected.graphs for entry in graph.passes if entry.name == "quantize_cache"]
    return result, entry.rewrites, [refusal.reason for refusal in entry.refusals]


def decode(q: Tensor, k_past: Tensor, v_past: Tensor, k_new: Tensor, v_new: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    k, v = torch.cat([k_past, k_new], 2), torch.cat([v_past, v_new], 2)
    return F.scaled_dot_product_attention(q, k, v), k, v


def refused(function: Callable[..., Any], *inputs: Tensor, reason: str, kind: str = "int8") -> None:
    expected = function(*(value.clone() for value in inputs))
    result, rewrites, reasons = run(function, *inputs, kind=kind)
    assert rewrites == 0 and [reason in given for given in reasons] == [True], reasons
    torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("kind", layout.KINDS)
@pytest.mark.parametrize("length", [5, 100])
def test_attention_reads_quantised_rows(kind: str, length: int) -> None:
    inputs = [rows(1), rows(length), rows(length), rows(1), rows(1)]
    (out, k, v), rewrites, reasons = run(decode, *inputs, kind=kind)
    assert rewrites == 1 and not reasons
    assert torch.equal(k[:, :, :length], OPS.kv_quantize(inputs[1], kind, True)[:, :, :length])
    assert torch.equal(k[:, :, length:], inputs[3]) and torch.equal(v[:, :, length:], inputs[4])
    past = [OPS.kv_quantize(value, kind, keys) for value, keys in ((inputs[1], True), (inputs[2], False))]
    torch.testing.assert_close(out, decode(inputs[0], *past, *inputs[3:])[0])


@pytest.mark.parametrize("batch", [2, 3])
def test_second_batch_size_and_symbolic_lengths(batch: int) -> None:
    options = {"target": "reference", "strict": True, "kv_dtype": "int8"}
    compiled = torch.compile(decode, backend="graphopt", options=options)
    with report.collecting() as collected, torch.no_grad():
        for length in (60, 90, 7):
            q, k_past, v_past, k, v = (torch.randn(batch, H, n, D) for n in (1, length, length, 1, 1))
            past = OPS.kv_quantize(k_past, "int8", True), OPS.kv_quantize(v_past, "int8", False)
            for cache in (k_past, v_past):
                torch._dynamo.mark_dynamic(cache, 2)
            torch.testing.assert_close(compiled(q, k_past, v_past, k, v)[0], decode(q, *past, k, v)[0])
    assert len(collected.graphs) == 1


def test_a_graph_that_starts_caches_attends_exactly() -> None:
    def start(q: Tensor, k_new: Tensor, v_new: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        nothing = torch.tensor([])
        k, v = torch.cat([nothing, k_new], -2), torch.cat([nothing, v_new], -2)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True), k, v

    q, k, v = rows(70), rows(70), rows(70)
    result, rewrites, _ = run(start, q, k, v, kind="int4")
    assert rewrites == 1
    torch.testing.assert_close(result[0], F.scaled_dot_product_attention(q, k, v, is_causal=True))
    assert torch.equal(result[1], OPS.kv_quantize(k, "int4", True))
    assert torch.equal(result[2], OPS.kv_quantize(v, "int4", False))


def test_refuses_a_cache_that_something_else_reads() -> None:
    def read_twice(*inputs: Tensor) -> tuple[Tensor, ...]:
        out, k, v = decode(*inputs)
        return out, k, v, k.sum(2)

    refused(read_twice, rows(1), rows(50), rows(50), rows(1), rows(1), reason="also read by aten.sum")


def test_refuses_a_sliding_window() -> None:
    def slide(*inputs: Tensor) -> tuple[Tensor, ...]:
        out, k, v = decode(*inputs)
        return out, k[:, :, -49:], v[:, :, -49:]

    refused(slide, rows(1), rows(50), rows(50), rows(1), rows(1), reason="sliding-window")


def test_says_that_no_attention_was_recognised() -> None:
    def by_hand(q: Tensor, past: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
        k = torch.cat([past, new], 2)
        return torch.matmul(q, k.transpose(-1, -2)).relu(), k

    refused(by_hand, rows(1), rows(50), rows(1), reason="no attention that graphopt recognises reads it")


def test_refuses_one_cache_for_keys_and_values() -> None:
    def shared(q: Tensor, past: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
        both = torch.cat([past, new], 2)
        return F.scaled_dot_product_attention(q, both, both), both

    refused(shared, rows(1), rows(50), rows(1), reason="not caches of their own")


def test_refuses_pairs_of_odd_heads() -> None:
    inputs = [rows(count, size=7) for count in (1, 50, 50, 1, 1)]
    refused(decode, *inputs, reason="cannot be packed in pairs", kind="int4")


def test_refuses_another_dtype() -> None:
    inputs = [rows(count, torch.float64) for count in (1, 50, 50, 1, 1)]
    refused(decode, *inputs, reason="of float64")


def test_refuses_a_fixed_cache() -> None:
    def write(q: Tensor, k: Tensor, v: Tensor, new: Tensor, place: Tensor) -> Tensor:
        k.index_copy_(2, place, new)
        v.index_copy_(2, place, new)
        return F.scaled_dot_product_attention(q, k, v)

    inputs = rows(1), rows(50), rows(50), rows(1), torch.tensor([7])
    refused(write, *inputs, reason="fixed size: kv_dtype is for growing caches")
