"""Calibration: what is recorded, saved files, and that rounding with it lowers the error it is meant to
lower."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import graphopt
from graphopt import Calibration, OptionError, Quantize
from graphopt.errors import StoredFileError
from graphopt.quantization import operations, rounding, schemes
from graphopt.quantization.calibration import Inputs


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(48, 48), nn.Linear(48, 24)
        self.kept_as_k_by_n = nn.Parameter(torch.randn(48, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.q(x) + (x @ self.kept_as_k_by_n).sum() + self.k(x).sum()


@pytest.fixture
def correlated() -> Inputs:
    """Inputs with a few large channels and strong correlations, as the inputs of transformers have."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(256, 12, generator=generator) @ torch.randn(12, 96, generator=generator)
    rows += 0.1 * torch.randn(256, 96, generator=generator)
    rows[:, ::17] *= 20
    return Inputs(rows.bfloat16(), rows.abs().amax(0), rows.abs().mean(0))


def output_error(weight: torch.Tensor, rounded: torch.Tensor, inputs: Inputs) -> float:
    return (inputs.rows.float() @ (rounded - weight).T).norm().item()


def test_every_matrix_product_with_a_parameter_is_seen() -> None:
    model, x = Attention(), torch.randn(5, 7, 48)
    found = graphopt.calibrate(model, [x, (2 * x,)], rows=1000)
    assert set(found.inputs) == {"q.weight", "k.weight", "kept_as_k_by_n"}
    inputs = found.inputs["q.weight"]
    assert inputs is found.inputs["k.weight"]
    assert inputs.rows.shape == (70, 48)
    both = torch.cat((x, 2 * x)).reshape(-1, 48)
    assert torch.equal(inputs.rows, both.bfloat16())
    assert torch.equal(inputs.largest, both.abs().amax(0))
    torch.testing.assert_close(inputs.mean, both.abs().mean(0))


def test_rows_are_sampled_evenly_and_bounded() -> None:
    model = nn.Linear(1, 4)
    calls = [torch.full((10, 1), float(index)) for index in range(100)]
    rows = graphopt.calibrate(model, calls, rows=200).inputs["weight"].rows
    assert rows.shape == (200, 1)
    assert 35 < rows.float().mean() < 65
    assert rows.float().std() > 20


def test_keyword_arguments_and_a_runner() -> None:
    model = nn.Linear(4, 4)
    x = torch.randn(3, 4)
    by_name = graphopt.calibrate(model, [{"input": x}])
    assert by_name == graphopt.calibrate(model, [x], run=lambda called, element: called(element))


def test_saved_and_loaded(tmp_path: Path) -> None:
    found = graphopt.calibrate(Attention(), [torch.randn(5, 48)])
    found.save(tmp_path / "c.safetensors")
    loaded = Calibration.load(tmp_path / "c.safetensors")
    assert loaded == found and hash(loaded) == hash(found)
    assert loaded.inputs["q.weight"] is loaded.inputs["k.weight"]


def test_damaged_and_foreign_files_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "c.safetensors"
    graphopt.calibrate(Attention(), [torch.randn(5, 48)]).save(path)
    content = path.read_bytes()
    for damaged in (content[:-10], content[:30], b"", b"\x00" * 100, b"not a file"):
        path.write_bytes(damaged)
        with pytest.raises(StoredFileError, match="damaged or no safetensors"):
            Calibration.load(path)
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 255]))
    with pytest.raises(StoredFileError, match="digest"):
        Calibration.load(path)
    save_file({"a": torch.ones(2)}, path)
    with pytest.raises(StoredFileError, match="not a graphopt calibration"):
        Calibration.load(path)
    with pytest.raises(FileNotFoundError):
        Calibration.load(tmp_path / "absent.safetensors")


def test_no_inputs_and_no_linears_are_errors() -> None:
    with pytest.raises(OptionError, match="got no inputs"):
        graphopt.calibrate(nn.Linear(2, 2), [])
    with pytest.raises(OptionError, match="no matrix product"):
        graphopt.calibrate(nn.ReLU(), [torch.ones(2)])
    with pytest.raises(OptionError, match="rows=0"):
        graphopt.calibrate(nn.Linear(2, 2), [torch.ones(2, 2)], rows=0)


def test_a_name_is_found_by_its_end() -> None:
    found = graphopt.calibrate(nn.Sequential(nn.Sequential(nn.Linear(2, 2)), nn.Linear(2, 2)), [torch.ones(1, 2)])
    assert found.find("0.0.weight") is found.inputs["0.0.weight"]
    assert found.find("1.weight") is found.inputs["1.weight"]
    assert found.find("weight") is None and found.find("") is None


