"""The report for GPUs runs; what it finds on a GPU is a matter of `pytest -m gpu`, on a CPU of the interpreter."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.gpu import programs


def report(path: Path, *arguments: str) -> dict[str, list[dict[str, str]]]:
    command = [sys.executable, "-m", "tests.gpu.run", "--json", str(path), *arguments]
    finished = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    found: dict[str, list[dict[str, str]]] = json.loads(path.read_text())
    return found


@pytest.mark.rotate(one_in=4)
def test_programs_agree_under_the_interpreter(tmp_path: Path) -> None:
    found = report(tmp_path / "found.json", "--device", "cpu", "--parts", "programs")
    names = {f"{program.name} {dtype}" for program in programs.programs(small=True) for dtype in programs.DTYPES}
    assert {answer["name"] for answer in found["answers"]} == names
    assert {answer["outcome"] for answer in found["answers"]} == {"passed"}


def test_no_gpu_is_said() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    finished = subprocess.run(
        [sys.executable, "-m", "tests.gpu.run"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 2 and "no GPU that torch can use" in finished.stderr


@pytest.mark.gpu
def test_all_of_it(tmp_path: Path) -> None:
    found = report(tmp_path / "found.json")
    assert found["answers"] and found["figures"]
