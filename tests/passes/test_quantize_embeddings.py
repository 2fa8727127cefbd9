"""quantize_embeddings: packed tables, tied tables with one pack, and one test for each refusal."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from graphopt import Quantize
from graphopt.backend import graphopt as backend
from graphopt.options import Options
from graphopt.passes import PIPELINE, lossy
from graphopt.pipeline import arrange, describe
from graphopt.quantization import operations, schemes
from graphopt.runtime import packs
from graphopt.testing import assert_not_applied, check_pass

IDS = torch.arange(10).reshape(2, 5)


def through(quantize: Quantize) -> list:
    passes = arrange((*PIPELINE, *lossy(Options(quantize=quantize))))
    names = [describe(function).name for function in passes]
    return passes[: names.index("quantize_embeddings") + 1]


class Speaker(nn.Module):
    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(80, 64, padding_idx=3), nn.Linear(64, 80, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.embed(ids)))


@pytest.mark.parametrize("scheme", ["int8", "int4", "q4_k", "fp8", "nf4", "mxfp4", "int8-dynamic"])
def test_a_table_is_packed(scheme: str) -> None:
    torch.manual_seed(0)
    model = nn.Embedding(50, 64)
    check_pass(through(Quantize(scheme, embeddings=True)), model, [IDS], count=1)
    how = schemes.named(schemes.canonical(scheme))
    options = {"quantize": Quantize(scheme, embeddings=True), "target": "reference"}
    with torch.no_grad():
        rows = torch.compile(model, backend=backend, options=options)(IDS)
        assert torch.equal(rows, how.unpack(how.pack(model.weight), 64)[IDS])
        model.weight.mul_(2)
        rows = torch.compile(model, backend=backend, options=options)(IDS)
        assert torch.equal(rows, how.unpack(how.pack(model.weight), 64)[IDS])


def test_a_tied_table_has_one_pack() -> None:
    model = Speaker(tied=True)
    quantize = Quantize("int4", embeddings=True)
    graph = check_pass(through(quantize), model, [IDS], count=1)
    nodes = [node for node in graph.after.graph.nodes if node.target is operations.quantize_weight]
    assert [node.args[1] for node in nodes] == ["int8-g64", "int8-g64"]
    packs.refresh()
    with torch.no_grad():
        torch.compile(model, backend=backend, options={"quantize": quantize, "target": "inductor"})(IDS)
    assert packs.packed_bytes() == schemes.named("int8-g64").nbytes(80, 64)


def test_an_untied_table_has_its_own_scheme() -> None:
    graph = check_pass(through(Quantize("int4", embeddings=True)), Speaker(tied=False), [IDS], count=1)
    nodes = [node for node in graph.after.graph.nodes if node.target is operations.quantize_weight]
    assert sorted(node.args[1] for node in nodes) == ["int4-g32", "int8-g64"]


def test_off_unless_asked_for() -> None:
    assert_not_applied(through(Quantize("int8")), Speaker(tied=False), [IDS])


def assert_refused(model: nn.Module, reason: str, quantize: Quantize | None = None, inputs: list | None = None) -> None:
    asked = quantize or Quantize("int8", embeddings=True)
    assert_not_applied(through(asked), model, inputs or [IDS], reason=reason)


def test_refuses_a_table_computed_in_the_graph() -> None:
    class Computed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(20, 64))

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return nn.functional.embedding(ids, self.table * 2)

    assert_refused(Computed(), "the weight is computed in the graph")


def test_refuses_names_left_out_by_the_user() -> None:
    assert_refused(nn.Embedding(20, 64), "skip='weight'", Quantize("int8", embeddings=True, skip="weight"))


def test_refuses_a_table_that_would_not_shrink() -> None:
    assert_refused(nn.Embedding(20, 1), "as int8-g64 it would take 1320 bytes instead of 80")


def test_refuses_a_table_that_is_not_finite() -> None:
    model = nn.Embedding(20, 64)
    with torch.no_grad():
        model.weight[0, 0] = float("nan")
    assert_refused(model, "the weight holds infinities, NaN")
