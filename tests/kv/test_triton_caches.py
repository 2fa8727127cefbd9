"""Caches of every form under generated Triton (interpreted): tokens are eager's, and nothing is copied for a token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from graphopt import counters
from graphopt.runtime.kv_paged import PagedCache
from graphopt.runtime.kv_quantized import QuantizedCache
from tests.kv import scenarios

pytest.importorskip("triton")
FORMS: dict[str, dict[str, str]] = {
    "plain": {},
    "paged": {"kv_cache": "paged"},
    "int8": {"kv_dtype": "int8"},
    "int4": {"kv_dtype": "int4"},
}
QUICK = (scenarios.crop_then_continue, "paged")


def compiled(**options: Any) -> Any:
    model = scenarios.tiny_llama()
    chosen = {"target": "triton", "strict": True, **options}
    model.forward = torch.compile(model.forward, backend="graphopt", options=chosen)
    return model


@pytest.mark.parametrize(
    ("scenario", "form"),
    [
        pytest.param(one, form, id=f"{one.__name__}-{form}", marks=() if (one, form) == QUICK else pytest.mark.slow)
        for one in scenarios.SCENARIOS
        for form in ("plain", "paged", "int8")
    ],
)
def test_tokens_are_those_of_eager(scenario: Callable[[Any], Tensor], form: str) -> None:
    """Quantised caches are short here: nearly all rows are still in full precision."""
    assert torch.equal(scenario(compiled(**FORMS[form])), scenario(scenarios.tiny_llama()))


@pytest.mark.rotate(one_in=3)
@pytest.mark.parametrize(("form", "kind"), [("plain", Tensor), ("paged", PagedCache), ("int4", QuantizedCache)])
def test_two_graphs_caches_of_their_form_and_few_copies(form: str, kind: type[Tensor]) -> None:
    model, before = compiled(**FORMS[form]), counters.copy()
    token, cache = scenarios.step(model, scenarios.prompt(70), None)
    scenarios.follow(model, token, cache, 6)
    assert counters["graphs"] - before["graphs"] == 2
    assert all(type(layer.keys) is type(layer.values) is kind for layer in cache.layers)
    rows = cache.layers[0].keys
    whole = 2 * rows.numel() * rows.element_size()
    assert counters["kv_bytes_copied"] - before["kv_bytes_copied"] < 3 * whole
