"""Tiny models that are not trained, and what a pass did to them: shared by the tests of pruning."""

from __future__ import annotations

from typing import Any

import torch

import graphopt
from graphopt.pipeline import PassReport
from tests.suite.architectures import BY_NAME


def frozen(name: str) -> Any:
    """A tiny model of an architecture, always with the same weights."""
    torch.manual_seed(0)
    return BY_NAME[name].build().eval().requires_grad_(False)


def done_by(report: graphopt.Report, pass_name: str) -> list[PassReport]:
    """What a pass did, for each graph in which it ran."""
    return [done for graph in report.graphs for done in graph.passes if done.name == pass_name]
