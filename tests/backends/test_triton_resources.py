"""The default configurations of generated kernels fit every GPU that is checked, for a spread of shapes.

Nothing runs: a graph is captured, its program written, and each kernel compiled for each target.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule

from graphopt import capture
from graphopt.backends.triton.check import TARGETS, resources
from graphopt.backends.triton.program import write
from graphopt.backends.triton.source import Kernel
from graphopt.passes.fuse.form_regions import form_regions
from tests.backends.attention_parts import FORMS
from tests.backends.test_triton_matmul import fuse
from tests.backends.test_triton_rows import rms_norm

HIDDEN, WIDE, NARROW = 1024, 1536, 256


def written(function: Callable[..., Any], *inputs: Any, prepare: Callable[[GraphModule], Any] = fuse) -> list[Kernel]:
    """The kernels of a function, which is not run."""
    found: list[Kernel] = []

    class Written(Exception):
        pass

    def compile_captured(graph_module: GraphModule, fake: Any, info: Any) -> Any:
        prepare(graph_module)
        found.extend(write(graph_module).kernels.values())
        raise Written

    def backend(dynamo_graph: GraphModule, fake: Any) -> Any:
        return capture.capture(dynamo_graph, fake, compile_captured)

    torch._dynamo.reset()
    with torch.no_grad(), torch._functorch.config.patch(enable_autograd_cache=False):
        with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="Written"):
            torch.compile(function, backend=backend, dynamic=False)(*inputs)
    return found


def assert_fit(kernels: list[Kernel]) -> None:
    for kernel, target in itertools.product(kernels, TARGETS):
        found = resources(kernel, target)
        assert found.fits, (kernel.kind, kernel.constants, kernel.num_warps, kernel.num_stages, found)


def normed(x: Tensor, norm: Tensor, *weights: Tensor) -> Any:
    return tuple(F.linear(rms_norm(x, norm), w) for w in weights)


PRODUCTS: dict[str, tuple[Callable[..., Any], Callable[[int], list[tuple[int, ...]]]]] = {
    "one": (F.linear, lambda rows: [(rows, HIDDEN), (WIDE, HIDDEN)]),
    "two": (lambda x, a, b: (F.linear(x, a), F.linear(x, b)), lambda rows: [
        (rows, HIDDEN), (WIDE, HIDDEN), (NARROW, HIDDEN)]),
    "three": (lambda x, *weights: tuple(F.linear(x, w) for w in weights), lambda rows: [
        (rows, HIDDEN), (WIDE, HIDDEN), (NARROW, HIDDEN), (NARROW, HIDDEN)]),
    "three with biases": (lambda x, a, b, c, d, e, f: (F.linear(x, a, d), F.linear(x, b, e), F.linear(x, c, f)),
                          lambda rows: [(rows, HIDDEN), *[(WIDE, HIDDEN)] * 3, *[(WIDE,)] * 3]),
    "three behind a norm": (normed, lambda rows: [
        (rows, HIDDEN), (HIDDEN,), (WIDE, HIDDEN), (NARROW, HIDDEN), (NARROW, HIDDEN)]),
    "gate": (lambda x, g, u: F.silu(F.linear(x, g)) * F.linear(x, u), lambda rows: [
        (rows, HIDDEN), (WIDE, HIDDEN), (WIDE, HIDDEN)]),
    "bias, activation and residual": (lambda x, w, b, r: r + F.gelu(F.linear(x, w, b)), lambda rows: [
        (rows, HIDDEN), (WIDE, HIDDEN), (WIDE,), (rows, WIDE)]),
    "batched": (torch.bmm, lambda rows: [(3, rows, NARROW), (3, NARROW, WIDE)]),
}  # fmt: skip


@pytest.mark.rotate(one_in=40)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("rows", [1, 2, 16, 17, 64, 65, 140, 256, 1000, 4096])
@pytest.mark.parametrize("form", PRODUCTS)
def test_products_fit(form: str, rows: int, dtype: torch.dtype) -> None:
    function, sizes = PRODUCTS[form]
    assert_fit(written(function, *(torch.empty(size, dtype=dtype) for size in sizes(rows))))


ATTENTIONS: dict[str, Callable[[int, int], tuple[Tensor | None, dict[str, Any]]]] = {
    "all keys": lambda rows, keys: (None, {}),
    "causal": lambda rows, keys: (None, {"is_causal": True}),
    "window": lambda rows, keys: (None, {"is_causal": True, "window": 256}),
    "softcap": lambda rows, keys: (None, {"is_causal": True, "softcap": 30.0}),
    "padding": lambda rows, keys: (torch.ones(2, 1, 1, keys, dtype=torch.bool), {}),
    "mask": lambda rows, keys: (torch.ones(2, 1, rows, keys, dtype=torch.bool), {}),
    "bias": lambda rows, keys: (torch.zeros(2, 8, rows, keys), {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("size", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("rows", [1, 3, 17, 140, 1024])
@pytest.mark.parametrize("form", ATTENTIONS)
def test_attentions_fit(form: str, rows: int, size: int, dtype: torch.dtype) -> None:
    mask, how = ATTENTIONS[form](rows, 1024)
    mask = mask.to(dtype) if mask is not None and mask.is_floating_point() else mask
    tensors = [torch.empty(2, heads, n, size, dtype=dtype) for heads, n in ((8, rows), (2, 1024), (2, 1024))]
    assert_fit(written(
        lambda *given: torch.ops.graphopt.attention(*given, scale=0.3, **how), *tensors, mask, prepare=form_regions))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("padded", [False, True], ids=["all keys", "padding"])
@pytest.mark.parametrize("size", [64, 80, 128])
@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("form", FORMS)
def test_attentions_over_parts_fit(form: str, rows: int, size: int, padded: bool, dtype: torch.dtype) -> None:
    parts, keys = FORMS[form], 600
    q, k, v = (torch.zeros(2, heads, n, size, dtype=dtype) for heads, n in ((8, rows), (2, keys), (2, keys)))
    given, _, _ = parts.operands(q, k, v)
    mask = torch.ones(2, 1, 1, keys, dtype=torch.bool) if padded else None
    assert_fit(written(
        lambda q, mask, *given: parts.attention(q, *given, mask, keys, *parts.told, scale=0.3),
        q, mask, *given, prepare=form_regions))


ROWS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "norm": rms_norm,
    "norm of a sum": lambda x, w: (x + w, F.layer_norm(x + w, w.shape, w, w)),
    "softmax": lambda x, w: torch.softmax(x + w, -1),
    "variance of columns": lambda x, w: (x * w).var(0),
    "cumulative sum": lambda x, w: (x * w).cumsum(-1),
    "largest": lambda x, w: (x + w).max(-1),
}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("columns", [64, 768, 4096, 5000, 16384, 50257])
@pytest.mark.parametrize("rows", [1, 64, 3000])
@pytest.mark.parametrize("form", ROWS)
def test_rows_fit(form: str, rows: int, columns: int, dtype: torch.dtype) -> None:
    tensors = (torch.empty(rows, columns, dtype=dtype), torch.empty(columns, dtype=dtype))
    assert_fit(written(ROWS[form], *tensors, prepare=form_regions))
