"""Products of two-byte numbers by way of float32: each against float64, and which are left alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from graphopt import _compat
from graphopt.backends import wide_products

aten = torch.ops.aten
DTYPES = pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)


def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    out, sums = aten._scaled_dot_product_flash_attention_for_cpu.default(q, k, v)
    return out, sums, *aten._scaled_dot_product_flash_attention_for_cpu_backward.default(
        torch.ones_like(out), q, k, v, out, sums, 0.0, False
    )


def convolve(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    settings = ([1, 1], [0, 0], [1, 1], False, [0, 0], 1)
    out = aten.convolution.default(x, weight, bias, *settings)
    gradients = aten.convolution_backward.default(torch.ones_like(out), x, weight, [4], *settings, [False, True, True])
    return out, *gradients[1:]


PRODUCTS: dict[str, tuple[Callable[..., Any], list[tuple[int, ...]]]] = {
    "mm": (torch.mm, [(5, 33), (33, 7)]),
    "mm of views": (lambda a, b: torch.mm(a.t(), b.t()), [(33, 5), (7, 33)]),
    "addmm": (lambda c, a, b: torch.addmm(c, a, b, beta=0.5, alpha=2), [(7,), (5, 33), (33, 7)]),
    "bmm": (torch.bmm, [(3, 5, 33), (3, 33, 7)]),
    "baddbmm": (lambda c, a, b: torch.baddbmm(c, a, b, beta=0), [(3, 5, 7), (3, 5, 33), (3, 33, 7)]),
    "empty": (torch.mm, [(5, 0), (0, 7)]),
    "attention": (attend, [(2, 3, 17, 16), (2, 3, 17, 16), (2, 3, 17, 16)]),
    "convolution": (convolve, [(2, 3, 9, 9), (4, 3, 2, 2), (4,)]),
    "convolution in channels last": (
        lambda x, *more: convolve(x.to(memory_format=torch.channels_last), *more),
        [(2, 3, 9, 9), (4, 3, 2, 2), (4,)],
    ),
}


@DTYPES
@pytest.mark.parametrize("name", PRODUCTS)
def test_each_product(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_compat, "multiplies_fast", lambda dtype: dtype.itemsize > 2)
    function, sizes = PRODUCTS[name]
    inputs = [torch.randn(size).to(dtype) for size in sizes]
    graph_module = make_fx(function, tracing_mode="fake")(*inputs)
    graph_module.graph.eliminate_dead_code()  # as captured graphs are
    before = {str(node.target) for node in graph_module.graph.nodes if node.target in wide_products._PRODUCTS}
    wide_products.widen(graph_module)
    graph_module.graph.lint()
    graph_module.recompile()
    products = [node for node in graph_module.graph.nodes if node.target in wide_products._PRODUCTS]
    assert before and {str(node.target) for node in products} == before
    for node in products:
        values = [operand.meta["val"] for operand in node.all_input_nodes]
        assert all(value.dtype is torch.float32 for value in values if isinstance(value, Tensor))
    got, eager, want = (torch.utils._pytree.tree_leaves(f(*i)) for f, i in (
        (graph_module, inputs), (function, inputs), (function, [x.double() for x in inputs])
    ))  # fmt: skip
    for mine, its, exact in zip(got, eager, want, strict=True):
        assert (mine.dtype, mine.shape, mine.stride()) == (its.dtype, its.shape, its.stride())
        scale = exact.abs().max() if exact.numel() else 0
        assert ((mine.double() - exact).abs() <= 4 * torch.finfo(dtype).eps * scale).all()


def test_numbers_that_are_fast_stay() -> None:
    graph_module = make_fx(torch.mm, tracing_mode="fake")(torch.randn(5, 33), torch.randn(33, 7))
    code = graph_module.code
    wide_products.widen(graph_module)
    assert graph_module.code == code


@DTYPES
def test_tensors_elsewhere_stay(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_compat, "multiplies_fast", lambda dtype: dtype.itemsize > 2)
    inputs = [torch.empty(size, dtype=dtype, device="meta") for size in ((5, 33), (33, 7))]
    graph_module = make_fx(torch.mm, tracing_mode="fake")(*inputs)
    code = graph_module.code
    wide_products.widen(graph_module)
    assert graph_module.code == code


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64), ids=str)
def test_what_is_fast_is_what_torch_says(dtype: torch.dtype) -> None:
    asked = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    assert _compat.multiplies_fast(dtype) == (dtype not in asked or getattr(torch.ops.mkldnn, asked[dtype])())


def test_graphs_for_inductor_are_widened(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.fx.GraphModule] = []
    compile_graph = _compat.inductor_compile

    def watched(graph_module: torch.fx.GraphModule, *args: Any, **options: Any) -> Any:
        seen.append(graph_module)
        return compile_graph(graph_module, *args, **options)

    monkeypatch.setattr(_compat, "multiplies_fast", lambda dtype: dtype.itemsize > 2)
    monkeypatch.setattr(_compat, "inductor_compile", watched)
    a, b = torch.randn(5, 33).bfloat16(), torch.randn(33, 7).bfloat16()
    with torch._functorch.config.patch(enable_autograd_cache=False):
        torch.compile(torch.mm, backend="graphopt", options={"strict": True})(a, b)
    (product,) = (node for graph in seen for node in graph.graph.nodes if node.target is aten.mm.default)
    assert product.meta["val"].dtype is torch.float32


@DTYPES
def test_a_training_step(dtype: torch.dtype) -> None:
    """Whichever way products go on this machine."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(33, 48), torch.nn.GELU(), torch.nn.Linear(48, 8)).to(dtype)
    x = torch.randn(40, 33).to(dtype)
    torch.compile(model, backend="graphopt", options={"strict": True})(x).square().mean().backward()
    compiled = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    model(x).square().mean().backward()
    for mine, parameter in zip(compiled, model.parameters(), strict=True):
        torch.testing.assert_close(mine, parameter.grad, rtol=4e-2, atol=4e-3)
