"""Build the C++ kernels of `src/` with the machine's compiler, and load them.

Each instruction set is a library of its own compiled from `kernels.cpp`, a table of plain functions; the library that
torch loads (`library.cpp`) holds the operators that call them. So a machine compiles only the table it runs.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils import cpp_extension

from graphopt.backends.cpp.direct import call_directly
from graphopt.backends.cpp.isa import InstructionSet, runnable

SOURCES = Path(__file__).parent / "src"
# No -ffast-math: NaN and infinity must come out as they do in eager. Not trapping and not setting errno lets
# comparisons and square roots be vectorised and changes no value.
FLAGS = ("-std=c++20", "-O3", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden", "-w")
BUILD_SECONDS = 600.0


class BuildError(RuntimeError):
    """The kernels could not be built or loaded; the message says why and carries the compiler's words."""


@functools.cache
def compiler() -> str | None:
    """Path of the C++ compiler, or None: `CXX` if set, else g++, else c++.

    g++ before others because its OpenMP code calls the runtime that torch's wheels carry (libgomp); clang's calls
    another, and without it the library is refused at load.
    """
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "c++"]
    return next(filter(None, map(shutil.which, names)), None)


def unavailable_reason() -> str | None:
    """Why the kernels cannot be built here, without trying; None if nothing speaks against it."""
    if sys.platform != "linux":
        return f"the C++ kernels are built on Linux only, not on {sys.platform}"
    if compiler() is None:
        return "no C++ compiler found (install g++ or set CXX)"
    return None


@dataclass(frozen=True)
class Unit:
    """One shared library, of one object file: the words of the command that compiles it, and what it is linked with."""

    name: str
    command: tuple[str, ...]
    libraries: tuple[str, ...]


@functools.cache
def load(directory: Path) -> str | None:
    """Load the operators and the best table, building first what is not in `directory`; later calls return at once.

    `directory` is private to the user (`graphopt.runtime.cache.cache_dir`). Returns None once the operators
    `torch.ops.graphopt_cpp.*` work, otherwise the reason why not, which then holds for the process's life. Operators
    that came from another directory serve as well: torch aborts a process that registers them twice.
    """
    if _is_loaded():
        return None
    reason = unavailable_reason()
    if reason is not None:
        return reason
    try:
        _built(directory, [_operators(), _table(runnable()[0])], needed=1)  # side by side; a table may be refused
        _load(directory, _operators(), _register)
        _load_best_table(directory)
    except (BuildError, OSError, RuntimeError) as error:
        return f"the C++ kernels could not be built: {error}"
    return None


def _is_loaded() -> bool:
    return hasattr(torch.ops.graphopt_cpp, "isa") and torch.ops.graphopt_cpp.isa() != ""


def _register(library: str) -> None:
    if not hasattr(torch.ops.graphopt_cpp, "isa"):  # loaded before, with no table that could be built
        torch.ops.load_library(library)
        call_directly(library)


def load_table(directory: Path, isa: InstructionSet) -> None:
    """Add the table of `isa`, which this machine must run, to those loaded: for tests and measurements."""
    _load(directory, _table(isa), torch.ops.graphopt_cpp.add_table)


def _load_best_table(directory: Path) -> None:
    """The best table that the compiler knows and the operating system allows; raises the last one's BuildError."""
    for isa in runnable():
        if "amx_tile" in isa.needs and not torch.ops.graphopt_cpp.may_use_tiles():
            continue
        try:
            return load_table(directory, isa)
        except BuildError:  # a compiler too old for this instruction set knows the next
            if isa is runnable()[-1]:
                raise


def _load(directory: Path, unit: Unit, load_library: Callable[[str], None]) -> None:
    (library,) = _built(directory, [unit])
    try:
        load_library(str(library))
    except (OSError, RuntimeError):  # cut short by a full disk or a crash: build it anew, once
        library.unlink()
        load_library(str(*_built(directory, [unit])))


