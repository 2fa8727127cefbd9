"""Building the compiled kernels: reasons, privacy of the files, the cache, instruction sets, an interrupted build."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from graphopt.backends import cpp
from graphopt.backends.cpp import build, isa


@pytest.fixture(autouse=True)
def _no_remembered_answers() -> Iterator[None]:
    def forget() -> None:
        for remembered in (build.compiler, build.load, build._key, build._compiler_version, isa.runnable):
            remembered.cache_clear()

    forget()
    yield
    forget()


@pytest.fixture(autouse=True)
def _nothing_loaded(_no_remembered_answers: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that has loaded nothing; the test that is about loaded operators puts it back."""
    monkeypatch.setattr(build, "_is_loaded", lambda: False)


@pytest.fixture
def tiny_build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Sources of a table that does nothing, for what does not depend on the kernels; the directory to build it in."""
    source = tmp_path / "src"
    source.mkdir()
    (source / "kernels.cpp").write_text("int GRAPHOPT_ISA() { return 2; }\n")
    (source / "library.cpp").write_text("int graphopt_test() { return 1; }\n")
    monkeypatch.setattr(build, "SOURCES", source)
    directory = tmp_path / "cache"
    directory.mkdir(mode=0o700)
    return directory


def build_plain(directory: Path) -> Path:
    return build._built(directory, [build._table(isa.PLAIN)])[0]


def needs_compiler() -> None:
    if reason := build.unavailable_reason():
        pytest.skip(reason)


def test_no_compiler_is_a_reason_not_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert build.unavailable_reason() == "no C++ compiler found (install g++ or set CXX)"
    assert build.load(tmp_path) == build.unavailable_reason()


def test_other_systems_are_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build.sys, "platform", "darwin")
    assert build.unavailable_reason() == "the C++ kernels are built on Linux only, not on darwin"


_is_loaded = build._is_loaded


@pytest.mark.usefixtures("cpp_library")
def test_another_cache_directory_later_does_not_load_them_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Registering the operators twice would abort the process."""
    monkeypatch.setattr(build, "_is_loaded", _is_loaded)
    assert build.load(tmp_path) is None
    assert list(tmp_path.iterdir()) == []


def test_without_kernels_there_are_no_lowerings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpp.build, "load", lambda directory: "because")
    assert cpp.unavailable_reason() == "because"
    assert cpp.lowerings() == ()


@pytest.mark.usefixtures("cpp_library")
def test_with_kernels_each_dialect_operation_has_one() -> None:
    assert {lowering.name for lowering in cpp.lowerings()} == {
        "cpp.linear",
        "cpp.parallel_linear",
        "cpp.quantized_linear",
        "cpp.parallel_quantized_linear",
        "cpp.quantized_grouped_linear",
        "cpp.quantized_embedding",
        "cpp.attention",
        "cpp.attention_quantized",
        "cpp.attention_paged",
    }


def test_nothing_is_left_open_to_others_whatever_the_umask(tiny_build: Path) -> None:
    needs_compiler()
    before = os.umask(0)
    try:
        library = build_plain(tiny_build)
    finally:
        os.umask(before)
    left = list(tiny_build.iterdir())
    assert sorted(path.suffix for path in left) == [".lock", ".so"], "the build's own directory is gone"
    assert all(stat.S_IMODE(path.lstat().st_mode) & 0o077 == 0 for path in left)
    built = library.stat().st_mtime_ns
    assert build_plain(tiny_build) == library and library.stat().st_mtime_ns == built, "built once"


def test_a_library_that_others_can_write_is_refused(tiny_build: Path) -> None:
    needs_compiler()
    build_plain(tiny_build).chmod(0o666)
    with pytest.raises(build.BuildError, match="is not a file that only this user can write; remove it"):
        build_plain(tiny_build)


def test_a_link_in_place_of_the_library_is_refused(tiny_build: Path, tmp_path: Path) -> None:
    needs_compiler()
    library = build_plain(tiny_build)
    library.rename(tmp_path / "elsewhere.so")
    library.symlink_to(tmp_path / "elsewhere.so")
    with pytest.raises(build.BuildError, match="remove it"):
        build_plain(tiny_build)


def test_a_truncated_library_is_built_again(tiny_build: Path) -> None:
    needs_compiler()
    library = build_plain(tiny_build)
    whole = library.read_bytes()
    library.write_bytes(whole[:100])
    build._load(tiny_build, build._table(isa.PLAIN), torch.ops.load_library)
    assert len(library.read_bytes()) == len(whole)


def test_a_source_that_does_not_compile_is_a_reason_with_the_compilers_words(tiny_build: Path) -> None:
    needs_compiler()
    (build.SOURCES / "library.cpp").write_text("int broken( {\n")
    reason = build.load(tiny_build)
    assert reason is not None and reason.startswith("the C++ kernels could not be built: compiling operators failed:")
    assert "error" in reason


@pytest.mark.usefixtures("cpp_library")  # the sources here register no operators
def test_an_instruction_set_the_compiler_does_not_know_gives_way_to_the_next(
    tiny_build: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs_compiler()
    unknown = isa.InstructionSet("avx9", ("-mno-such-set",), frozenset())
    loaded: list[str] = []
    monkeypatch.setattr(build, "runnable", lambda: (unknown, isa.PLAIN))
    monkeypatch.setattr(
        build, "_load", lambda directory, unit, how: loaded.append(build._built(directory, [unit])[0].name)
    )
    assert build.load(tiny_build) is None
    assert [name.split("-")[0] for name in loaded] == ["operators", "plain"]


@pytest.mark.usefixtures("cpp_library")  # the sources here register no operators
def test_without_any_table_there_is_a_reason(tiny_build: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs_compiler()
    unknown = isa.InstructionSet("avx9", ("-mno-such-set",), frozenset())
    monkeypatch.setattr(build, "runnable", lambda: (unknown,))
    reason = build.load(tiny_build)
    assert reason is not None and "compiling avx9 failed" in reason


def test_every_change_of_the_sources_is_another_library(tiny_build: Path) -> None:
    needs_compiler()
    first = build_plain(tiny_build)
    (build.SOURCES / "kernels.cpp").write_text("int graphopt_test() { return 3; }\n")
    build._key.cache_clear()
    assert build_plain(tiny_build) != first


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        ("fpu sse2", ["plain"]),
        ("fma f16c avx2", ["avx2", "plain"]),
        ("fma f16c avx2 avx512f avx512bw avx512dq", ["avx2", "plain"]),
        ("fma f16c avx2 avx512f avx512bw avx512dq avx512vl avx512_bf16", ["avx512", "avx2", "plain"]),
    ],
)
def test_a_machine_runs_what_all_its_processors_list(
    flags: str, names: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "cpuinfo").write_text(f"flags\t: {flags} amx_tile\nmodel name: a\nflags\t: {flags} avx512_vnni\n")
    monkeypatch.setattr(isa, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(isa.platform, "machine", lambda: "x86_64")
    isa.runnable.cache_clear()
    assert [each.name for each in isa.runnable()] == names


def test_what_is_not_known_of_a_machine_is_not_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(isa, "CPUINFO", tmp_path / "absent")
    isa.runnable.cache_clear()
    assert isa.runnable() == (isa.PLAIN,)
