"""Kernels of quantised products fit every GPU that is checked, and load their codes in vectors. Nothing runs."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from graphopt.backends.triton.check import compile_for
from graphopt.passes.fuse.form_regions import form_regions
from graphopt.quantization import operations, schemes
from tests.backends.test_triton_quantized import MAIN
from tests.backends.test_triton_resources import assert_fit, written
from tests.backends.test_triton_rows import rms_norm

bf16, HIDDEN, WIDE = torch.bfloat16, 1024, 1536


def one(scheme: str) -> Callable[..., Tensor]:
    return lambda x, norm, *parts: operations.quantized_linear(x, list(parts), None, scheme)


def gate_behind_a_norm(scheme: str) -> Callable[..., Tensor]:
    def function(x: Tensor, norm: Tensor, *parts: Tensor) -> Tensor:
        both = [*parts, *parts]
        gate, up = operations.parallel_quantized_linear(rms_norm(x, norm), both, [None, None], scheme)
        return F.silu(gate) * up

    return function


def parts_of(scheme: str, depth: int = HIDDEN) -> list[Tensor]:
    return [torch.empty(shape, dtype=dtype) for shape, dtype in schemes.named(scheme).layout(WIDE, depth)]


@pytest.mark.parametrize(("scheme", "rows"), [("int8", 1), ("int8-g64", 1), ("int4-g32", 1), ("int4-g32", 16)])
def test_common_products_fit(scheme: str, rows: int) -> None:
    x, norm = torch.empty(rows, HIDDEN, dtype=bf16), torch.empty(HIDDEN, dtype=bf16)
    assert_fit(written(gate_behind_a_norm(scheme), x, norm, *parts_of(scheme), prepare=form_regions))


@pytest.mark.rotate(one_in=40)
@pytest.mark.parametrize("dtype", [bf16, torch.float32], ids=str)
@pytest.mark.parametrize("rows", [1, 3, 16, 40, 256, 4096])
@pytest.mark.parametrize("form", [one, gate_behind_a_norm])
@pytest.mark.parametrize("scheme", MAIN)
def test_products_fit(scheme: str, form: Callable[[str], Callable[..., Tensor]], rows: int, dtype: torch.dtype) -> None:
    x, norm = torch.empty(rows, HIDDEN, dtype=dtype), torch.empty(HIDDEN, dtype=dtype)
    assert_fit(written(form(scheme), x, norm, *parts_of(scheme), prepare=form_regions))


@pytest.mark.parametrize("scheme", ["int8", "int8-g64", "int4-g32"])
def test_one_row_loads_codes_in_vectors_and_exchanges_nothing(scheme: str) -> None:
    x, norm = torch.empty(1, 2048, dtype=bf16), torch.empty(2048, dtype=bf16)
    (kernel,) = written(one(scheme), x, norm, *parts_of(scheme, 2048), prepare=form_regions)
    ptx = compile_for(kernel, "sm_90").asm["ptx"]
    loads = re.findall(r"ld\.global\.(\S+)", ptx)
    assert "v2.b32" in loads and "v4.b32" in loads  # eight codes, eight numbers of x
    assert ptx.count("bar.sync") <= 3  # the sums at the end