def _operators() -> Unit:
    words = [f"-I{path}" for path in (*cpp_extension.include_paths(), sysconfig.get_paths()["include"])]
    words += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}", "-fopenmp"]
    # OpenMP's symbols come from the runtime torch has loaded: one linked here could bring a second thread pool.
    libraries = [f"-L{path}" for path in cpp_extension.library_paths()] + ["-lc10", "-ltorch_cpu", "-ltorch_python"]
    return _unit("operators", "library.cpp", words, libraries)


def _table(isa: InstructionSet) -> Unit:
    return _unit(isa.name, "kernels.cpp", [*isa.flags, f"-DGRAPHOPT_ISA={isa.name}"], ["-lm"])


def _unit(name: str, source: str, words: Sequence[str], libraries: Sequence[str]) -> Unit:
    return Unit(name, (str(compiler()), *FLAGS, *words, "-c", str(SOURCES / source)), tuple(libraries))


def _built(directory: Path, units: Sequence[Unit], needed: int | None = None) -> list[Path]:
    """The libraries of `units` in `directory`; raises BuildError if one of the first `needed` (default: any) fails."""
    libraries = [directory / f"{unit.name}-{_key(unit)}.so" for unit in units]
    with _locked(directory / "kernels.lock"):
        missing = {unit: path for unit, path in zip(units, libraries, strict=True) if not _is_private_file(path)}
        failed = _compile(missing, directory) if missing else {}
    for unit in units[:needed]:
        if unit in failed:
            raise BuildError(f"compiling {unit.name} failed: {failed[unit]}")
    return libraries


def _compile(libraries: dict[Unit, Path], directory: Path) -> dict[Unit, str]:
    """Compile in a directory of its own, then rename into place; returns the message of each unit that failed."""
    with tempfile.TemporaryDirectory(prefix="build-", dir=directory) as work:
        objects = {unit: f"{work}/{unit.name}.o" for unit in libraries}
        results = {unit: Path(work) / path.name for unit, path in libraries.items()}
        failed = _failures({unit: [*unit.command, "-o", objects[unit]] for unit in libraries})
        for unit in libraries.keys() - failed.keys():
            # -z now: a symbol that is missing is an error at load, not a crash at the first call.
            link = [str(compiler()), "-shared", objects[unit], *unit.libraries, "-Wl,-z,now", "-o"]
            _run([*link, str(results[unit])])
            results[unit].chmod(0o600)
            results[unit].rename(libraries[unit])
    return failed


def _is_private_file(path: Path) -> bool:
    try:
        found = path.lstat()
    except FileNotFoundError:
        return False
    if not stat.S_ISREG(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise BuildError(f"{path} is not a file that only this user can write; remove it")
    return True


@functools.cache
def _key(unit: Unit) -> str:
    """Digest of all that decides the library's content."""
    digest = hashlib.sha256()
    for path in sorted(SOURCES.iterdir()):
        digest.update(f"{path.name}\0".encode() + path.read_bytes() + b"\0")
    parts = (_compiler_version(), torch.__version__, platform.machine(), *unit.command, *unit.libraries)
    digest.update("\0".join(parts).encode())
    return digest.hexdigest()[:32]


@functools.cache
def _compiler_version() -> str:
    return _run([str(compiler()), "-v"])


def _run(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_SECONDS, check=True)
    except subprocess.CalledProcessError as error:
        raise BuildError(f"{command[0]} failed: {_first_lines(error.stderr)}") from error
    except subprocess.TimeoutExpired as error:
        raise BuildError(f"{command[0]} took more than {BUILD_SECONDS:.0f} s") from error
    return done.stdout + done.stderr


def _failures(commands: dict[Unit, list[str]]) -> dict[Unit, str]:
    """Run the commands, as many at a time as there are cores; returns the message of each that failed."""
    failed = {}
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        running = {unit: pool.submit(_run, command) for unit, command in commands.items()}
        for unit, future in running.items():
            if isinstance(error := future.exception(), BuildError):
                failed[unit] = str(error)
            else:
                future.result()
    return failed


def _first_lines(text: str) -> str:
    return "\n".join(text.strip().splitlines()[:8])


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the file lock: of several processes one builds and the others wait for its result."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        os.fchmod(descriptor, 0o600)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
