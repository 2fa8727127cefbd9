"""What page_cache and quantize_cache share (`passes/kv_cache/forms.py`): the lengths they take, why they refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from graphopt import report
from tests.passes import cache_programs as programs
from tests.passes.cache_programs import rows

FORMS = pytest.mark.parametrize(
    "form", [{"kv_cache": "paged"}, {"kv_dtype": "int8"}], ids=lambda form: "-".join(*form.items())
)


@FORMS
@pytest.mark.parametrize("batch", [2, 3])
def test_one_graph_for_all_lengths(form: dict[str, Any], batch: int) -> None:
    compiled = programs.compiled(programs.decode, **form)
    with report.collecting() as collected, torch.no_grad():
        for length in (60, 90, 7):
            q, k_past, v_past, *new = programs.step(length, batch=batch)
            past = programs.shown(k_past, True, **form), programs.shown(v_past, False, **form)
            for cache in (k_past, v_past):
                torch._dynamo.mark_dynamic(cache, 2)
            out, k, v = compiled(q, k_past, v_past, *new)
            torch.testing.assert_close(out, programs.decode(q, *past, *new)[0])
            assert k.shape == v.shape == (batch, programs.H, length + 1, programs.D)
            assert torch.equal(k[:, :, -1:], new[0]) and torch.equal(v[:, :, -1:], new[1])
    assert len(collected.graphs) == 1


@FORMS
def test_a_graph_that_starts_caches_attends_exactly(form: dict[str, Any]) -> None:
    inputs = rows(70), rows(70), rows(70)
    (out, k, v), rewrites, _ = programs.run(programs.start, *inputs, **form)
    expected, *_ = programs.start(*inputs)
    assert rewrites == 1 and k.shape == v.shape == inputs[1].shape
    torch.testing.assert_close(out, expected)


@FORMS
@pytest.mark.parametrize(
    ("function", "counts", "reason"),
    [
        (programs.read_twice, (1, 50, 50, 1, 1), "also read by aten.sum"),
        (programs.slide, (1, 50, 50, 1, 1), "sliding-window"),
        (programs.by_hand, (1, 50, 1), "no attention that graphopt recognises reads it"),
        (programs.keys_are_values, (1, 50, 1), "not caches of their own"),
    ],
    ids=["read by something else", "sliding window", "attention by hand", "one cache for both"],
)
def test_refuses(form: dict[str, Any], function: Callable[..., Any], counts: tuple[int, ...], reason: str) -> None:
    programs.assert_refused(function, *(rows(count) for count in counts), reason=reason, **form)


@FORMS
def test_refuses_a_fixed_cache(form: dict[str, Any]) -> None:
    inputs: tuple[Tensor, ...] = rows(1), rows(50), rows(50), rows(1), torch.tensor([7])
    reason = f"fixed size: {next(iter(form))} is for growing caches"
    programs.assert_refused(programs.write_in_place, *inputs, reason=reason, **form)
