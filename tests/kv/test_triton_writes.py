"""New rows that generated kernels store straight into a cache: no launch of their own, and the rows of eager."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

from graphopt import backend, counters, ops, pipeline
from graphopt.backends.triton.compile import CompiledGraph
from graphopt.options import Options
from tests.backends.graphs import run
from tests.kv import scenarios

transformers = pytest.importorskip("transformers")
pytest.importorskip("triton")

SMALL = dict(hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, vocab_size=99)


def compiled(model: Any, **options: Any) -> Any:
    chosen = {"target": "triton", "strict": True, **options}
    model.forward = torch.compile(model.forward, backend="graphopt", options=chosen)
    return model


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[CompiledGraph]:
    """What graphs become, in the order in which they are compiled."""
    made: list[CompiledGraph] = []
    build = CompiledGraph._build

    def built(self: CompiledGraph) -> None:
        build(self)
        made.append(self)

    monkeypatch.setattr(CompiledGraph, "_build", built)
    return made


def prepare(graph_module: GraphModule) -> None:
    options = Options(target="triton")
    pipeline.run(graph_module, backend.arranged(options, "triton"), options)


@pytest.mark.rotate(one_in=3)
@pytest.mark.parametrize("options", [{}, {"kv_dtype": "int8"}, {"kv_cache": "paged"}], ids=["plain", "int8", "paged"])
def test_token_by_token_with_growth_in_between(options: dict[str, str], steps: list[CompiledGraph]) -> None:
    model, before = compiled(scenarios.tiny_llama(), **options), counters["kv_copies"]
    token, cache = scenarios.step(model, scenarios.prompt(7), None)
    started = counters["kv_copies"]
    mine = scenarios.follow(model, token, cache, 45)
    token, cache = scenarios.step(scenarios.tiny_llama(), scenarios.prompt(7), None)
    assert torch.equal(torch.cat(mine), torch.cat(scenarios.follow(scenarios.tiny_llama(), token, cache, 45)))
    assert options or (before == started < counters["kv_copies"])  # the other forms have room of fixed sizes
    assert len(steps) > 1 and not any(step.fallbacks for step in steps)
    assert not any("graphopt.kv_write" in step.source for step in steps)


def test_a_layer_is_five_launches_and_nothing_else(steps: list[CompiledGraph]) -> None:
    counts = []
    for layers in (2, 3):
        torch._dynamo.reset()
        model = compiled(scenarios.tiny_llama(layers))
        token, cache = scenarios.step(model, scenarios.prompt(7), None)
        scenarios.follow(model, token, cache, 1)
        assert steps[-1].fallbacks == []
        counts.append(steps[-1].launches)
    assert counts[1] - counts[0] == 5


def test_a_batch_with_padding_on_the_left(steps: list[CompiledGraph]) -> None:
    mine = scenarios.left_padded(compiled(scenarios.tiny_llama()))
    assert torch.equal(mine, scenarios.left_padded(scenarios.tiny_llama()))
    assert steps and not any("graphopt.kv_write" in step.source for step in steps)


@pytest.mark.rotate(one_in=3)
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_cache_shows_the_new_rows_and_keeps_the_old(dtype: torch.dtype, rows: int) -> None:
    model = scenarios.tiny_llama().to(dtype)
    _, cache = scenarios.step(model, scenarios.prompt(9, batch=2), None)
    mine = compiled(scenarios.tiny_llama().to(dtype))
    _, other = scenarios.step(mine, scenarios.prompt(9, batch=2), None)
    for seed in range(3):
        old = [layer.keys.clone() for layer in other.layers]
        tokens = scenarios.prompt(rows, batch=2, seed=seed)
        _, cache = scenarios.step(model, tokens, cache)
        _, other = scenarios.step(mine, tokens, other)
        for layer, expected, kept in zip(other.layers, cache.layers, old, strict=True):
            assert torch.equal(layer.keys[:, :, :-rows], kept)
            torch.testing.assert_close(layer.keys, expected.keys, rtol=2e-2, atol=2e-2)
            torch.testing.assert_close(layer.values, expected.values, rtol=2e-2, atol=2e-2)
            if dtype == torch.float32:
                torch.testing.assert_close(layer.values, expected.values, rtol=1e-4, atol=1e-5)


def qwen3() -> Any:
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SMALL, num_hidden_layers=1, head_dim=16))


def gpt2() -> Any:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=99))


def decode(build: Callable[[], Any]) -> tuple[list[Tensor], list[Tensor], CompiledGraph]:
    """The logits, keys and values of one step, by kernels and by eager; and the compiled step."""
    torch.manual_seed(0)
    model = build().eval()
    past = transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.randint(0, 99, (2, 6)), past_key_values=past)
    rows = [x for layer in past.layers for x in (layer.keys, layer.values)]

    def step(ids: Tensor, *rows: Tensor) -> list[Tensor]:
        cache = transformers.DynamicCache(list(zip(rows[::2], rows[1::2], strict=True)), config=model.config)
        result = model(input_ids=ids, past_key_values=cache, use_cache=True).logits
        return [result, *(x for layer in cache.layers for x in (layer.keys, layer.values))]

    ids = torch.randint(0, 99, (2, 1))
    with torch.no_grad():
        want = step(ids, *rows)
    got, (made,) = run(step, ids, *rows, prepare=prepare)
    return got, want, made


@pytest.mark.parametrize("build", [qwen3, gpt2])
def test_rows_made_by_norms_and_by_products(build: Callable[[], Any]) -> None:
    """Qwen3's keys come from a norm and rotation, its values from a product, GPT-2's rows from parts of a product."""
    got, want, made = decode(build)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
    writing = [kernel.kind for kernel in made.kernels.values() if " within [" in "\n".join(kernel.comment)]
    assert writing == (["linear", "rows"] if build is qwen3 else ["linear"])
    assert "graphopt.kv_write" not in made.source


def test_a_kernel_that_fails_behind_a_write_is_left_out() -> None:
    """The rows are written again when the call is made again."""
    torch.manual_seed(0)
    x, w, past = torch.randn(1, 1, 8), torch.randn(8, 8), torch.randn(1, 2, 5, 4)

    def step(x: Tensor, w: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
        rows = torch.nn.functional.linear(x, w).view(1, 1, 2, 4).transpose(1, 2)
        grown = torch.cat([past, rows], 2)
        return torch.nn.functional.scaled_dot_product_attention(rows, grown, grown), grown

    want = step(x, w, past)
    got, (made,) = run(step, x, w, past, prepare=prepare)
    assert made.launches == 2
    ordinary = made.namespace["launch"]

    def launch(kernel: Any, grid: int, *arguments: Any, **constants: Any) -> Any:
        if "attention" in kernel.fn.__name__:
            raise RuntimeError("out of resource")
        return ordinary(kernel, grid, *arguments, **constants)

    made.namespace["launch"] = made._guarded(launch)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(tuple(made(x, w, past)), want)
    assert made.launches == 1 and any("out of resource" in each.reason for each in made.fallbacks)


def test_a_region_without_a_kernel_writes_by_its_own_graph() -> None:
    made_graphs: list[GraphModule] = []
    past, new = torch.randn(1, 2, 5, 4), torch.randn(1, 2, 1, 4)

    def step(past: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
        grown = torch.cat([past, new.relu()], 2)
        return torch.nn.functional.scaled_dot_product_attention(new, grown, grown), grown

    def refuse(graph_module: GraphModule) -> None:
        prepare(graph_module)
        made_graphs.append(graph_module)
        for region in graph_module.children():
            for node in region.graph.find_nodes(op="call_function", target=torch.ops.aten.relu.default):  # type: ignore[operator, union-attr]
                node.target = torch.ops.aten.relu_.default  # no rule of the generator's

    got, (made,) = run(step, past, new.clone(), prepare=refuse)
    assert any(region.graph.find_nodes(op="call_function", target=ops.kv_write) for region in made_graphs[0].children())  # type: ignore[operator, union-attr]
    assert torch.equal(got[1], torch.cat([past, new.relu()], 2)) and "graphopt.kv_write" in made.source


LENGTH, USED = 96, 32
"""The size of a cache, and of its blocks that attention reads after a few tokens."""


def fixed_caches(model: Any, batch: int = 1) -> tuple[Tensor, Any]:
    """The next token and a cache of fixed size after an eager prefill."""
    cache = transformers.StaticCache(config=model.config, max_cache_len=LENGTH)
    return scenarios.step(model, scenarios.prompt(batch=batch), cache)


@pytest.mark.rotate(one_in=2)
@pytest.mark.parametrize("options", [{}, {"verify": "all"}], ids=["", "verified"])
def test_steps_with_caches_of_fixed_size(steps: list[CompiledGraph], options: dict[str, str]) -> None:
    """One compiled step serves all places, writes the rows where the device says, and reads no block behind them."""
    model, twin = scenarios.tiny_llama(2), scenarios.tiny_llama(2)
    (token, cache), (_, other) = fixed_caches(model), fixed_caches(twin)
    forward = torch.compile(model.forward, backend="graphopt", options={"target": "triton", **options})
    addresses = [(layer.keys.data_ptr(), layer.values.data_ptr()) for layer in cache.layers]
    for layer in cache.layers:
        layer.keys[:, :, USED:] = layer.values[:, :, USED:] = torch.nan
    for used in range(8, 12):
        seen = (torch.arange(LENGTH) < used)[None, None, None]
        given = {"attention_mask": seen, "position_ids": torch.tensor([[used - 1]])}
        with torch.no_grad():
            got = forward(token, past_key_values=cache, **given).logits
            want = twin(token, past_key_values=other, **given).logits
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        token = want.argmax(-1)
    assert addresses == [(layer.keys.data_ptr(), layer.values.data_ptr()) for layer in cache.layers]
    for layer, expected in zip(cache.layers, other.layers, strict=True):
        for mine, theirs in ((layer.keys, expected.keys), (layer.values, expected.values)):
            torch.testing.assert_close(mine[:, :, :USED], theirs[:, :, :USED], rtol=1e-4, atol=1e-5)
            assert mine[:, :, USED:].isnan().all()
            assert options or mine._version == theirs._version + 1  # once for NaN
    (made,) = steps
    assert made.fallbacks == [] and "graphopt.kv_write_at" not in made.source
    assert "torch._foreach_copy_(" in made.source  # the counters of the caches


def test_tokens_with_caches_of_fixed_size() -> None:
    settings = {"max_new_tokens": 6, "do_sample": False, "cache_implementation": "static"}
    expected = scenarios.tiny_llama().generate(scenarios.prompt(batch=2), **settings)
    model = scenarios.tiny_llama()
    model.forward = torch.compile(model.forward, backend="graphopt", options={"target": "triton"})
    assert torch.equal(model.generate(scenarios.prompt(batch=2), **settings), expected)


@pytest.mark.parametrize("dim", [0, 1, 2, -1])
@pytest.mark.parametrize("made_by", ["rows", "product"])
def test_rows_go_to_the_places_that_a_tensor_names(made_by: str, dim: int) -> None:
    sizes = [3, 2, 4, 5]
    whole = list(sizes)
    whole[dim] = 7
    cache, x, w = torch.randn(whole), torch.randn(6, 8), torch.randn(20, 8)
    places = torch.randperm(7)[: sizes[dim]]

    def step(cache: Tensor, x: Tensor, w: Tensor, places: Tensor) -> Tensor:
        made = torch.nn.functional.linear(x, w) if made_by == "product" else (x @ w.T).view(-1).relu() + 0
        rows = made.view(3, 2, 20).view(2, 3, 4, 5).transpose(0, 1) if made_by == "product" else made.view(sizes)
        cache.index_copy_(dim, places, rows)
        return cache.sum(-1)

    mine = cache.clone()
    want = step(cache, x, w, places)
    got, (made,) = run(step, mine, x, w, places, prepare=prepare)
    torch.testing.assert_close((got, mine), (want, cache), rtol=1e-4, atol=1e-4)
    assert made.fallbacks == [] and "graphopt.kv_write_at" not in made.source


def test_places_that_a_cache_does_not_have_are_not_written() -> None:
    """Eager raises there; a kernel must not write into memory of others."""
    memory = torch.zeros(9, 4)

    def step(cache: Tensor, rows: Tensor, places: Tensor) -> Tensor:
        cache.index_copy_(0, places, rows.relu())
        return cache * 2

    cache, rows = memory[2:7], torch.rand(5, 4) + 1
    got, _ = run(step, cache, rows, torch.arange(5), prepare=prepare)
    assert torch.equal(got, 2 * rows)
    memory.zero_()
    _, (made,) = run(step, cache, rows, torch.tensor([4, 3, 2, 1, 0]), prepare=prepare)
    memory.zero_()
    made(cache, rows, torch.tensor([-1, 5, 2, 6, -2]))
    assert torch.equal(memory[4], rows[2]) and memory.count_nonzero() == 4


@pytest.mark.parametrize("dim", [0, 1])
def test_places_of_a_cache_whose_size_is_symbolic(dim: int) -> None:
    def step(cache: Tensor, rows: Tensor, places: Tensor) -> Tensor:
        cache.index_copy_(dim, places, rows.relu() + 1)
        return cache * 2

    cache, rows = torch.randn(9, 7), torch.randn((3, 7) if dim == 0 else (9, 3))
    mine, places = cache.clone(), torch.tensor([2, 6, 5])
    want = step(cache, rows, places)
    got, (made,) = run(step, mine, rows, places, prepare=prepare, dynamic=True)
    torch.testing.assert_close((got, mine), (want, cache))
    assert made.fallbacks == [] and "graphopt.kv_write_at" not in made.source
