"""quantize_cache: what it rewrites, and what it refuses and why; `test_cache_forms.py` has what others refuse too."""

from __future__ import annotations

import pytest
import torch

from graphopt.quantization import cache_operations as layout
from tests.passes import cache_programs as programs
from tests.passes.cache_programs import decode

OPS = torch.ops.graphopt


@pytest.mark.parametrize("kind", layout.KINDS)
@pytest.mark.parametrize("length", [5, 100])
def test_attention_reads_quantised_rows(kind: str, length: int) -> None:
    inputs = programs.step(length)
    (out, k, v), rewrites, reasons = programs.run(decode, *inputs, kv_dtype=kind)
    assert rewrites == 1 and not reasons
    assert torch.equal(k[:, :, :length], OPS.kv_quantize(inputs[1], kind, True)[:, :, :length])
    assert torch.equal(k[:, :, length:], inputs[3]) and torch.equal(v[:, :, length:], inputs[4])
    past = [OPS.kv_quantize(value, kind, keys) for value, keys in ((inputs[1], True), (inputs[2], False))]
    torch.testing.assert_close(out, decode(inputs[0], *past, *inputs[3:])[0])


def test_a_cache_that_a_graph_starts_is_quantised() -> None:
    inputs = [programs.rows(70) for _ in range(3)]
    (_, k, v), _, _ = programs.run(programs.start, *inputs, kv_dtype="int4")
    assert torch.equal(k, OPS.kv_quantize(inputs[1], "int4", True))
    assert torch.equal(v, OPS.kv_quantize(inputs[2], "int4", False))


def test_refuses_pairs_of_odd_heads() -> None:
    programs.assert_refused(decode, *programs.step(50, size=7), reason="cannot be packed in pairs", kv_dtype="int4")


def test_refuses_another_dtype() -> None:
    programs.assert_refused(decode, *programs.step(50, dtype=torch.float64), reason="of float64", kv_dtype="int8")
