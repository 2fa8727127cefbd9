"""Passes that other packages bring under the entry-point group `graphopt.passes` run like our own."""

from __future__ import annotations

import importlib.metadata
import sys
import types
from collections.abc import Iterator

import pytest
import torch

import graphopt
from graphopt import passes
from graphopt.errors import PassError

seen: list[int] = []


@graphopt.graph_pass(exactness="bitwise")
def count_nodes(graph_module: torch.fx.GraphModule) -> int:
    seen.append(len(graph_module.graph.nodes))
    return 0


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Iterator[types.SimpleNamespace]:
    module = types.ModuleType("a_package_of_passes")
    module.count_nodes, module.not_a_pass = count_nodes, len  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)

    def as_entry_point(name: str) -> None:
        entry = importlib.metadata.EntryPoint(name, f"{module.__name__}:{name}", "graphopt.passes")
        real = importlib.metadata.entry_points

        def entry_points(**wanted: str) -> object:
            return [entry] if wanted.get("group") == "graphopt.passes" else real(**wanted)

        monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)

    passes.installed.cache_clear()
    yield types.SimpleNamespace(as_entry_point=as_entry_point)
    passes.installed.cache_clear()


def test_an_installed_pass_runs(install: types.SimpleNamespace) -> None:
    install.as_entry_point("count_nodes")
    seen.clear()
    compiled = torch.compile(lambda x: x + 1, backend="graphopt", options={"target": "reference"})
    assert torch.equal(compiled(torch.ones(2)), torch.full((2,), 2.0))
    assert seen


def test_an_entry_point_that_is_no_pass_is_named(install: types.SimpleNamespace) -> None:
    install.as_entry_point("not_a_pass")
    with pytest.raises(PassError, match="not_a_pass.*brings no pass.*graph_pass"):
        passes.installed()


def test_nothing_installed_is_nothing() -> None:
    passes.installed.cache_clear()
    assert passes.installed() == ()
