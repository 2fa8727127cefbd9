"""The quantised dialect operations: shape rules equal bodies, and bodies compute what they say."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from graphopt import shapes
from graphopt.quantization import operations, schemes

NAMES = ("int8", "int4-g32", "int4-g64-sym", "q4_k", "fp8", "nf4-g64", "mxfp4", "int8-dynamic", "fp8-dynamic")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lead", [(5,), (2, 3), (1, 1), ()])
def test_linear_is_close_to_the_unpacked_weight(name: str, dtype: torch.dtype, lead: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(*lead, 70, dtype=dtype), torch.randn(9, 70), torch.randn(9, dtype=dtype)
    packed = operations.quantize_weight(weight, name)
    y = operations.quantized_linear(x, packed, bias, name)
    assert y.dtype == dtype and y.shape == (*lead, 9) and y.is_contiguous()
    exact = F.linear(x.double(), schemes.named(name).unpack(packed, 70).double(), bias.double())
    coarse = {"int8-dynamic": 0.02, "fp8-dynamic": 0.08}.get(name, 1e-6 if dtype == torch.float32 else 1e-2)
    assert (y.double() - exact).norm() <= coarse * exact.norm()


@pytest.mark.parametrize("name", NAMES)
def test_parallel_linear_is_the_linears(name: str) -> None:
    torch.manual_seed(0)
    x, first, second = torch.randn(3, 40), torch.randn(8, 40), torch.randn(5, 40)
    bias = torch.randn(5)
    a, b = (operations.quantize_weight(weight, name) for weight in (first, second))
    ya, yb = operations.parallel_quantized_linear(x, [*a, *b], [None, bias], name)
    assert torch.equal(ya, operations.quantized_linear(x, a, None, name))
    assert torch.equal(yb, operations.quantized_linear(x, b, bias, name))


@pytest.mark.parametrize("name", NAMES)
def test_embedding_is_rows_of_the_unpacked_table(name: str) -> None:
    table = torch.randn(11, 50)
    packed = operations.quantize_weight(table, name)
    indices = torch.tensor([[3, 0], [10, 3]])
    rows = operations.quantized_embedding(indices, packed, 50, torch.bfloat16, name)
    assert torch.equal(rows, schemes.named(name).unpack(packed, 50).bfloat16()[indices])


@pytest.mark.parametrize("name", NAMES)
def test_a_transposed_weight_packs_to_the_same(name: str) -> None:
    weight = torch.randn(6, 33)
    plain = operations.quantize_weight(weight, name)
    turned = operations.quantize_weight(weight.t().contiguous(), name, transposed=True)
    assert all(torch.equal(a.float(), b.float()) for a, b in zip(plain, turned, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_the_shape_rules_are_those_of_the_bodies(name: str) -> None:
    weight, x = torch.randn(6, 70), torch.randn(2, 3, 70, dtype=torch.bfloat16)
    packed = operations.quantize_weight(weight, name)
    indices = torch.tensor([[1, 2]])
    calls = (
        (operations.quantize_weight, (weight, name)),
        (operations.quantized_linear, (x, packed, None, name)),
        (operations.parallel_quantized_linear, (x, [*packed, *packed], [None, None], name)),
        (operations.quantized_embedding, (indices, packed, 70, torch.float32, name)),
    )
    # The schema check of opcheck compares tensors in a way that torch lacks for float8.
    checks = ("test_faketensor",) if "fp8" in name else ("test_faketensor", "test_schema")
    for op, arguments in calls:
        torch.library.opcheck(op, arguments, test_utils=checks)
        fake = torch.utils._pytree.tree_map(lambda v: v.to("meta") if isinstance(v, torch.Tensor) else v, arguments)
        real = torch.utils._pytree.tree_map(
            lambda v: v.to("meta") if isinstance(v, torch.Tensor) else v, op(*arguments)
        )
        assert not shapes.difference(op(*fake), real)