@pytest.mark.parametrize("name", ["int4-g32", "int4-g32-sym", "nf4-g64", "mxfp4", "q4_k", "int8", "fp8"])
def test_gptq_lowers_the_error_of_the_output(name: str, correlated: Inputs) -> None:
    torch.manual_seed(0)
    weight, scheme = torch.randn(40, 96), schemes.named(name)
    nearest = rounding.approximated(weight, scheme, None, "nearest")
    better = rounding.approximated(weight, scheme, correlated, "gptq")
    assert output_error(weight, better, correlated) < 0.8 * output_error(weight, nearest, correlated)


@pytest.mark.parametrize("columns", [1, 33, 96])
@pytest.mark.parametrize("name", ["int4-g32", "q4_k", "int8"])
def test_gptq_takes_odd_sizes_and_inputs_without_signal(name: str, columns: int) -> None:
    weight, scheme = torch.randn(3, columns), schemes.named(name)
    silent = Inputs(torch.zeros(4, columns, dtype=torch.bfloat16), torch.zeros(columns), torch.zeros(columns))
    packed = rounding.gptq(weight, scheme, silent)
    assert [(tuple(part.shape), part.dtype) for part in packed] == scheme.layout(3, columns)
    # Nothing to make up for: the codes are the nearest ones.
    assert torch.equal(scheme.unpack(packed, columns), scheme.unpack(scheme.pack(weight), columns))


def test_gptq_chooses_the_units_of_each_superblock(correlated: Inputs) -> None:
    torch.manual_seed(0)
    wide = Inputs(*(torch.cat([part] * 4, -1) for part in (correlated.rows, correlated.mean, correlated.largest)))
    weight, scheme = torch.randn(20, 384), schemes.named("q4_k")
    weight[:, 256:] *= 30
    nearest = rounding.approximated(weight, scheme, None, "nearest")
    better = rounding.approximated(weight, scheme, wide, "gptq")
    for part in (slice(256), slice(256, 384)):
        assert (better - weight)[:, part].norm() < 4 * (nearest - weight)[:, part].norm()
    assert output_error(weight, better, wide) < 0.8 * output_error(weight, nearest, wide)


def test_awq_lowers_the_error_of_the_output(correlated: Inputs) -> None:
    torch.manual_seed(0)
    weight, scheme = torch.randn(40, 96), schemes.named("int4-g32")
    nearest = rounding.approximated(weight, scheme, None, "nearest")
    better = rounding.approximated(weight, scheme, correlated, "awq")
    assert output_error(weight, better, correlated) < 0.9 * output_error(weight, nearest, correlated)


def test_smoothquant_lowers_the_error_where_inputs_have_outliers(correlated: Inputs) -> None:
    torch.manual_seed(0)
    weight, rows = torch.randn(40, 96), correlated.rows.float()
    scale = rounding.channel_scale([weight], schemes.named("int8-dynamic"), correlated, "smoothquant")
    exact = rows @ weight.T

    def error(scale: torch.Tensor) -> float:
        packed = operations.quantize_weight(weight, "int8-dynamic", scale)
        found = operations.quantized_linear(rows / scale, packed, None, "int8-dynamic")
        return (found - exact).norm().item()

    assert error(scale) < error(torch.ones(96))


def test_rounding_options_need_their_partners() -> None:
    found = graphopt.calibrate(nn.Linear(4, 4), [torch.ones(1, 4)])
    with pytest.raises(OptionError, match="rounding='gptq'.*needs calibration"):
        Quantize("int4", rounding="gptq")
    with pytest.raises(OptionError, match="calibration='x'.*graphopt.calibrate"):
        Quantize("int4", calibration="x")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="smoothquant.*round the input too"):
        Quantize("int8", calibration=found, rounding="smoothquant")
    with pytest.raises(OptionError, match="rounding='gtpq'.*did you mean 'gptq'"):
        Quantize("int4", calibration=found, rounding="gtpq")


def test_options_with_equal_calibrations_are_equal() -> None:
    x = torch.ones(1, 4)
    model = nn.Linear(4, 4)
    first, second = (Quantize("int4", calibration=graphopt.calibrate(model, [x])) for _ in range(2))
    assert first == second and hash(first) == hash(second) and repr(first) == repr(second)
    assert first != Quantize("int4", calibration=graphopt.calibrate(model, [2 * x]))
