"""Products of packed experts in generated kernels, under the interpreter, against their meaning."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import graphopt
from graphopt import cost, edit
from graphopt.backends.triton.compile import CompiledGraph
from graphopt.passes.fuse.form_regions import form_regions
from graphopt.quantization import operations, schemes
from tests.backends.graphs import run
from tests.backends.test_triton_models import decoder
from tests.backends.test_triton_quantized import DTYPES, MAIN, TOLERANCE, packed
from tests.backends.test_triton_resources import assert_fit, written

bf16, EXPERTS, BMM = torch.bfloat16, 4, torch.ops.aten.bmm.default
ENDS = torch.tensor([1, 1, 3, 4])
"""Rows behind the last of each expert: the second has none, and none has those from the fifth."""


def multiply(scheme: str) -> Any:
    return lambda x, ends, *parts: operations.quantized_grouped_linear(x, list(parts), ends, scheme)


def checked(scheme: str, dtype: torch.dtype, rows: int, columns: int, depth: int) -> CompiledGraph:
    """A product of packed experts must leave nothing to torch."""
    x, parts = torch.randn(rows, depth).to(dtype), packed(scheme, EXPERTS * columns, depth)
    got, (compiled,) = run(multiply(scheme), x, ENDS, *parts, prepare=form_regions)
    tolerance = 2 * TOLERANCE[dtype]
    torch.testing.assert_close(got, multiply(scheme)(x, ENDS, *parts), rtol=tolerance, atol=tolerance)
    assert compiled.fallbacks == [] and got[4:].count_nonzero() == 0
    return compiled


@pytest.mark.rotate(one_in=3)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 16])
@pytest.mark.parametrize("scheme", MAIN)
def test_few_rows_read_their_own_experts(scheme: str, rows: int, dtype: torch.dtype) -> None:
    checked(scheme, dtype, rows, columns=21, depth=300)


@pytest.mark.parametrize("scheme", ["int8-g64", "int4-g32"])
def test_nothing_of_an_expert_is_unpacked_into_memory(scheme: str) -> None:
    """Numbers of experts first, then one kernel, which reads one expert for each row."""
    compiled = checked(scheme, bf16, 2, columns=64, depth=512)
    assert [kernel.kind for kernel in compiled.kernels.values()] == ["rows", "linear"]
    counted = []

    def prepare(graph_module: GraphModule) -> None:
        form_regions(graph_module)
        counted.append(int(cost.graph_cost(graph_module).bytes))

    parts = packed(scheme, EXPERTS * 64, 512)
    run(multiply(scheme), torch.randn(2, 512).to(bf16), ENDS, *parts, prepare=prepare)
    whole = sum(part.nbytes for part in parts)
    assert whole // 2 < counted[0] < whole // 2 + 4096


def refused(rows: int, dynamic: bool | None = None) -> list[str]:
    x, parts = torch.randn(rows, 64), packed("int8-g64", EXPERTS * 16, 64)
    with edit.session(edit.Session()) as session:
        got, (compiled,) = run(multiply("int8-g64"), x, ENDS, *parts, prepare=form_regions, dynamic=dynamic)
    torch.testing.assert_close(got, multiply("int8-g64")(x, ENDS, *parts))
    assert [f.target for f in compiled.fallbacks] == ["graphopt.quantized_grouped_linear.default"]
    return [refusal.reason for refusal in session.refusals]


def test_many_rows_are_refused() -> None:
    assert refused(17) == ["there are 17 rows, and for more than 16 experts are not read for each row by itself"]


def test_a_symbolic_number_of_rows_is_refused() -> None:
    assert refused(5, dynamic=True) == [
        "the number of rows is symbolic: whether each may read its expert by itself is not known"
    ]


def tokens(model: nn.Module, **options: Any) -> Tensor:
    torch._dynamo.reset()
    compiled: Any = torch.compile(model.forward, backend="graphopt", options=options)
    found, cache, ids = [], None, torch.arange(3)[None]
    with torch.no_grad():
        for _ in range(3):
            output = compiled(input_ids=ids, past_key_values=cache, use_cache=True)
            cache, ids = output.past_key_values, output.logits[:, -1:].argmax(-1)
            found.append(output.logits[:, -1])
    return torch.cat(found)


MIXTURES = {
    "Mixtral": decoder("Mixtral", num_local_experts=4),
    "Qwen3Moe": decoder("Qwen3Moe", head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48),
}


@pytest.mark.rotate(one_in=2)
@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.parametrize("name", MIXTURES)
def test_a_mixture_gives_the_answers_of_the_meaning(
    name: str, scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    from graphopt.backends.triton import compile as triton

    made: list[CompiledGraph] = []

    def kept(self: CompiledGraph) -> None:
        built(self)
        made.append(self)

    built = CompiledGraph._build
    monkeypatch.setattr(triton.CompiledGraph, "_build", kept)
    torch.manual_seed(0)
    model, quantize = MIXTURES[name](1), graphopt.Quantize(scheme)
    want = tokens(model, target="reference", quantize=quantize)
    torch.testing.assert_close(tokens(model, target="triton", quantize=quantize), want, rtol=1e-3, atol=1e-4)
    regions = [region for graph in made for region in graph._graph_module.children()]
    products = [n for region in regions for n in region.graph.find_nodes(op="call_function", target=BMM)]
    assert len(products) >= 4, "two products of experts for the prompt, two for a token"
    assert not any("quantized" in fallback.target for graph in made for fallback in graph.fallbacks)


def experts_fit(scheme: str, rows: int, dtype: torch.dtype) -> None:
    parts = [torch.empty(shape, dtype=dtype) for shape, dtype in schemes.named(scheme).layout(8 * 512, 1024)]
    x, ends = torch.empty(rows, 1024, dtype=dtype), torch.empty(8, dtype=torch.int64)
    assert_fit(written(multiply(scheme), x, ends, *parts, prepare=form_regions))


@pytest.mark.parametrize("scheme", ["int8", "int4-g32"])
def test_common_experts_fit(scheme: str) -> None:
    experts_fit(scheme, 2, bf16)


@pytest.mark.rotate(one_in=5)
@pytest.mark.parametrize("dtype", [bf16, torch.float32], ids=str)
@pytest.mark.parametrize("rows", [1, 2, 16])
@pytest.mark.parametrize("scheme", MAIN)
def test_experts_fit(scheme: str, rows: int, dtype: torch.dtype) -> None:
    experts_fit(scheme, rows, dtype)
