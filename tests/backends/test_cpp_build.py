"""Building the compiled kernels: reasons, privacy of the files, the cache, an interrupted build."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from graphopt.backends import cpp
from graphopt.backends.cpp import build


@pytest.fixture(autouse=True)
def _no_remembered_answers() -> None:
    build.compiler.cache_clear()


@pytest.fixture
def tiny_build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A build of one source that does nothing, for what does not depend on the kernels."""
    source = tmp_path / "src"
    source.mkdir()
    (source / "machine.cpp").write_text("int graphopt_test() { return 1; }\n")
    (source / "kernels.cpp").write_text("int GRAPHOPT_ISA() { return 2; }\n")
    monkeypatch.setattr(build, "SOURCES", source)
    build._key.cache_clear()
    directory = tmp_path / "cache"
    directory.mkdir(mode=0o700)
    yield directory
    build._key.cache_clear()


def needs_compiler() -> None:
    if reason := build.unavailable_reason():
        pytest.skip(reason)


def test_no_compiler_is_a_reason_not_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert build.unavailable_reason() == "no C++ compiler found (install g++ or set CXX)"
    assert build.load(tmp_path) == build.unavailable_reason()
    build.compiler.cache_clear()


def test_other_systems_are_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build.sys, "platform", "darwin")
    assert build.unavailable_reason() == "the C++ kernels are built on Linux only, not on darwin"


def test_without_kernels_there_are_no_lowerings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpp.build, "load", lambda directory: "because")
    assert cpp.unavailable_reason() == "because"
    assert cpp.lowerings() == ()


def test_with_kernels_each_dialect_operation_has_one() -> None:
    if reason := cpp.unavailable_reason():
        pytest.skip(reason)
    assert {lowering.name for lowering in cpp.lowerings()} == {
        "cpp.linear",
        "cpp.parallel_linear",
        "cpp.quantized_linear",
        "cpp.parallel_quantized_linear",
        "cpp.quantized_embedding",
        "cpp.attention",
        "cpp.attention_quantized",
    }


def test_nothing_is_left_open_to_others_whatever_the_umask(tiny_build: Path) -> None:
    needs_compiler()
    before = os.umask(0)
    try:
        library = build._library(tiny_build)
    finally:
        os.umask(before)
    left = list(tiny_build.iterdir())
    assert sorted(path.suffix for path in left) == [".lock", ".so"], "the build's own directory is gone"
    assert all(stat.S_IMODE(path.lstat().st_mode) & 0o077 == 0 for path in left)
    built = library.stat().st_mtime_ns
    assert build._library(tiny_build) == library and library.stat().st_mtime_ns == built, "built once"


def test_a_library_that_others_can_write_is_refused(tiny_build: Path) -> None:
    needs_compiler()
    library = build._library(tiny_build)
    library.chmod(0o666)
    with pytest.raises(build.BuildError, match="is not a file that only this user can write; remove it"):
        build._library(tiny_build)


def test_a_link_in_place_of_the_library_is_refused(tiny_build: Path, tmp_path: Path) -> None:
    needs_compiler()
    (tmp_path / "elsewhere.so").write_bytes(b"")
    (tiny_build / f"kernels-{build._key()}.so").symlink_to(tmp_path / "elsewhere.so")
    with pytest.raises(build.BuildError, match="remove it"):
        build._library(tiny_build)


def test_a_truncated_library_is_built_again(tiny_build: Path) -> None:
    needs_compiler()
    library = build._library(tiny_build)
    whole = library.read_bytes()
    library.write_bytes(whole[:100])
    assert build.load(tiny_build) is None
    assert len(library.read_bytes()) == len(whole)
    build.load.cache_clear()


def test_a_source_that_does_not_compile_is_a_reason_with_the_compilers_words(tiny_build: Path) -> None:
    needs_compiler()
    (build.SOURCES / "machine.cpp").write_text("int broken( {\n")
    reason = build.load(tiny_build)
    assert reason is not None and reason.startswith("the C++ kernels could not be built: compiling machine failed:")
    assert "error" in reason
    build.load.cache_clear()


def test_an_instruction_set_the_compiler_does_not_know_is_left_out(
    tiny_build: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs_compiler()
    monkeypatch.setattr(build, "ISA_FLAGS", {"plain": (), "avx2": ("-mno-such-set",)})
    source = build.SOURCES / "kernels.cpp"
    source.write_text("#ifdef GRAPHOPT_ABSENT\nint absent;\n#else\nint GRAPHOPT_ISA;\n#endif\n")
    assert b"absent" in build._library(tiny_build).read_bytes()


def test_the_plain_kernels_are_not_optional(tiny_build: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs_compiler()
    monkeypatch.setattr(build, "ISA_FLAGS", {"plain": ("-mno-such-set",)})
    with pytest.raises(build.BuildError, match="compiling plain failed"):
        build._library(tiny_build)


def test_every_change_of_the_sources_is_another_library(tiny_build: Path) -> None:
    needs_compiler()
    first = build._key()
    (build.SOURCES / "machine.cpp").write_text("int graphopt_test() { return 3; }\n")
    build._key.cache_clear()
    assert build._key() != first
