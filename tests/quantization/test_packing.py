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


def test_new_values_are_seen_where_the_user_vouches_for_guards() -> None:
    """What docs/how-to/compile-a-chat-model.md says of torch's skip_guard_eval_unsafe."""
    linear, x = torch.nn.Linear(64, 8), torch.randn(2, 64)
    compiled = torch.compile(linear, backend="graphopt", options={"quantize": "int8", "strict": True})
    with torch.no_grad():
        before = compiled(x)
        torch.compiler.set_stance("default", skip_guard_eval_unsafe=True)
        try:
            for change in (lambda: linear.weight.mul_(3), lambda: linear.weight.data.fill_(0.5)):
                change()
                after = compiled(x)
                assert not torch.allclose(before, after)
                torch.testing.assert_close(after, linear(x), rtol=0.05, atol=0.2)
                before = after
        finally:
            torch.compiler.set_stance("default")
