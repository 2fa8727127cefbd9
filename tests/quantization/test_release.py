"""Releasing full-precision weights: compiled answers stay, every other use is a clear error, tied weights are kept."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import graphopt
from graphopt import OptionError, Quantize
from graphopt.backend import graphopt as backend
from graphopt.errors import WeightsReleasedError
from graphopt.quantization.release import is_released


class Model(nn.Module):
    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embed, self.mix, self.head = nn.Embedding(80, 64), nn.Linear(64, 64), nn.Linear(64, 80, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.mix(self.embed(ids))))


IDS = torch.arange(10).reshape(2, 5)


def compiled(model: nn.Module, scheme: str = "int8", target: str = "inductor"):
    return torch.compile(model, backend=backend, options={"quantize": Quantize(scheme), "target": target})


@pytest.fixture(params=("inductor", "reference"))
def released(request: pytest.FixtureRequest):
    torch.manual_seed(0)
    model = Model()
    program = compiled(model, target=request.param)
    with torch.no_grad():
        before = program(IDS)
    report = graphopt.release_weights(model)
    return model, program, before, report


def test_compiled_answers_stay_and_memory_goes(released) -> None:
    model, program, before, report = released
    assert report.released == ("mix.weight", "head.weight") and report.freed == (64 + 80) * (64 - 1) * 4
    assert "released 2 weights" in str(report)
    assert is_released(model.mix.weight) and model.mix.weight.untyped_storage().nbytes() == 64 * 4
    with torch.no_grad():
        assert torch.equal(program(IDS), before)
        torch.testing.assert_close(program(IDS[:1]), before[:1])  # another shape adds up in another order


def test_every_other_use_is_an_error_or_nan(released) -> None:
    model, *_ = released
    with pytest.raises(WeightsReleasedError, match="'weight' of this Linear was released"):
        model(IDS)
    with pytest.raises(WeightsReleasedError, match="was released"):
        model.state_dict()
    assert model.mix.weight.isnan().all() and (model.mix.weight + 1).isnan().all()
    torch._dynamo.reset()
    with pytest.raises(WeightsReleasedError, match=r"no pack as 'int4-g32'"), torch.no_grad():
        compiled(model, "int4")(IDS)


def test_a_graph_that_reads_a_released_weight_is_not_compiled(released) -> None:
    model, program, before, _ = released
    for options in ({}, {"quantize": Quantize("int8", skip="mix")}):
        torch._dynamo.reset()
        plain = torch.compile(model, backend=backend, options={"target": "reference", **options})
        message = "WeightsReleasedError: mix.weight was released, but graphopt.linear.default in this graph reads it"
        with pytest.raises(RuntimeError, match=message), torch.no_grad():
            plain(IDS)
    torch._dynamo.reset()
    with pytest.raises(RuntimeError, match="WeightsReleasedError: .*without gradients"):
        compiled(model)(IDS)
    with torch.no_grad():
        assert torch.equal(program(IDS), before)


def test_new_weights_end_the_release(released) -> None:
    model, program, _, _ = released
    torch.manual_seed(1)
    other = Model()
    model.mix.weight = copy.deepcopy(other.mix.weight)
    model.head.weight = copy.deepcopy(other.head.weight)
    model(IDS)
    model.load_state_dict(other.state_dict())
    with torch.no_grad():
        assert torch.isfinite(program(IDS)).all()
        assert (program(IDS) - other(IDS)).norm() < 0.02 * other(IDS).norm()


def test_a_tied_table_is_kept() -> None:
    torch.manual_seed(0)
    model = Model(tied=True)
    program = compiled(model)
    with torch.no_grad():
        before = program(IDS)
        report = graphopt.release_weights(model)
        assert report.released == ("mix.weight",)
        assert report.kept == (("embed.weight", "it is also used by Embedding"),)
        assert torch.equal(program(IDS), before)


def test_nothing_packed_is_an_error() -> None:
    with pytest.raises(OptionError, match="no weight of Model has been packed"):
        graphopt.release_weights(Model())
