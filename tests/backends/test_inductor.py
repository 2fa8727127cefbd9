"""Where Inductor's C++ differs from eager: arithmetic, casts, layouts, graphs it cannot take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import graphopt
from graphopt import _compat, report

VALUES = [0.0, -0.0, 1.0, -1.0, 0.1, -0.1, 3.5, -7.25, float("inf"), -float("inf"), float("nan")]
EXTREMES = [1e-40, 3e38]  # where eager's remainder depends on whether an element falls into a vector or behind the last


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    return torch.compile(function, backend="graphopt", options={"target": "cpu", **options}, dynamic=False)


def every_pair(values: list[float], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    a, b = torch.meshgrid(torch.tensor(values), torch.tensor(values), indexing="ij")
    return a.flatten().to(dtype), b.flatten().to(dtype)


DTYPES = pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16, torch.float16), ids=str)


@pytest.mark.rotate(one_in=4)
@DTYPES
@pytest.mark.parametrize(
    "function",
    (
        lambda a, b: a // b,
        lambda a, b: a // 0.1,
        lambda a, b: 1.0 // b,
        lambda a, b: torch.div(a, b, rounding_mode="floor"),
    ),
    ids=("a//b", "a//0.1", "1.0//b", "div"),
)
def test_floor_division(function: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype) -> None:
    a, b = every_pair(VALUES + EXTREMES, dtype)
    torch.testing.assert_close(compiled(function)(a, b), function(a, b), rtol=0, atol=0, equal_nan=True)


@pytest.mark.rotate(one_in=4)
@DTYPES
@pytest.mark.parametrize(
    "function",
    (lambda a, b: a % b, lambda a, b: a % 0.1, lambda a, b: 0.5 % b, lambda a, b: torch.remainder(a, -0.3)),
    ids=("a%b", "a%0.1", "0.5%b", "remainder"),
)
def test_remainder(function: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype) -> None:
    a, b = every_pair(VALUES, dtype)
    torch.testing.assert_close(compiled(function)(a, b), function(a, b), rtol=0, atol=0, equal_nan=True)


@pytest.mark.xfail(torch.__version__ < (2, 12), reason="Inductor of torch 2.11 leaves out a cast and back", strict=True)
def test_a_cast_loses_its_bits() -> None:
    x = torch.tensor([1.0 + 2**-12, 1e-9, 70000.0])
    for narrow in (torch.bfloat16, torch.float16):
        got = compiled(lambda x, narrow=narrow: x.to(narrow).float() * 3)(x)
        torch.testing.assert_close(got, x.to(narrow).float() * 3, rtol=0, atol=0)


@pytest.mark.parametrize(
    "function",
    (
        lambda x: (x.t() * 2)[0],
        lambda x: (x * 2).t()[1:],
        lambda x: (x.t() * 2).unbind(0),
        lambda x: (x * 2)[:, ::2],
        lambda x: (x + 1).expand(3, *x.shape)[1],
    ),
)
def test_strides_of_a_part(function: Callable[[Tensor], Any]) -> None:
    x = torch.randn(4, 6)
    got, expected = compiled(function)(x), function(x)
    for one, other in zip(*(each if isinstance(each, tuple) else (each,) for each in (got, expected)), strict=True):
        assert one.stride() == other.stride()
        assert torch.equal(one, other)


@pytest.mark.rotate(one_in=2)
@pytest.mark.parametrize("counts_padding", (False, True))
def test_gradient_of_padded_average_pooling(counts_padding: bool) -> None:
    def pooled(x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 3, stride=2, padding=1, ceil_mode=True, count_include_pad=counts_padding).square().sum()

    grads = []
    for function in (pooled, compiled(pooled)):
        x = torch.randn(1, 2, 8, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
        function(x).backward()
        grads.append(x.grad)
    torch.testing.assert_close(grads[1], grads[0])


@pytest.mark.parametrize(("elements", "shared"), ((1536, False), (2**20, True)))
def test_only_long_loops_are_shared_out(elements: int, shared: bool) -> None:
    given = torch.randn(elements), torch.randn(elements)
    kernels = graphopt.explain(lambda x, y: F.silu(x) * y, *given, options={"target": "cpu"}).graphs[0].kernels
    assert any("omp parallel" in kernel.source for kernel in kernels) == shared


def test_an_operator_that_lies_about_its_result_is_told() -> None:
    with torch.library._scoped_library("graphopt_test", "DEF") as library:
        library.define("lying(Tensor x) -> Tensor")
        library.impl("lying", lambda x: x.t().contiguous().t(), "CPU")
        library.impl("lying", lambda x: torch.empty_like(x), "Meta")
        function = compiled(lambda x: torch.ops.graphopt_test.lying(x * 2) + 1)
        with pytest.raises(AssertionError, match=r"wrong stride|expected size|stride"):
            function(torch.randn(3, 5))


def test_a_graph_it_cannot_compile_runs_by_its_meaning(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        from torch._inductor.exc import InductorError

        raise InductorError(RuntimeError("no such loop"), "compile_fx_inner")

    monkeypatch.setattr(_compat, "inductor_compile", fail)
    x = torch.randn(3, 5)
    with report.collecting() as collected:
        got = compiled(lambda x: x.sin() + 3)(x)
    assert torch.equal(got, x.sin() + 3)
    assert "no such loop" in str([graph.fallbacks for graph in collected.graphs])
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="LoweringError.*" + "no such loop"):
        compiled(lambda x: x.sin() + 3, strict=True)(x)


@pytest.mark.rotate(one_in=4)
@DTYPES
@pytest.mark.parametrize("half", (1, 5, 32))
@pytest.mark.parametrize("interleaved", (False, True), ids=("halves", "pairs"))
def test_rotation_without_a_cat(dtype: torch.dtype, half: int, interleaved: bool) -> None:
    """Also of views, of values that are no numbers, and where cos and sin are those of all heads or of a single row."""
    x = torch.randn(2, 7, 3, 2 * half + 1).to(dtype)[..., 1:].transpose(1, 2)
    x[0, 0, 0, 0], x[0, 1, 2, -1], x[1, 2, 3, half] = float("nan"), float("inf"), -0.0
    for rows in (7, 1):
        cos, sin = torch.randn(2, 2, 1, rows, 2 * half).to(dtype)
        wanted = graphopt.ops.rope(x.double(), cos.double(), sin.double(), interleaved).to(dtype)
        found = compiled(lambda *given: graphopt.ops.rope(*given, interleaved))(x, cos, sin)
        torch.testing.assert_close(found, wanted, equal_nan=True)


def test_rotation_makes_no_view_for_a_half() -> None:
    from torch._inductor.utils import run_and_get_code

    cos, sin = torch.randn(2, 1, 1, 5, 64)
    function = compiled(lambda x: graphopt.ops.rope(x * 2, cos, sin))
    x = torch.randn(1, 4, 5, 64)
    found, (code,) = run_and_get_code(function, x)
    torch.testing.assert_close(found, graphopt.ops.rope(x * 2, cos, sin))
    assert "reinterpret_tensor(buf" not in code and code.count("cpp_pybinding(") == 1


@pytest.mark.rotate(one_in=2)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_equal_gradients_of_two_parameters(dtype: torch.dtype) -> None:
    """One reduction, stored twice: Inductor's C++ of torch 2.13 does not compile for two-byte numbers."""
    x, y = torch.randn(40, 8).to(dtype), torch.randn(40, 8).to(dtype)
    biases = [torch.randn(8).to(dtype).requires_grad_() for _ in range(2)]

    def function(a: Tensor, b: Tensor) -> Tensor:
        return x + a + (y + b)

    compiled(function, strict=True)(*biases).sum().backward()
    got = [bias.grad for bias in biases]
    for bias in biases:
        bias.grad = None
    function(*biases).sum().backward()
    torch.testing.assert_close(got, [bias.grad for bias in biases], rtol=2e-2, atol=2e-2)


@pytest.mark.rotate(one_in=2)
@pytest.mark.parametrize("reduce", (torch.sum, torch.amax, torch.amin, torch.mean), ids=lambda f: f.__name__)
def test_equal_reductions_are_outputs_of_their_own(reduce: Callable[..., Tensor]) -> None:
    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        return reduce(x, 0), reduce(x, 0)

    x = torch.randn(40, 16).bfloat16()
    first, second = compiled(function, strict=True)(x)
    torch.testing.assert_close((first, second), function(x))
    assert first.data_ptr() != second.data_ptr()
