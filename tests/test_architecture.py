"""The layers, budgets and names of docs/explanation/design.md, checked on the tree."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PASS_BUDGET, FILE_BUDGET = 150, 400

# From the bottom: a module may import from its own layer and from those below it.
LAYERS = (
    ("graphopt.errors", "graphopt.options", "graphopt.quantize_options", "graphopt.prune_options", "graphopt._compat"),
    (
        "graphopt.match",
        "graphopt.edit",
        "graphopt.text",
        "graphopt.program",
        "graphopt.shapes",
        "graphopt.views",
        "graphopt.index_arithmetic",
        "graphopt.index_map",
        "graphopt.index_inverse",
        "graphopt.columns",
        "graphopt.row_ops",
        "graphopt.grouped",
        "graphopt.cost",
        "graphopt.estimate",
        "graphopt.ops",
        "graphopt.pruning",
        "graphopt.quantization",
        "graphopt.capture",
        "graphopt.runtime",
    ),
    (
        "graphopt.pipeline",
        "graphopt.lowering",
        "graphopt.verify",
        "graphopt.dump",
        "graphopt.watch",
        "graphopt.report",
        "graphopt.report_tables",
        "graphopt.study",
        "graphopt.kernel_sources",
        "graphopt.standalone",
    ),
    ("graphopt.passes", "graphopt.backends"),
    (
        "graphopt",
        "graphopt.backend",
        "graphopt.explanation",
        "graphopt.cli",
        "graphopt.commands",
        "graphopt.html",
        "graphopt.search",
        "graphopt.testing",
        "graphopt.bisect",
    ),
)
PRIVATE = tuple(f"torch._{name}" for name in ("inductor", "dynamo", "functorch", "subclasses", "guards", "dispatch"))


def source_files() -> list[tuple[str, Path]]:
    """(module name, file) of everything that is installed."""
    found = []
    for folder, package in (("graphopt", "graphopt"), ("passes", "graphopt.passes"), ("backends", "graphopt.backends")):
        for path in sorted((ROOT / folder).rglob("*.py")):
            relative = path.relative_to(ROOT / folder)
            if folder == "graphopt" and relative.parts[0] in ("passes", "backends"):
                continue
            parts = [part for part in relative.with_suffix("").parts if part != "__init__"]
            found.append((".".join([package, *parts]), path))
    assert len(found) > 20
    return found


FILES = source_files()


def layer_of(module: str) -> int | None:
    """The layer of a module: that of the longest name in LAYERS which it is or lies below."""
    best = -1, None
    for index, names in enumerate(LAYERS):
        for name in names:
            inside = module == name or (name != "graphopt" and module.startswith(name + "."))
            if inside and len(name) > best[0]:
                best = len(name), index
    return best[1]


def imports(path: Path) -> Iterator[tuple[str, int]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module, node.lineno
            for alias in node.names:
                yield f"{node.module}.{alias.name}", node.lineno


@pytest.mark.parametrize(("module", "path"), FILES, ids=[module for module, _ in FILES])
def test_imports_only_from_its_own_layer_and_below(module: str, path: Path) -> None:
    own = layer_of(module)
    assert own is not None, f"{module} has no layer: name it in LAYERS and in docs/explanation/design.md"
    for imported, line in imports(path):
        if not imported.startswith("graphopt."):
            continue
        below = layer_of(imported)
        assert below is None or below <= own, f"{path}:{line} imports {imported}, which lies above it"
        room, other = module.split(".")[1:2], imported.split(".")[1:2]
        if {*room, *other} == {"passes", "backends"}:
            raise AssertionError(f"{path}:{line}: passes and backends never import each other")


@pytest.mark.parametrize(("module", "path"), FILES, ids=[module for module, _ in FILES])
def test_only_compat_touches_private_torch(module: str, path: Path) -> None:
    if module.startswith("graphopt._compat"):
        return
    private = [f"{path}:{line} {name}" for name, line in imports(path) if name.startswith(PRIVATE)]
    assert not private, f"private torch modules belong to graphopt/_compat: {private}"


def test_passes_never_import_triton() -> None:
    for module, path in FILES:
        if module.startswith("graphopt.passes"):
            assert not [name for name, _ in imports(path) if name.split(".")[0] == "triton"], path


@pytest.mark.parametrize(("module", "path"), FILES, ids=[module for module, _ in FILES])
def test_fits_its_budget(module: str, path: Path) -> None:
    lines = len(path.read_text().splitlines())
    budget = PASS_BUDGET if module.startswith("graphopt.passes.") else FILE_BUDGET
    assert lines <= budget, f"{path} has {lines} lines of {budget}: the abstraction is wrong, mend that"


def test_tests_and_kernels_fit_the_budget_too() -> None:
    for path in (*(ROOT / "tests").rglob("*.py"), *(ROOT / "backends" / "cpp" / "src").iterdir()):
        assert len(path.read_text().splitlines()) <= FILE_BUDGET, path


@pytest.mark.parametrize(("module", "path"), FILES, ids=[module for module, _ in FILES])
def test_says_what_it_is(module: str, path: Path) -> None:
    documented = ast.get_docstring(ast.parse(path.read_text()))
    assert documented and documented.splitlines()[0].strip(), f"{path} needs a docstring that says what it is"
    assert path.stem not in ("utils", "common", "base", "manager", "helpers_misc"), path
