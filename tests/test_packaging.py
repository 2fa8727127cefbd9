"""The package: every file is in the wheel, one name for each module, the backend is found by name."""

from __future__ import annotations

import fnmatch
import importlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = PROJECT["tool"]["setuptools"]
SOURCES = (".py", ".cpp", ".h", ".typed", ".html", ".css", ".js")


def installed_files() -> list[Path]:
    """Everything below graphopt/, links followed, that must be in a wheel; as paths relative to the root."""
    found = []
    for folder, _, names in os.walk(ROOT / "graphopt", followlinks=True):
        found += [Path(folder, name).relative_to(ROOT) for name in names if name.endswith(SOURCES)]
    return sorted(found)


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """The output of a command that must succeed."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{command} failed:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_list_of_packages_is_the_tree() -> None:
    folders = {path.parent for path in installed_files() if path.suffix == ".py"}
    assert sorted(".".join(folder.parts) for folder in folders) == sorted(SETUPTOOLS["packages"])


def test_every_folder_with_modules_is_a_package() -> None:
    for path in installed_files():
        if path.suffix == ".py":
            assert (ROOT / path.parent / "__init__.py").exists(), (
                f"{path.parent} has modules but no __init__.py"
            )


def test_other_files_are_package_data() -> None:
    patterns = [pattern for patterns in SETUPTOOLS["package-data"].values() for pattern in patterns]
    packages = {Path(*name.split(".")) for name in SETUPTOOLS["packages"]}
    for path in installed_files():
        if path.suffix != ".py":
            owner = next(parent for parent in path.parents if parent in packages)
            inside = str(path.relative_to(owner))
            assert any(fnmatch.fnmatch(inside, pattern) for pattern in patterns), f"{path} is in no wheel"


@pytest.mark.parametrize("name", ["passes", "backends"])
def test_folder_has_one_name(name: str) -> None:
    assert os.readlink(ROOT / "graphopt" / name) == f"../{name}"
    with pytest.raises(ImportError, match=f"graphopt.{name}"):
        importlib.import_module(name)
    assert importlib.import_module(f"graphopt.{name}").__name__ == f"graphopt.{name}"


def test_constraints_pin_what_is_asked_for() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pinned = {re.split(r"[=<>]", line)[0] for line in lines}
    extras = PROJECT["project"]["optional-dependencies"]
    asked = [*PROJECT["project"]["dependencies"], *(need for needs in extras.values() for need in needs)]
    names = {re.split(r"[\[=<>;]", need)[0] for need in asked} - {"graphopt"}
    assert names == pinned


def test_backend_is_found_by_name_from_anywhere(tmp_path: Path) -> None:
    try:
        importlib.metadata.distribution("graphopt")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("graphopt is not installed")
    program = (
        "import sys, torch; assert 'graphopt' in torch.compiler.list_backends(); assert 'graphopt' not in sys.modules;"
        "f = torch.compile(lambda x: x + 1, backend='graphopt', options={'target': 'reference'});"
        "print(f(torch.zeros(2)))"
    )
    assert "tensor([1., 1.])" in run(sys.executable, "-c", program, cwd=tmp_path)


def test_wheel_and_sdist_hold_the_whole_package(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    listed = run("git", "ls-files", "-co", "--exclude-standard", cwd=ROOT).split()
    for name in listed:
        if not (ROOT / name).is_dir() and (ROOT / name).exists():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tree / name)
    # Without links, as some archives and file systems leave a checkout: the mapping alone must do.
    build = "from setuptools import build_meta as b; print(b.build_{}('{}'))"
    sdist = run(sys.executable, "-c", build.format("sdist", tmp_path), cwd=tree).split()[-1]
    shutil.unpack_archive(tmp_path / sdist, tmp_path / "unpacked")
    unpacked = tmp_path / "unpacked" / sdist.removesuffix(".tar.gz")
    for name in (
        "constraints.txt",
        "docs/explanation/design.md",
        "examples",
        "tests/conftest.py",
        ".ci/run",
        "LICENSE",
    ):
        assert (unpacked / name).exists(), f"{name} is missing from the sdist"
    wheel = run(sys.executable, "-c", build.format("wheel", tmp_path), cwd=unpacked).split()[-1]
    with zipfile.ZipFile(tmp_path / wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
        archive.extractall(tmp_path / "installed")
    assert held == {path.as_posix() for path in installed_files()}
    program = (
        "import graphopt.passes, graphopt.backends, graphopt.cli, importlib.util, pathlib;"
        "assert importlib.util.find_spec('passes') is None; print(pathlib.Path(graphopt.passes.__file__))"
    )
    where = run(sys.executable, "-c", program, cwd=tmp_path, PYTHONPATH=str(tmp_path / "installed"))
    assert where.strip() == str(tmp_path / "installed" / "graphopt" / "passes" / "__init__.py")
