"""The report shows the compiled kernels that a graph calls, with their sources."""

from __future__ import annotations

import pytest
import torch

import graphopt
from graphopt.backends import cpp
from graphopt.backends.cpp import sources

pytestmark = pytest.mark.usefixtures("cpp_library")


def test_every_lowering_has_a_source() -> None:
    for lowering in cpp.lowerings():
        assert f'"{lowering.name.removeprefix("cpp.")}(' in sources.source(lowering.name), lowering.name


def test_the_report_lists_the_kernels_that_are_called() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 8)).eval()
    with torch.no_grad():
        (graph,) = graphopt.explain(model, torch.randn(2, 8), options={"target": "cpu"}).graphs
    (kernel,) = [each for each in graph.kernels if each.name == "cpp.linear"]
    assert graph.study is not None and kernel.built_for == torch.ops.graphopt_cpp.isa()
    estimated = {each.node: each.shapes for each in graph.study.optimised.kernels}
    assert [estimated[node].split(" -> ")[1] for node in kernel.calls] == ["f32[2, 16]", "f32[2, 8]"]
