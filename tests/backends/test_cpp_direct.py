"""Operators called as plain functions: the same answers and errors as through torch's dispatcher."""

from __future__ import annotations

import inspect
import threading
from typing import Any

import pytest
import torch
from torch import nn
from torch._inductor.select_algorithm import extern_kernels

pytestmark = pytest.mark.usefixtures("cpp_library")
operators = torch.ops.graphopt_cpp
DIRECT = [
    "linear",
    "parallel_linear",
    "quantized_linear",
    "parallel_quantized_linear",
    "quantized_embedding",
    "chain",
    "chain_into",
    "attention",
    "attention_quantized",
    "attention_paged",
]


def direct(name: str) -> Any:
    return getattr(extern_kernels, f"graphopt_{name}")


@pytest.mark.parametrize("name", DIRECT)
def test_every_operator_has_its_function(name: str) -> None:
    assert inspect.isbuiltin(direct(name))


@pytest.mark.parametrize("name", DIRECT)
def test_a_missing_argument_is_refused(name: str) -> None:
    count = len(getattr(operators, name).default._schema.arguments)
    with pytest.raises(TypeError, match=f"expected {count} arguments, got 1"):
        direct(name)(torch.ones(1))


def test_linear_equals_the_operator() -> None:
    x, weight, bias = torch.randn(2, 3, 8), torch.randn(5, 8), torch.randn(5)
    for each in (bias, None):
        assert torch.equal(direct("linear")(x, weight, each), operators.linear(x, weight, each))
    together = direct("parallel_linear")(x, [weight, weight], [bias, None])
    assert all(map(torch.equal, together, operators.parallel_linear(x, [weight, weight], [bias, None])))


def test_attention_equals_the_operator() -> None:
    q, k, v = (torch.randn(1, heads, length, 16) for heads, length in ((4, 2), (2, 7), (2, 7)))
    mask = torch.rand(1, 1, 2, 7) > 0.3
    for rest in ((mask, False, 0.25, 0.0, 0, False), (None, True, 0.5, 30.0, 3, True)):
        assert torch.equal(direct("attention")(q, k, v, *rest), operators.attention(q, k, v, *rest))


@pytest.mark.parametrize(
    "arguments", [("x", None, None), (torch.ones(1), [torch.ones(1)], None), (torch.ones(1), torch.ones(1), 3)]
)
def test_what_is_no_tensor_is_a_type_error(arguments: tuple[Any, ...]) -> None:
    with pytest.raises(TypeError, match="expected a Tensor, got"):
        direct("linear")(*arguments)


def test_arguments_of_other_types_are_refused() -> None:
    q = torch.ones(1, 1, 1, 4)
    with pytest.raises(TypeError, match="real number"):
        direct("attention")(q, q, q, None, True, "1", 0.0, 0, False)
    with pytest.raises(TypeError, match="integer"):
        direct("attention")(q, q, q, None, True, 1.0, 0.0, 0.5, False)
    with pytest.raises(TypeError, match="expected a bool, got int"):
        direct("attention")(q, q, q, None, 1, 1.0, 0.0, 0, False)
    with pytest.raises(TypeError, match="expected a list, got Tensor"):
        direct("parallel_linear")(q, q, [None])


def test_an_error_of_the_operator_is_raised() -> None:
    with pytest.raises(RuntimeError, match="2 weights but 1 biases"):
        direct("parallel_linear")(torch.ones(4), [torch.ones(1, 4)] * 2, [None])


def test_no_gradient_is_recorded() -> None:
    """Also where a wrong shape of call falls back to torch's own linear."""
    weight = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    assert not direct("linear")(torch.randn(3, 8, dtype=torch.float64), weight, None).requires_grad


def test_other_threads_run_meanwhile() -> None:
    """The interpreter's lock is free while a kernel runs: a thread gets through its loop before a long call ends."""
    x, weight = torch.randn(16, 4096), torch.randn(32768, 4096)
    passed = threading.Event()
    ticks: list[int] = []

    def tick() -> None:
        while not passed.is_set():
            ticks.append(len(ticks))

    other = threading.Thread(target=tick)
    other.start()
    before = len(ticks)
    direct("linear")(x, weight, None)
    after = len(ticks)
    passed.set()
    other.join()
    assert after > before


def test_generated_code_calls_the_function() -> None:
    from graphopt.runtime.artifact import Artifact

    sources: list[str] = []
    make_call = Artifact._make_call

    def seen(self: Artifact) -> Any:
        sources.append(self.source)
        return make_call(self)

    module = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).eval()
    x = torch.randn(2, 8)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(Artifact, "_make_call", seen)
        compiled = torch.compile(module, backend="graphopt", options={"target": "cpu"})
        torch.testing.assert_close(compiled(x), module(x))
    assert any("extern_kernels.graphopt_chain(" in source for source in sources)


def test_chain_equals_the_operator() -> None:
    x, weight = torch.randn(2, 3, 8), torch.randn(5, 8)
    given = [x], [weight], []
    text = "silu v0; linear plain v1 w0 -; out v1 v2"
    want = operators.chain(*given, text)
    assert all(map(torch.equal, direct("chain")(*given, text), want))
    outs = [torch.empty_like(each) for each in want]
    assert direct("chain_into")(*given, outs, text) is None
    assert all(map(torch.equal, outs, want))
    with pytest.raises(RuntimeError, match="chain: no values"):
        direct("chain")([], [], [], "out")
    with pytest.raises(RuntimeError, match="no values, or no memory for results"):
        direct("chain_into")(*given, [], text)
