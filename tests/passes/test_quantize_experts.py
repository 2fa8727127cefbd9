"""quantize_experts: grouped products with packed experts, changed weights, and one test for each refusal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.integrations import moe as moe  # registers transformers::grouped_mm_fallback

from graphopt import Quantize, load_quantized, release_weights, save_quantized
from graphopt.backend import graphopt as backend
from graphopt.errors import WeightsReleasedError
from graphopt.options import Options
from graphopt.passes import PIPELINE, lossy
from graphopt.pipeline import arrange, describe
from graphopt.quantization import operations, schemes
from graphopt.runtime import packs
from graphopt.testing import assert_not_applied, check_pass

EXPERTS, N, K = 3, 48, 64
ENDS = torch.tensor([2, 2, 5], dtype=torch.int32)


def through(quantize: Quantize) -> list:
    passes = arrange((*PIPELINE, *lossy(Options(quantize=quantize))))
    names = [describe(function).name for function in passes]
    return passes[: names.index("quantize_experts") + 1]


class Mixture(nn.Module):
    """Experts kept as [E, N, K], or as [E, K, N]."""

    def __init__(self, transposed: bool = False, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.transposed = transposed
        self.weight = nn.Parameter(torch.randn(EXPERTS, *((K, N) if transposed else (N, K))).to(dtype))

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        experts = self.weight if self.transposed else self.weight.transpose(-2, -1)
        return torch.ops.transformers.grouped_mm_fallback(x, experts, ends)


def expected(model: Mixture, x: Tensor, ends: Tensor, scheme: str) -> Tensor:
    how, start, parts = schemes.named(scheme), 0, []
    for expert, end in zip(model.weight, ends.tolist(), strict=True):
        packed = how.pack(expert.mT if model.transposed else expert)
        parts.append(operations.quantized_linear(x[start:end], packed, None, scheme))
        start = end
    return torch.cat([*parts, x.new_zeros(x.shape[0] - start, N)])


def compiled(model: nn.Module, target: str = "reference", **quantize: Any) -> Any:
    return torch.compile(model, backend=backend, options={"quantize": Quantize(**quantize), "target": target})


@pytest.mark.parametrize("transposed", (False, True))
@pytest.mark.parametrize("scheme", ("int8", "int4", "q4_k", "fp8", "nf4", "mxfp4", "int8-dynamic"))
def test_experts_are_packed(scheme: str, transposed: bool) -> None:
    model, x = Mixture(transposed), torch.randn(6, K)
    check_pass(through(Quantize(scheme)), model, [x, ENDS], count=1)
    run = compiled(model, scheme=scheme)
    for _ in range(2):
        with torch.no_grad():
            want = expected(model, x, ENDS, schemes.canonical(scheme))
            torch.testing.assert_close(run(x, ENDS), want, rtol=1e-5, atol=1e-5)
            model.weight.mul_(-2)


@pytest.mark.usefixtures("cpp_library")
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("ends", ([0, 0, 0], [6, 6, 6], [1, 4, 6], [0, 1, 1]))
@pytest.mark.parametrize("scheme", ("int8-g64", "int4-g32", "int8"))
def test_kernel_multiplies_each_row_with_its_expert(scheme: str, ends: list[int], dtype: torch.dtype) -> None:
    x, packed = torch.randn(6, K).to(dtype), schemes.named(scheme).pack(torch.randn(EXPERTS * N, K))
    last = torch.tensor(ends)
    got = torch.ops.graphopt_cpp.quantized_grouped_linear(x, packed, last, scheme)
    want = operations.quantized_grouped_linear(x.float(), packed, last, scheme).to(dtype)
    torch.testing.assert_close(got, want, rtol=2e-2, atol=0.2 if dtype == torch.bfloat16 else 1e-3)
    with pytest.raises(IndexError, match="must rise"):
        torch.ops.graphopt_cpp.quantized_grouped_linear(x, packed, torch.tensor([4, 2, 6]), scheme)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=5), st.integers(0, 9))
@settings(max_examples=20, deadline=None)
def test_any_division_of_the_rows(counts: list[int], behind: int) -> None:
    ends = torch.tensor(counts).cumsum(0)
    x, weights = torch.randn(int(ends[-1]) + behind, K), torch.randn(len(counts), 8, K)
    packed = operations.quantize_weight(weights, "int8-g64")
    rows = zip(weights, x.split([*counts, behind]), strict=False)
    apart = []
    for weight, mine in rows:
        own = operations.quantize_weight(weight, "int8-g64")
        apart.append(operations.quantized_linear(mine, own, None, "int8-g64"))
    want = torch.cat([*apart, torch.zeros(behind, 8)])
    torch.testing.assert_close(operations.quantized_grouped_linear(x, packed, ends, "int8-g64"), want)


def mixtral() -> MixtralForCausalLM:
    config = MixtralConfig(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=4,
    )  # fmt: skip
    torch.manual_seed(0)
    return MixtralForCausalLM(config).eval()


@pytest.mark.rotate(one_in=2)
@pytest.mark.parametrize("target", ("reference", "cpu"))
def test_a_mixtral_answers_within_the_error_of_its_scheme(target: str) -> None:
    model = mixtral()
    run = compiled(model, target, scheme="int8")
    with torch.no_grad():
        for length in (7, 5):
            ids = torch.arange(length)[None] + 3
            want = model(input_ids=ids).logits
            assert (run(input_ids=ids).logits - want).norm() < 0.02 * want.norm()


def test_saved_experts_are_not_packed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Mixture(transposed=True), torch.randn(6, K)
    with torch.no_grad():
        answer = compiled(model, scheme="int4")(x, ENDS)
        save_quantized(model, tmp_path, "int4")
        packs.refresh()
        torch._dynamo.reset()
        quantize = load_quantized(model, tmp_path)
        monkeypatch.setattr(schemes.Scheme, "pack", None)
        run = torch.compile(model, backend=backend, options={"quantize": quantize, "target": "reference"})
        assert torch.equal(run(x, ENDS), answer)


@pytest.mark.rotate(one_in=2)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_released_experts_are_gone_and_answers_stay(dtype: torch.dtype) -> None:
    model, ids = mixtral().to(dtype), torch.arange(7)[None] + 3
    run = compiled(model, scheme="int8")
    stacks = [f"model.layers.{layer}.mlp.experts.{name}" for layer in (0, 1) for name in ("gate_up_proj", "down_proj")]
    with torch.no_grad():
        before = run(input_ids=ids).logits
        whole = sum(parameter.numel() for name, parameter in model.named_parameters() if name in stacks)
        report = release_weights(model)
        assert set(stacks) < set(report.released)
        assert {reason for _, reason in report.kept} == {"it is also used by MixtralTopKRouter"}
        # One expert of each shape is left, and one number of each row of a linear.
        rows = sum(weight.shape[0] for name in report.released if (weight := model.get_parameter(name)).dim() == 2)
        matrices = sum(weight.numel() for name in report.released if (weight := model.get_parameter(name)).dim() == 2)
        assert report.freed == (whole - whole // 8 + matrices - rows) * dtype.itemsize
        assert torch.equal(run(input_ids=ids).logits, before)
        assert run(input_ids=ids[:, :5]).logits.isfinite().all()
        with pytest.raises(WeightsReleasedError, match="was released"):
            model(input_ids=ids)
        with pytest.raises(WeightsReleasedError, match="'gate_up_proj' of this MixtralExperts was released"):
            model.model.layers[0].mlp.experts.state_dict()
        assert model.get_parameter(stacks[0]).isnan().all()
        with pytest.raises(RuntimeError, match="single memory location"):
            model.get_parameter(stacks[0]).copy_(torch.ones(4, 192, 64))
        torch._dynamo.reset()
        with pytest.raises(RuntimeError, match="WeightsReleasedError: .*down_proj was released, but .* reads it"):
            compiled(model, scheme="int8", skip="down_proj")(input_ids=ids)


def test_released_experts_are_saved_and_loaded_without_weights(tmp_path: Path) -> None:
    model, ids = mixtral(), torch.arange(7)[None] + 3
    with torch.no_grad():
        answer = compiled(model, scheme="int8")(input_ids=ids).logits
        release_weights(model)
        save_quantized(model, tmp_path, "int8")
        packs.refresh()
        torch._dynamo.reset()
        with torch.device("meta"):
            empty = mixtral()
        quantize = load_quantized(empty, tmp_path)
        run = torch.compile(empty, backend=backend, options={"quantize": quantize, "target": "reference"})
        assert torch.equal(run(input_ids=ids).logits, answer)


def test_a_single_expert_is_kept() -> None:
    class Alone(Mixture):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(1, N, K))

    model = Alone()
    with torch.no_grad():
        compiled(model, scheme="int8")(torch.randn(6, K), torch.tensor([4]))
    assert release_weights(model).kept == (("weight", "it holds one expert only"),)


def test_brain_floats_go_by_the_grouped_product_of_torch() -> None:
    class Grouped(Mixture):
        def forward(self, x: Tensor, ends: Tensor) -> Tensor:
            return torch._grouped_mm(x, self.weight.transpose(-2, -1), ends)

    check_pass(through(Quantize("int8")), Grouped(dtype=torch.bfloat16), [torch.randn(5, K).bfloat16(), ENDS], count=1)


def assert_refused(model: nn.Module, inputs: list[Tensor], reason: str, **quantize: Any) -> None:
    assert_not_applied(through(Quantize(**{"scheme": "int8", **quantize})), model, inputs, reason=reason)


def test_refuses_experts_that_are_skipped() -> None:
    assert_refused(Mixture(), [torch.randn(5, K), ENDS], "skip", skip="weight")


def test_refuses_experts_computed_in_the_graph() -> None:
    class Computed(Mixture):
        def forward(self, x: Tensor, ends: Tensor) -> Tensor:
            return torch.ops.transformers.grouped_mm_fallback(x, self.weight.tanh().transpose(-2, -1), ends)

    assert_refused(Computed(), [torch.randn(5, K), ENDS], "computed in the graph")


def test_refuses_a_part_of_the_experts() -> None:
    class Part(Mixture):
        def forward(self, x: Tensor, ends: Tensor) -> Tensor:
            return torch.ops.transformers.grouped_mm_fallback(x, self.weight[:, :32].transpose(-2, -1), ends)

    assert_refused(Part(), [torch.randn(5, K), ENDS], "view of a part")


def test_refuses_experts_that_are_not_finite() -> None:
    model = Mixture()
    with torch.no_grad():
        model.weight[1, 2, 3] = float("inf")
    assert_refused(model, [torch.randn(5, K), ENDS], "infinities")


def test_refuses_experts_that_would_not_become_smaller() -> None:
    class Narrow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(2, 4, 1))

        def forward(self, x: Tensor, ends: Tensor) -> Tensor:
            return torch.ops.transformers.grouped_mm_fallback(x, self.weight.transpose(-2, -1), ends)

    assert_refused(Narrow(), [torch.randn(5, 1), torch.tensor([2, 5])], "instead of")


def test_refuses_products_of_another_form() -> None:
    class Batched(Mixture):
        def forward(self, x: Tensor) -> Tensor:
            return torch._grouped_mm(x, self.weight.transpose(-2, -1))

    model = Batched(dtype=torch.bfloat16)
    assert_refused(model, [torch.randn(EXPERTS, 5, K).bfloat16()], "no product of rows")
