"""The Triton target through the public door: `torch.compile(..., options={"target": "triton"})` on CPU tensors."""

from __future__ import annotations

import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import LlamaConfig, LlamaForCausalLM

import graphopt
from graphopt import backends, report
from graphopt.backends.triton import interpret
from graphopt.backends.triton.compile import KernelFailed
from graphopt.testing import check_model


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(
        LlamaConfig(hidden_size=64, intermediate_size=128, vocab_size=100, **shape)  # type: ignore[arg-type]
    ).eval()


def test_generate_with_a_growing_cache_gives_eager_tokens() -> None:
    model, ids = tiny_llama(), torch.arange(14).view(2, 7)
    expected = model.generate(ids, max_new_tokens=8, do_sample=False)
    model.compile(backend="graphopt", options={"target": "triton"})
    assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False), expected)


def test_auto_leaves_gpus_to_inductor() -> None:
    with FakeTensorMode():
        on_gpu = torch.empty(2, device="cuda:0")
    assert backends.resolve("auto", [3, on_gpu]) == "inductor"
    assert backends.resolve("auto", [3, torch.empty(2)]) == "cpu"
    assert backends.resolve("triton", [torch.empty(2)]) == "triton"


def test_report_names_kernels_and_what_was_left_to_torch() -> None:
    with torch.no_grad():
        found = graphopt.explain(tiny_llama(), torch.arange(7)[None], options={"target": "triton"})
    (graph,) = found.graphs
    assert graph.target == "triton"
    assert {choice.lowering for choice in graph.lowerings} == {"triton"}
    assert all(fallback.reason for fallback in graph.fallbacks)


def test_without_triton_the_graph_runs_and_the_report_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    before = graphopt.counters["fallbacks"]
    compiled = torch.compile(lambda x: torch.softmax(x * 2, -1), backend="graphopt", options={"target": "triton"})
    x = torch.randn(3, 5)
    torch.testing.assert_close(compiled(x), torch.softmax(x * 2, -1))
    assert graphopt.counters["fallbacks"] > before


def test_softmax_and_a_reduction_over_rows() -> None:
    check_model(lambda x: torch.softmax(x * 2, -1).sum(0), torch.randn(3, 41), options={"target": "triton"})


def softmax(x: torch.Tensor) -> torch.Tensor:
    return torch.softmax(x * 2, -1)


def test_a_kernel_that_fails_is_named_in_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **constants: object) -> None:
        raise RuntimeError("out of resource: shared memory")

    monkeypatch.setattr(interpret, "launch", fail)
    x, failure = torch.randn(3, 5), "RuntimeError: out of resource: shared memory"
    with report.collecting() as collected:
        torch.testing.assert_close(torch.compile(softmax, backend="graphopt", options={"target": "triton"})(x),
                                   softmax(x))
    (fallback,) = collected.graphs[0].fallbacks
    assert (fallback.what, fallback.reason) == ("kernel_0_rows", f"the kernel failed: {failure}")
    torch.compiler.reset()
    strict = torch.compile(softmax, backend="graphopt", options={"target": "triton", "strict": True})
    with pytest.raises(KernelFailed, match=f"kernel_0_rows: {failure}"):
        strict(x)


def test_a_device_without_kernels_runs_and_the_report_says_so() -> None:
    x, reason = torch.empty(3, 5, device="meta"), "tensors are on 'meta', and kernels run on 'cuda'"
    with report.collecting() as collected:
        assert torch.compile(softmax, backend="graphopt", options={"target": "triton"})(x).shape == (3, 5)
    assert reason in collected.graphs[0].fallbacks[0].reason
    torch.compiler.reset()
    strict = torch.compile(softmax, backend="graphopt", options={"target": "triton", "strict": True})
    with pytest.raises(Exception, match=reason):
        strict(x)
