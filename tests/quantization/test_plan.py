"""Plans: the table's figures, the solver's choice under its budget, and that a compiled program follows
it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import graphopt
from graphopt import OptionError, Quantize
from graphopt.backend import graphopt as backend
from graphopt.quantization import schemes


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(128, 128, bias=False) for _ in range(4)]
    with torch.no_grad():
        # One outlier in each group: hard to write in four bits.
        layers[1].weight[:, ::32] *= 60
    return nn.Sequential(*layers)


def test_the_table_has_the_bytes_and_the_errors(model: nn.Module) -> None:
    found = graphopt.plan(model, Quantize("int4", skip="^3"))
    assert [layer.name for layer in found.layers] == [f"{index}.weight" for index in range(4)]
    first, last = found.layers[0], found.layers[3]
    assert (first.bytes_before, first.bytes_after) == (128 * 128 * 4, schemes.named("int4-g32").nbytes(128, 128))
    weight = model[0].weight.detach()
    scheme = schemes.named("int4-g32")
    error = (scheme.unpack(scheme.pack(weight), 128) - weight).norm() / weight.norm()
    assert math.isclose(first.weight_error, error, rel_tol=1e-5) and first.output_error is None
    assert (last.scheme, last.bytes_after, last.weight_error) == ("", last.bytes_before, 0.0)
    assert "skip=" in last.reason and "3.weight" in str(found)


def test_output_errors_come_from_the_calibration(model: nn.Module) -> None:
    x = torch.randn(64, 128)
    found = graphopt.plan(model, Quantize("int8", calibration=graphopt.calibrate(model, [x])))
    scheme, weight = schemes.named("int8-g64"), model[0].weight.detach()
    rows = x.bfloat16().float()
    error = rows @ (scheme.unpack(scheme.pack(weight), 128) - weight).T
    expected = error.norm() / (rows @ weight.T).norm()
    assert found.layers[0].output_error == pytest.approx(expected.item(), rel=1e-4)


def test_auto_keeps_its_budget_and_spends_it(model: nn.Module) -> None:
    sizes = []
    for budget in (0.001, 0.01, 0.05, 0.2):
        found = graphopt.plan(model, Quantize("auto", max_error=budget))
        mean = math.sqrt(sum(layer.weight_error**2 for layer in found.layers) / 4)
        assert mean <= budget * (1 + 1e-6)
        sizes.append(found.bytes_after)
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > 2 * sizes[-1]


def test_auto_is_the_best_of_all_assignments(model: nn.Module) -> None:
    import itertools

    from graphopt.quantization.plan import CANDIDATES

    budget = 0.05
    tables = []
    for name in CANDIDATES:
        scheme, _, group = name.partition("-g")
        user = Quantize(scheme, int(group) if group else {"int8": 0}.get(scheme))
        tables.append([(layer.bytes_after, layer.weight_error) for layer in graphopt.plan(model, user).layers])
    tables.append([(layer.bytes_before, 0.0) for layer in graphopt.plan(model, Quantize("int8")).layers])
    best = min(
        sum(row[0] for row in chosen)
        for chosen in itertools.product(*zip(*tables, strict=True))
        if sum(row[1] ** 2 for row in chosen) <= budget**2 * 4
    )
    assert graphopt.plan(model, Quantize("auto", max_error=budget)).bytes_after == best


def test_a_sensitive_layer_gets_more_bits(model: nn.Module) -> None:
    found = graphopt.plan(model, Quantize("auto", max_error=0.08))
    bits = [layer.bytes_after for layer in found.layers]
    assert bits[1] == max(bits) and bits[1] > min(bits)


@pytest.mark.parametrize("planned", [True, False])
def test_the_compiled_program_follows_the_plan(model: nn.Module, planned: bool) -> None:
    asked = Quantize("auto", max_error=0.05)
    found = graphopt.plan(model, asked)
    given = found.quantize if planned else asked
    x = torch.randn(4, 128)
    with torch.no_grad():
        report = graphopt.explain(model, x, options={"quantize": given, "target": "reference"})
        y = torch.compile(model, backend=backend, options={"quantize": given, "target": "reference"})(x)
        expected = x
        for layer, linear in zip(found.layers, model, strict=True):
            scheme = schemes.named(layer.scheme) if layer.scheme else None
            weight = scheme.unpack(scheme.pack(linear.weight), 128) if scheme else linear.weight
            expected = expected @ weight.T
    rewritten = sum(ran.rewrites for ran in report.graphs[0].passes if ran.name == "quantize_linears")
    assert rewritten == sum(layer.scheme != "" for layer in found.layers)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


def test_a_weight_that_is_not_finite_stays(model: nn.Module) -> None:
    with torch.no_grad():
        model[2].weight[0, 0] = float("inf")
    for asked in (Quantize("int8"), Quantize("auto", max_error=0.1)):
        layer = graphopt.plan(model, asked).layers[2]
        assert layer.scheme == ""
    assert "infinities" in graphopt.plan(model, Quantize("int8")).layers[2].reason


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scheme": "auto"}, "takes both or neither"),
        ({"scheme": "int8", "max_error": 0.1}, "takes both or neither"),
        ({"scheme": "auto", "max_error": 0}, "between 0 and 1"),
        ({"scheme": "auto", "max_error": "small"}, "between 0 and 1"),
    ],
)
def test_budgets_are_validated(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Quantize(**arguments)  # type: ignore[arg-type]


def test_experts_share_the_budget() -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=4,
    )  # fmt: skip
    mixture = MixtralForCausalLM(config).eval()
    stacks = [f"model.layers.0.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")]
    asked = Quantize("auto", max_error=0.03)
    found = graphopt.plan(mixture, asked)
    layers = {layer.name: layer for layer in found.layers}
    up = layers[stacks[0]]
    assert up.scheme and up.bytes_before == 4 * 192 * 64 * 4
    assert up.bytes_after == schemes.named(up.scheme).nbytes(4 * 192, 64) and 0 < up.weight_error < 0.2
    assert math.sqrt(sum(layer.weight_error**2 for layer in found.layers) / len(layers)) <= 0.03 * (1 + 1e-6)
    # The same names take part where the graph is planned; there the router, no nn.Linear, has a share as well.
    ids = torch.arange(6)[None]
    with torch.no_grad():
        report = graphopt.explain(mixture, ids, options={"quantize": asked, "target": "reference"})
        rewrites = {ran.name: ran.rewrites for ran in report.graphs[0].passes}
        assert rewrites["quantize_experts"] == 2
        given = {"quantize": found.quantize, "target": "reference"}
        ran = {entry.name: entry for entry in graphopt.explain(mixture, ids, options=given).graphs[0].passes}
        assert ran["quantize_experts"].rewrites == sum(bool(layers[name].scheme) for name in stacks)
    # A row that no code can hold leaves its experts as they are.
    with torch.no_grad():
        mixture.get_parameter(stacks[0])[1, 3, 5] = float("nan")
    layers = {layer.name: layer for layer in graphopt.plan(mixture, Quantize("int8")).layers}
    assert "infinities" in layers[stacks[0]].reason and layers[stacks[1]].scheme == "int8-g64"
    elsewhere = graphopt.plan(mixture.to("meta"), Quantize("int8", skip="proj.weight|lm_head")).layers
    assert {layer.reason for layer in elsewhere if layer.name in stacks} == {
        "grouped products are quantised on the CPU only, not on meta"
    }


def test_a_model_without_linears_is_an_error() -> None:
    with pytest.raises(OptionError, match="no linear weight"):
        graphopt.plan(nn.ReLU(), Quantize("int8"))
