"""Build the C++ kernels of `src/` into one shared library with the machine's compiler, and load it.

Each instruction set is one object file compiled from the same `kernels.cpp`; which of them runs is decided when
the library is loaded (`machine.cpp`), so the library depends on the compiler and on torch, not on the processor.
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
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.utils import cpp_extension

SOURCES = Path(__file__).parent / "src"
# No -ffast-math: NaN and infinity must come out as they do in eager. Not trapping and not setting errno lets
# comparisons and square roots be vectorised and changes no value.
FLAGS = ("-std=c++20", "-O3", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden", "-w")
_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")
ISA_FLAGS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "avx2": _AVX2,
    "avx512": _AVX512,
    "avx512vnni": (*_AVX512, "-mavx512vnni"),
    "avx512bf16": (*_AVX512, "-mavx512vnni", "-mavx512bf16"),
    "amx": (*_AVX512, "-mavx512vnni", "-mavx512bf16", "-mamx-tile", "-mamx-bf16"),
}
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


@functools.cache
def load(directory: Path) -> str | None:
    """Load the library from `directory`, building it first if it is not there; later calls return at once.

    `directory` is private to the user (`graphopt.runtime.cache.cache_dir`). Returns None once the operators
    `torch.ops.graphopt_cpp.*` exist, otherwise the reason why not, which then holds for the process's life.
    """
    reason = unavailable_reason()
    if reason is not None:
        return reason
    try:
        library = _library(directory)
        try:
            torch.ops.load_library(str(library))
        except OSError:  # cut short by a full disk or a crash: build it anew, once
            library.unlink()
            torch.ops.load_library(str(_library(directory)))
    except (BuildError, OSError) as error:
        return f"the C++ kernels could not be built: {error}"
    return None


def _library(directory: Path) -> Path:
    library = directory / f"kernels-{_key()}.so"
    with _locked(directory / "kernels.lock"):
        if not _is_private_file(library):
            _build(library)
    return library


def _is_private_file(path: Path) -> bool:
    try:
        found = path.lstat()
    except FileNotFoundError:
        return False
    if not stat.S_ISREG(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise BuildError(f"{path} is not a file that only this user can write; remove it")
    return True


@functools.cache
def _key() -> str:
    """Digest of all that decides the library's content."""
    digest = hashlib.sha256()
    for path in sorted(SOURCES.iterdir()):
        digest.update(f"{path.name}\0".encode() + path.read_bytes() + b"\0")
    version = _run([str(compiler()), "-v"])
    parts = (version, torch.__version__, platform.machine(), repr(_commands(Path("."))))
    digest.update("\0".join(parts).encode())
    return digest.hexdigest()[:32]


def _commands(work: Path) -> dict[str, list[str]]:
    """Object file name -> compiler command; objects land in `work`."""
    common = [str(compiler()), *FLAGS]
    torch_flags = [f"-I{path}" for path in cpp_extension.include_paths()]
    torch_flags += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}", "-fopenmp"]
    on_x86 = platform.machine() in ("x86_64", "AMD64")
    commands = {}
    for path in sorted(SOURCES.glob("*.cpp")):
        if path.stem == "kernels":
            continue
        extra = torch_flags if path.stem != "machine" else []
        commands[path.stem] = [*common, *extra, "-c", str(path), "-o", str(work / f"{path.stem}.o")]
    for isa, flags in ISA_FLAGS.items():
        if on_x86 or isa == "plain":
            source = ["-c", str(SOURCES / "kernels.cpp"), "-o", str(work / f"{isa}.o")]
            commands[isa] = [*common, *flags, f"-DGRAPHOPT_ISA={isa}", *source]
    return commands


def _build(library: Path) -> None:
    """Compile in a directory of its own beside `library`, then rename into place."""
    with tempfile.TemporaryDirectory(prefix="build-", dir=library.parent) as name:
        work = Path(name)
        commands = _commands(work)
        failed = _run_all(commands)
        # A compiler too old for an instruction set leaves an empty table; any other failure is final.
        optional = [target for target in failed if target in ISA_FLAGS and target != "plain"]
        absent = {isa: [*_without(commands[isa], ISA_FLAGS[isa]), "-DGRAPHOPT_ABSENT"] for isa in optional}
        for target, message in {**failed, **_run_all(absent)}.items():
            if target not in absent or not (work / f"{target}.o").exists():
                raise BuildError(f"compiling {target} failed: {message}")
        # OpenMP's symbols come from the runtime torch has loaded: one linked here could bring a second thread pool.
        # -z now: a symbol that is missing is an error at load, not a crash at the first call.
        result = work / "kernels.so"
        objects = [str(work / f"{target}.o") for target in commands]
        libraries = [f"-L{path}" for path in cpp_extension.library_paths()] + ["-lc10", "-ltorch_cpu"]
        _run([str(compiler()), "-shared", *objects, *libraries, "-Wl,-z,now", "-o", str(result)])
        result.chmod(0o600)
        result.rename(library)


def _without(command: Sequence[str], flags: Sequence[str]) -> list[str]:
    return [word for word in command if word not in flags]


def _run(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_SECONDS, check=True)
    except subprocess.CalledProcessError as error:
        raise BuildError(f"{command[0]} failed: {_first_lines(error.stderr)}") from error
    except subprocess.TimeoutExpired as error:
        raise BuildError(f"{command[0]} took more than {BUILD_SECONDS:.0f} s") from error
    return done.stdout + done.stderr


def _run_all(commands: dict[str, list[str]]) -> dict[str, str]:
    """Run the commands, as many at a time as there are cores; returns the message of each that failed."""
    failed: dict[str, str] = {}
    waiting = list(commands.items())
    running: list[tuple[str, subprocess.Popen[str]]] = []
    try:
        while waiting or running:
            while waiting and len(running) < len(os.sched_getaffinity(0)):
                target, command = waiting.pop(0)
                process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
                running.append((target, process))
            target, process = running.pop(0)
            try:
                message = process.communicate(timeout=BUILD_SECONDS)[1]
            except subprocess.TimeoutExpired as error:
                running.append((target, process))
                raise BuildError(f"compiling {target} took more than {BUILD_SECONDS:.0f} s") from error
            if process.returncode:
                failed[target] = _first_lines(message)
    finally:
        for _, process in running:
            process.kill()
            process.wait()
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
