"""Time of the compiled linears and decode attention beside torch's own, on SmolLM2's shapes.

Run with `pytest tests/benchmarks/test_cpp_kernels.py --benchmark-enable`. Weights and caches rotate, so that they come
from where a model's layers would come from and not from the innermost cache.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from graphopt.backends import cpp

LAYERS = 16
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def _library() -> Iterator[None]:
    if reason := cpp.unavailable_reason():
        pytest.skip(reason)
    with torch.inference_mode():
        yield


def rotating(run: Callable[[Any], Tensor], operands: list[Any]) -> Callable[[], Tensor]:
    """A call of `run` with the next operand each time."""
    following = itertools.cycle(operands)
    return lambda: run(next(following))


@pytest.mark.parametrize("system", ("torch", "cpp"))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), ids=str)
@pytest.mark.parametrize("rows", (1, 4, 16, 512))
@pytest.mark.parametrize(("n", "k"), ((576, 576), (1536, 576), (576, 1536), (2048, 8192)))
def test_linear(benchmark: Any, system: str, dtype: torch.dtype, rows: int, n: int, k: int) -> None:
    x = torch.randn(rows, k).to(dtype)
    weight = torch.randn(n, k).to(dtype)
    weights = [weight.clone() for _ in range(LAYERS)]
    op = F.linear if system == "torch" else torch.ops.graphopt_cpp.linear.default
    out = benchmark(rotating(lambda weight: op(x, weight, None), weights))
    assert out.shape == (rows, n)


@pytest.mark.parametrize("system", ("torch", "cpp"))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), ids=str)
@pytest.mark.parametrize("context", (128, 1024, 4096))
@pytest.mark.parametrize(("heads", "kv_heads", "queries"), ((9, 3, 1), (9, 3, 8), (32, 8, 1)))
def test_attention(
    benchmark: Any, system: str, dtype: torch.dtype, context: int, heads: int, kv_heads: int, queries: int
) -> None:
    q = torch.randn(1, queries, heads, 64).to(dtype).transpose(1, 2)
    caches = [torch.randn(2, context, 1, kv_heads, 64).to(dtype).permute(0, 2, 3, 1, 4) for _ in range(LAYERS)]
    kernel = torch.ops.graphopt_cpp.attention.default

    def run(cache: Tensor) -> Tensor:
        if system == "torch":
            return F.scaled_dot_product_attention(q, cache[0], cache[1], enable_gqa=True)
        return kernel(q, cache[0], cache[1], None, False, 0.125, 0.0, 0)

    assert benchmark(rotating(run, caches)).shape == q.shape
