"""The report as a page: nothing comes from elsewhere, everything is escaped, a browser (if there is one) draws it."""

from __future__ import annotations

import dataclasses
import functools
import html
import html.parser
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from typer.testing import CliRunner

import graphopt
from graphopt.cli import app
from graphopt.edit import Refusal
from graphopt.html import charts, page, render
from graphopt.lowering import KernelSource
from graphopt.report import Report
from graphopt.study import Line, Snapshot

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
EVIL = "</script><script>document.title='broken'</script><img src=x onerror=\"document.title='broken'\">&amp;"


@functools.cache
def report() -> Report:
    def program(x: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        return F.linear(F.silu(F.linear(x, up)), down).relu().relu()

    torch.manual_seed(0)
    given = [torch.randn(5, 8), torch.randn(16, 8), torch.randn(8, 16)]
    return graphopt.explain(program, *given, options={"target": "triton"}, roofline="H100")


def evil() -> Report:
    """A report in which every text that comes from a model or a pass tries to break out."""
    graph = dataclasses.replace(report().graphs[0])
    first = graph.passes[0]
    refusal = Refusal(EVIL, EVIL, EVIL, EVIL)
    graph.passes = [dataclasses.replace(first, name=EVIL, rewrites=1, error=EVIL, refusals=(refusal,)), *graph.passes]
    assert graph.study is not None
    shots = (*graph.study.snapshots, Snapshot(EVIL, (Line(EVIL, EVIL, EVIL, EVIL),)))
    graph.study = dataclasses.replace(graph.study, snapshots=shots)
    graph.fall_back(EVIL, EVIL)
    graph.notes.append(EVIL)
    return Report([graph], [EVIL], [EVIL], "H100")


class Elements(html.parser.HTMLParser):
    """The elements of a page with their attributes, and the text of each kind of script."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def differences(text: str) -> list[dict]:
    (data,) = re.findall(r'<script type="application/json" id="differences">(.*?)</script>', text, flags=re.DOTALL)
    return json.loads(data)


@pytest.mark.parametrize("make", [report, evil], ids=["a report", "a hostile one"])
def test_page_needs_nothing_else_and_runs_only_its_own_script(make) -> None:
    text = render(make(), EVIL)
    found = Elements(text).found
    assert [tag for tag, _ in found].count("script") == 2
    assert not {"img", "link", "iframe", "object"} & {tag for tag, _ in found}
    for _, attributes in found:
        assert not [name for name in attributes if name.startswith("on") or name == "src"]
        assert (attributes.get("href") or "#").startswith("#")
    assert "default-src 'none'" in text and "http://" not in text and "https://" not in text


def test_page_shows_passes_kernels_memory_and_sources() -> None:
    text = render(report(), "a model")
    for part in (
        "recognize_<wbr>linear",
        "form_<wbr>regions",
        "H100",
        "Memory over time",
        "<polygon",
        "@triton.jit",
        "region_",
    ):
        assert part in text
    (graph,) = differences(text)
    names = [step["name"] for step in graph["steps"]]
    assert names[0] == "capture" and "recognize_linear" in names
    step = graph["steps"][names.index("recognize_linear")]
    added = [step["lines"][j] for kind, _, _, low, high in step["changes"] if kind != "equal" for j in range(low, high)]
    assert any("graphopt.linear" in graph["lines"][number][0] for number in added)


def test_changes_lead_from_each_snapshot_to_the_next() -> None:
    (graph,) = differences(render(report(), "a model"))
    for before, after in zip(graph["steps"], graph["steps"][1:], strict=False):
        made = []
        for kind, i1, i2, j1, j2 in after["changes"]:
            made += before["lines"][i1:i2] if kind == "equal" else after["lines"][j1:j2]
        texts = [[graph["lines"][number][0] for number in side] for side in (made, after["lines"])]
        assert texts[0] == texts[1]


def test_a_report_without_a_study_has_a_page_too() -> None:
    bare = Report([dataclasses.replace(report().graphs[0], study=None, kernels=[])])
    assert "No code was generated" in render(bare, "bare")


def test_a_page_says_what_the_graph_notes() -> None:
    noted = Report([dataclasses.replace(report().graphs[0], notes=["recorded as a CUDA graph"])])
    assert "recorded as a CUDA graph" in render(noted, "noted")


def test_bars_share_one_scale_and_leave_nothing_out() -> None:
    study = report().graphs[0].study
    assert study is not None
    bars = charts.roofline_bars(study.optimised)
    assert sum(bar.count for bar in bars) == len(study.optimised.kernels)
    assert abs(sum(bar.share for bar in bars) - 1) < 1e-6
    assert max(max(bar.memory, bar.compute) + bar.launch for bar in bars) <= 100.001


def test_a_kernel_has_bars_for_the_shapes_that_it_is_called_with() -> None:
    (graph,) = report().graphs
    assert graph.study is not None
    kernels = [kernel for kernel in graph.kernels if kernel.calls]
    assert kernels
    for kernel in kernels:
        bars = charts.kernel_bars(kernel.calls, graph.study.optimised)
        assert [node for bar in bars for node in bar.nodes] and sum(bar.count for bar in bars) == len(kernel.calls)
        assert max(max(bar.memory, bar.compute) + bar.launch for bar in bars) == pytest.approx(100)
    shown = re.sub("<wbr>", "", render(report(), "a model"))
    called = {node for kernel in kernels for node in kernel.calls}
    shapes = [kernel.shapes for kernel in graph.study.optimised.kernels if kernel.node in called]
    assert "f32[5, 8]" in shapes[0] and all(html.escape(each) in shown for each in shapes)


def test_a_compiled_kernel_says_what_it_was_built_for() -> None:
    (node,) = {kernel.node for kernel in report().graphs[0].study.optimised.kernels[:1]}
    compiled = KernelSource("cpp.linear", "cpp", "void f() {}", calls=(node,), built_for="avx2")
    text = render(Report([dataclasses.replace(report().graphs[0], kernels=[compiled])]), "a model")
    assert "C++ for avx2, 1 lines" in text and "void f() {}" in text


def test_long_sources_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "_LONGEST_SOURCE", 40)
    assert "... cut here" in render(report(), "a model")


def test_command_writes_the_page(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    command = ["explain", "llama:64x1", "--length", "8", "--target", "reference", "--roofline", "H100"]
    CliRunner().invoke(app, [*command, "--html", str(path)], catch_exceptions=False)
    assert "llama:64x1, float32, 8 tokens" in path.read_text()
    refused = CliRunner().invoke(app, [*command, "--html", str(tmp_path / "nowhere" / "report.html")])
    assert refused.exit_code == 2 and "there is no folder" in refused.output


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", [1280, 390])
def test_browser_draws_it(width: int, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text(render(evil(), "drawn"))
    assert BROWSER is not None
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    shown = subprocess.run(
        [*command, f"--window-size={width},900", "--dump-dom", path.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    ).stdout
    assert "<title>graphopt: drawn</title>" in shown, "a text of the report ran as a script"
    assert 'class="block different"' in shown and "nodes removed" in shown and 'aria-pressed="true"' in shown
