"""Packing at call time: a large weight is packed some rows at a time."""

from __future__ import annotations

import pytest
import torch

from graphopt.quantization import operations, packing

SCHEMES = ("int8", "int8-g64", "int8-dynamic", "int4-g32", "int4-g64-sym", "q4_k", "nf4-g64", "mxfp4", "fp8")
SHAPES = [((37, 70), False), ((70, 37), True), ((3, 9, 70), False), ((3, 70, 9), True)]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("shape", "transposed"), SHAPES)
def test_some_rows_at_a_time_are_all_rows(
    scheme: str, shape: tuple[int, ...], transposed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, scale = torch.randn(shape), torch.rand(70) + 0.5
    want = operations.quantize_weight(weight, scheme, scale, transposed=transposed)
    monkeypatch.setattr(packing, "_AT_ONCE", 300)
    got = packing.pack_weight(weight, scheme, scale, transposed=transposed)
    assert len(got) == len(want)
    for mine, whole in zip(got, want, strict=True):
        assert mine.dtype == whole.dtype and torch.equal(mine.view(torch.uint8), whole.view(torch.uint8))


def test_a_weight_without_elements(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "_AT_ONCE", 3)
    for shape in ((0, 8), (4, 8)):
        weight = torch.randn(shape)
        want = operations.quantize_weight(weight, "int8")
        assert all(map(torch.equal, packing.pack_weight(weight, "int8"), want))
