"""`graphopt.explain`: the data of the report, its tables, and what `debug` says meanwhile."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import sympy
import torch
import torch.nn.functional as F

import graphopt
from graphopt import cost, kernel_sources
from graphopt.errors import OptionError


def gated(x: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    return F.linear(F.silu(F.linear(x, up)), down)


def inputs() -> list[torch.Tensor]:
    return [torch.randn(5, 8), torch.randn(16, 8), torch.randn(8, 16)]


REFERENCE = {"target": "reference"}


def test_bytes_and_flops_before_and_after_on_a_named_device() -> None:
    report = graphopt.explain(gated, *inputs(), options=REFERENCE, roofline="A100")
    study = report.graphs[0].study
    assert study is not None and study.captured.device == "A100"
    assert study.captured.cost.flops == 2 * 5 * 8 * 16 * 2 + 5 * 16
    assert study.optimised.least == 4 * (5 * 8 + 2 * 8 * 16 + 5 * 8)
    assert study.optimised.seconds >= study.optimised.least_seconds > 0
    products = [kernel for kernel in study.optimised.kernels if kernel.op == "graphopt.linear.default"]
    assert len(products) == 2 and all("test_explain.py" in kernel.where for kernel in products)
    assert "roofline of A100" in str(report) and "where the time should go" in str(report)


def test_symbolic_sizes_appear_in_the_table() -> None:
    with torch.no_grad():
        torch._dynamo.mark_dynamic(given := torch.randn(5, 8), 0)
        report = graphopt.explain(lambda x: x.sin() + 1, given, options=REFERENCE, roofline="H100")
    study = report.graphs[0].study
    assert study is not None
    (symbol,) = study.captured.cost.bytes.free_symbols
    assert study.captured.sizes == {symbol.name: 5}
    assert f"{128 * symbol} = 640 B" in str(report)


def test_memory_over_time_counts_what_is_alive() -> None:
    report = graphopt.explain(lambda x: (x.sin() @ x).relu(), torch.randn(4, 4), options=REFERENCE, roofline="H100")
    study = report.graphs[0].study
    assert study is not None
    assert [point.bytes for point in study.captured.memory] == [64, 128, 128]  # one value in, one value out
    assert study.captured.input_bytes == 64 and study.captured.peak.bytes == 128


def test_snapshots_hold_the_graph_after_each_step() -> None:
    report = graphopt.explain(gated, *inputs(), options=REFERENCE, roofline="H100")
    study = report.graphs[0].study
    assert study is not None
    assert [shot.step for shot in study.snapshots] == [
        "capture",
        *(p.name for p in report.graphs[0].passes if p.rewrites),
    ]
    made = [line for line in study.snapshots[-1].lines if line.made_by.startswith("recognize_linear")]
    assert len(made) == 2 and all("graphopt.linear" in line.text for line in made)


def test_the_users_cost_model_is_asked() -> None:
    def model(region: torch.fx.GraphModule) -> cost.Cost:
        return cost.Cost(sympy.Integer(7), sympy.Integer(11), 1)

    report = graphopt.explain(gated, *inputs(), options={**REFERENCE, "cost_model": model}, roofline="H100")
    study = report.graphs[0].study
    assert study is not None
    assert study.captured.cost.bytes == 7 * study.captured.cost.launches


def test_wrong_names_are_refused() -> None:
    with pytest.raises(OptionError, match="roofline: unknown device 'TPU': it must be one of H200"):
        graphopt.explain(gated, *inputs(), roofline="TPU")
    with pytest.raises(OptionError, match="'cost_model' must be a function"):
        graphopt.Options(cost_model=3)  # type: ignore[arg-type]


def test_graph_breaks_and_recompilations_have_reasons() -> None:
    def inner(x: torch.Tensor) -> torch.Tensor:
        return x.sin()

    def program(x: torch.Tensor) -> torch.Tensor:
        for count in (4, 2):
            if x.sum() > 100:
                x = x + 1
            y = inner(x[:count])
        return y

    report = graphopt.explain(program, torch.randn(4, 3), options=REFERENCE, roofline="H100")
    (broken,), (again,) = report.graph_breaks, report.recompiles
    assert "Data-dependent branching" in broken and "test_explain.py:" in broken
    assert "size mismatch" in again
    assert "graph break" in str(report) and "recompiled" in str(report)


@pytest.mark.parametrize(
    ("level", "said", "silent"),
    [
        (0, (), ("graphopt:",)),
        (1, ("recognize/recognize_linear: 2 rewrites",), ("graphopt.linear.default: meaning",)),
        (2, ("graphopt.linear.default: meaning",), ("+%linear",)),
        (3, ("after recognize_linear:", "+%linear"), ("kernel",)),
    ],
)
def test_debug_levels(
    level: int, said: tuple[str, ...], silent: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    graphopt.explain(gated, *inputs(), options={**REFERENCE, "debug": level}, roofline="H100")
    text = capsys.readouterr().err
    assert all(part in text for part in said) and not any(part in text for part in silent)


def test_debug_4_and_the_dump_show_the_generated_kernels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"target": "inductor", "debug": 4, "dump": str(tmp_path)}
    with torch.no_grad():
        torch.compile(lambda x: x.sin() + 1, backend="graphopt", options=options)(torch.randn(9))
    text = capsys.readouterr().err
    assert "kernel cpp_fused" in text and 'extern "C"' in text
    (kernel,) = (tmp_path / "graph_0000" / "kernels").glob("*.cpp")
    assert "sin" in kernel.read_text()
    assert (tmp_path / "graph_0000" / "kernels" / "call.py").exists()
    report = json.loads((tmp_path / "graph_0000" / "report.json").read_text())
    assert report["passes"] and not report["kernels"]


def test_kernels_are_found_in_what_inductor_writes() -> None:
    source = (
        "import torch\n# Source node: [y], Original ATen: [sin]\n#   %sin : Tensor = ...\n"
        "cpp_fused_sin_0 = async_compile.cpp_pybinding(['const float*'], r'''\nextern \"C\" void kernel() {}\n''')\n"
        "def call(args):\n    pass\n"
    )
    kernel, rest = kernel_sources.of_inductor(source)
    assert (kernel.name, kernel.language, kernel.nodes) == ("cpp_fused_sin_0", "cpp", ("sin",))
    assert kernel.source.startswith('extern "C"')
    assert rest.name == "call" and "def call" in rest.source and "extern" not in rest.source
    assert kernel_sources.of_inductor("") == []
