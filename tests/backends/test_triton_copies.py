"""Values that replace memory of the caller: one call copies all of them, and the old ones are read before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from graphopt.backends.triton import copies
from graphopt.backends.triton.compile import CompiledGraph
from graphopt.passes.fuse.form_regions import form_regions
from tests.backends.graphs import run


def replaced(function: Callable[..., Any], *inputs: Tensor) -> CompiledGraph:
    """Answers and inputs must be eager's afterwards."""
    mine, theirs = ([tensor.clone() for tensor in inputs] for _ in range(2))
    got, (compiled,) = run(function, *mine, prepare=form_regions)
    torch.testing.assert_close((got, mine), (function(*theirs), theirs))
    assert [tensor._version for tensor in mine] == [tensor._version for tensor in theirs]
    return compiled


def test_counters_are_replaced_by_one_call() -> None:
    def function(a: Tensor, b: Tensor, x: Tensor) -> Tensor:
        y = x * a
        a.add_(1)
        z = y + b
        b.add_(x.shape[0])
        return z

    compiled = replaced(function, torch.tensor(3), torch.tensor(5), torch.randn(4))
    (line,) = [line for line in compiled.source.splitlines() if "_foreach_copy_" in line]
    assert compiled.fallbacks == [] and line.count("arg") == 2


def test_memory_that_is_returned_once_it_is_replaced() -> None:
    def function(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        a.add_(1)
        b.mul_(a)
        return a, b

    assert replaced(function, torch.tensor(3), torch.tensor(5)).fallbacks == []


def test_memory_that_is_exchanged() -> None:
    def function(a: Tensor, b: Tensor) -> Tensor:
        before = a.clone()
        a.copy_(b)
        b.copy_(before)
        return a - b

    assert replaced(function, torch.randn(3), torch.randn(3)).fallbacks == []


def test_memory_that_is_handed_on() -> None:
    def function(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        c.copy_(b)
        b.copy_(a)
        a.mul_(2)
        return a + b + c

    assert replaced(function, torch.randn(3), torch.randn(3), torch.randn(3)).fallbacks == []


def test_parts_of_one_tensor_and_other_dtypes() -> None:
    def function(a: Tensor, b: Tensor, n: Tensor) -> Tensor:
        a[1:].mul_(2)
        b.t().add_(a[:2])
        n.add_(1)
        return a.sum() + n

    compiled = replaced(function, torch.randn(3, 2), torch.randn(2, 2), torch.tensor(1))
    assert compiled.source.count("torch._foreach_copy_(") == 2 and compiled.fallbacks == []


def test_one_call_reads_nothing_that_it_writes() -> None:
    graph = torch.fx.Graph()
    a, b, c, d, wide = (graph.placeholder(name) for name in "abcdw")
    for node in (a, b, c, d):
        node.meta["val"] = torch.empty(3)
    wide.meta["val"] = torch.empty(3, dtype=torch.float64)
    pairs = ((a, b), (c, d), (b, d), (a, d), (d, c), (wide, wide))
    made = [graph.call_function(torch.ops.aten.copy_.default, pair) for pair in pairs]
    together = [[made.index(node) for node in run] for run in copies.runs([*made, graph.output((a,))]).values()]
    # b was read, a is written again beside it; d was read; float64 is another call.
    assert together == [[0, 1], [2, 3], [4], [5]]


@pytest.mark.parametrize("name", ["memory of another dtype", "a value that is broadcast"])
def test_what_is_more_than_moved_is_listed(name: str) -> None:
    graph = torch.fx.Graph()
    to, value = graph.placeholder("to"), graph.placeholder("value")
    to.meta["val"] = torch.empty(3)
    value.meta["val"] = torch.empty(3, dtype=torch.int64) if "dtype" in name else torch.empty(1)
    copy = graph.call_function(torch.ops.aten.copy_.default, (to, value))
    assert not copies.is_plain(copy) and copies.runs([copy]) == {}
    value.meta["val"] = torch.empty(3)
    assert copies.is_plain(copy) and copies.runs([copy, graph.output((to,))]) == {copy: [copy]}


def test_a_llama_with_a_cache_of_fixed_size_leaves_nothing_to_torch() -> None:
    transformers = pytest.importorskip("transformers")
    from tests.backends.test_triton_models import decoder

    torch.manual_seed(0)
    model = decoder("Llama")(2)

    def tokens(call: Any) -> Tensor:
        cache, ids, found = transformers.StaticCache(config=model.config, max_cache_len=8), torch.arange(4)[None], []
        with torch.no_grad():
            for _ in range(3):
                ids = call(input_ids=ids, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
                found.append(ids)
        assert [int(layer.cumulative_length) for layer in cache.layers] == [6, 6]
        return torch.cat(found, 1)

    torch._dynamo.reset()
    options: Any = {"target": "triton", "strict": True}
    assert tokens(torch.compile(model.forward, backend="graphopt", options=options)).equal(tokens(model))
