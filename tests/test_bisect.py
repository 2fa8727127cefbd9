"""Bisecting on an imitated program: what runs are made, what is found, when it says that there is nothing to find."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from graphopt.bisect import BisectError, Result, run, search


class Imitation:
    """A program with one graph of rewrites (pass names in order), wrong from rewrite `bad` on."""

    def __init__(self, made: list[str], bad: int | None, *, always: bool = False) -> None:
        self.made, self.bad, self.always, self.calls = made, bad, always, 0

    def __call__(self, environment: Mapping[str, str]) -> Result:
        self.calls += 1
        disabled = environment.get("GRAPHOPT_DISABLE", "").split(",")
        kept = [number for number, name in enumerate(self.made, 1) if name not in disabled]
        kept = kept[: int(environment.get("GRAPHOPT_LIMIT", len(kept)))]
        if "GRAPHOPT_DUMP" in environment:
            folder = Path(environment["GRAPHOPT_DUMP"]) / "graph_0000"
            folder.mkdir(parents=True)
            names = [self.made[number - 1] for number in kept]
            counts = [{"name": name, "rewrites": names.count(name)} for name in dict.fromkeys(self.made)]
            (folder / "report.json").write_text(json.dumps({"passes": counts}))
            (folder / "00_last.txt").write_text("\n".join(f"%{number} = {self.made[number - 1]}" for number in kept))
        wrong = self.always or (self.bad is not None and self.bad in kept)
        return Result(int(wrong), "wrong" if wrong else "right")


@pytest.mark.parametrize("bad", [1, 2, 17, 40, 41, 64])
@pytest.mark.parametrize("compare_output", [False, True])
def test_finds_the_rewrite_in_logarithmic_time(bad: int, compare_output: bool) -> None:
    program = Imitation(["merge"] * 40 + ["fuse"] * 24, bad)
    found = search(program, compare_output=compare_output)
    assert (found.number, found.pass_name, found.confirmed) == (bad, "merge" if bad <= 40 else "fuse", True)
    assert found.runs == program.calls <= 12
    assert f"+%{bad} = {found.pass_name}" in found.changes[0]
    assert f"GRAPHOPT_LIMIT={bad - 1} is the last good limit" in str(found)


def test_wrong_without_any_rewrite() -> None:
    with pytest.raises(BisectError, match="without any rewrite"):
        search(Imitation(["merge"], None, always=True))


def test_right_with_all_rewrites() -> None:
    with pytest.raises(BisectError, match="nothing to find"):
        search(Imitation(["merge"] * 3, None))


def test_program_that_does_not_use_graphopt() -> None:
    with pytest.raises(BisectError, match="made no rewrite"):
        search(lambda environment: Result(int("GRAPHOPT_LIMIT" not in environment), ""))


PROGRAM = """
import torch, graphopt
from graphopt import edit

@graphopt.graph_pass(exactness="rounding")
def shift(graph_module):
    count = 0
    for node in graph_module.graph.find_nodes(op="call_function", target=torch.ops.aten.sin.default):
        with edit.rewriting(graph_module, node) as rewrite:
            wrong = rewrite.call(torch.ops.aten.mul.Tensor, node.args[0], 1.5 if count == 1 else 1.0)
            rewrite.replace(node, rewrite.call(torch.ops.aten.sin.default, wrong))
        count += rewrite.applied
    return count

def function(x):
    return x.sin().cos().sin().cos().sin()

x = torch.ones(3)
options = {"passes": [shift], "target": "reference"}
torch.testing.assert_close(torch.compile(function, backend="graphopt", options=options)(x), function(x))
"""


@pytest.mark.slow  # starts Python nine times
def test_finds_it_in_a_real_program(tmp_path: Path) -> None:
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    found = run([sys.executable, str(path)], timeout=120)
    assert (found.pass_name, found.confirmed) == ("shift", True)
    assert "1.5" in found.changes[0]


def test_dump_runs_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    import graphopt

    monkeypatch.setenv("GRAPHOPT_DUMP", str(tmp_path))
    constant = torch.tensor([1.0, 2.0, 3.0])
    graphopt.explain(lambda x: (x * 1 + constant).softmax(-1).T, torch.randn(4, 3), options={"target": "reference"})
    folder = tmp_path / "graph_0000"
    programs = sorted(folder.glob("*.py"))
    assert [path.name for path in programs][0] == "00_capture.py"
    assert len(programs) >= 2
    assert (folder / f"{programs[1].stem}.diff").read_text().startswith("--- before")
    assert json.loads((folder / "report.json").read_text())["passes"]
    for path in (programs[0], programs[-1]):
        done = subprocess.run([sys.executable, path], capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("tensor(")
