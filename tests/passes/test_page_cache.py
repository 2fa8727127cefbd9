"""page_cache: what it rewrites, and what cannot be kept in blocks; `test_cache_forms.py` has what it refuses."""

from __future__ import annotations

import pytest
import torch

from graphopt.runtime import kv_paged
from tests.passes import cache_programs as programs


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("length", [5, 16, 100])
def test_attention_reads_blocks(length: int, batch: int) -> None:
    inputs = programs.step(length, batch=batch)
    result, rewrites, reasons = programs.run(programs.decode, *inputs, kv_cache="paged", verify="all")
    assert rewrites == 1 and not reasons
    torch.testing.assert_close(result, programs.decode(*inputs))


def test_a_cache_that_a_graph_starts_holds_its_rows() -> None:
    inputs = [programs.rows(70) for _ in range(3)]
    (_, k, v), _, _ = programs.run(programs.start, *inputs, kv_cache="paged")
    assert torch.equal(k, inputs[1]) and torch.equal(v, inputs[2])


def test_says_what_cannot_be_kept_in_blocks() -> None:
    assert "float8" in kv_paged.unsupported_reason(torch.empty(1, 1, 4, 8, dtype=torch.float8_e4m3fn))
    assert "[batch, heads" in kv_paged.unsupported_reason(torch.empty(4, 8))
