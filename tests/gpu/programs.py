"""Small programs, one for each skeleton and what it may meet: odd sizes, strides, dtypes, masks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from graphopt.quantization import operations

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclasses.dataclass(frozen=True)
class Program:
    """A function of tensors, and the sizes of its inputs."""

    name: str
    function: Callable[..., Any]
    sizes: tuple[tuple[int, ...], ...]

    def inputs(self, dtype: torch.dtype, device: str) -> list[Tensor]:
        """Random inputs of unit variance; the same for every dtype and device but for rounding."""
        generator = torch.Generator("cpu").manual_seed(0)
        return [torch.randn(size, generator=generator, device="cpu").to(device, dtype) for size in self.sizes]


def programs(small: bool) -> Iterator[Program]:
    """All of them; `small` sizes are for the interpreter."""
    rows, long, inner = (5, 300, 48) if small else (257, 5003, 1000)
    yield Program("elementwise", lambda x, y: F.gelu(x) * y.sigmoid() + x.t().t(), ((rows, inner), (inner,)))
    yield Program("transposed", lambda x, y: (x.t() + y).contiguous(), ((rows, inner), (inner, rows)))
    yield Program("softmax", lambda x: x.softmax(-1), ((rows, long),))
    yield Program("rms norm", lambda x, w: F.rms_norm(x, (inner,), w), ((rows, inner), (inner,)))
    yield Program("layer norm", lambda x, w, b: F.layer_norm(x, (inner,), w, b), ((rows, inner), (inner,), (inner,)))
    yield Program("several reductions", lambda x: (x.amax(-1), x.argmax(-1), x.float().var(-1)), ((rows, long),))
    yield Program("cumulative sum", lambda x: x.float().cumsum(-1), ((rows, inner),))
    yield Program("columns", lambda x: x.sum(0), ((rows, inner),))
    yield Program("all", lambda x: x.sum(), ((rows, long),))
    few = 80_003 if small else 3_000_017
    yield Program("long row", lambda x: (x.amax(), x.argmax(), x.float().mean(), x.float().var()), ((1, few),))
    yield Program("softmax of a long row", lambda x: x.softmax(-1), ((2, few),))
    yield Program("columns of a tall matrix", lambda x: (x.sum(0), x.amax(0)), ((few // 33, 40),))
    yield Program("one row", lambda x, w: F.silu(F.linear(x, w)), ((1, inner), (rows, inner)))
    yield Program(
        "linear", lambda x, w, b: F.gelu(F.linear(x, w, b)) + 1, ((rows, inner), (rows + 3, inner), (rows + 3,))
    )
    yield Program(
        "gated", lambda x, g, u: F.silu(F.linear(x, g)) * F.linear(x, u), ((rows, inner), (rows, inner), (rows, inner))
    )
    deep = 9_001 if small else 100_003
    for name, tall in (("one deep row", 1), ("few deep rows", 5), ("deep rows", 70)):
        yield Program(name, lambda x, w, b: F.gelu(F.linear(x / 99, w, b)), ((tall, deep), (24, deep), (24,)))
    if not small:
        yield Program("a last wave of few tiles", lambda x, w: F.linear(x / 50, w), ((1536, 8192), (1536, 8192)))
    for scheme in ("int8", "int8-g64", "int4-g32", "nf4-g64", "mxfp4", "q4_k", "fp8", "int8-dynamic", "fp8-dynamic"):
        for name, tall in (("one row", 1), ("few rows", 5), ("rows", 70)):
            yield Program(f"{scheme}, {name}", _quantised(scheme), ((tall, inner), (24, inner), (24,)))
    heads, kv, length, size = (4, 2, 19, 16) if small else (32, 8, 515, 128)
    q, k = (2, heads, length, size), (2, kv, length, size)
    attend = F.scaled_dot_product_attention
    yield Program("causal", lambda q, k, v: attend(q, k, v, is_causal=True, enable_gqa=True), (q, k, k))
    yield Program("whole", lambda q, k, v: attend(q, k, v, enable_gqa=True), (q, k, k))
    yield Program("masked", lambda q, k, v, m: attend(q, k, v, m, enable_gqa=True), (q, k, k, (2, 1, length, length)))
    yield Program("decode", lambda q, k, v: attend(q, k, v, enable_gqa=True), ((2, heads, 1, size), k, k))
    far = (2, kv, 600 if small else 9_001, size)
    yield Program(
        "decode, many keys", lambda q, k, v: attend(q, k, v, enable_gqa=True), ((2, heads, 1, size), far, far)
    )


def _quantised(scheme: str) -> Callable[..., Tensor]:
    """A product with bias and activation of a weight that is packed at each call, as `options={"quantize": ...}` do."""

    def function(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        parts = operations.quantize_weight(weight, scheme)
        y: Tensor = operations.quantized_linear(x, parts, bias, scheme)
        return F.silu(y / 8)

    return function
