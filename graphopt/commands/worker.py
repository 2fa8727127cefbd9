"""One system in a process of its own, told what to do through a pipe.

Own processes keep the systems apart: compile caches, settings that torch reads at import, Dynamo's memory of
shapes, and peak memory. The parent lets them take turns, so that they are still measured side by side.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

from graphopt.commands.systems import System
from graphopt.errors import GraphoptError

_QUIET = {
    "HF_HUB_OFFLINE": "1",
    "TQDM_DISABLE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
}


class WorkerError(GraphoptError):
    """A system failed or died in its process; the message holds the last lines that it wrote."""


class Worker:
    """The parent's side: `call` runs a method of `graphopt.commands.serve.Server` in the worker's process."""

    def __init__(self, system: System, caches: Path | None = None) -> None:
        """caches: a folder for all compile caches, None for the user's own."""
        self.system = system
        self._log = tempfile.NamedTemporaryFile(prefix="graphopt-worker-", suffix=".log")
        environment = {**os.environ, **_QUIET, **system.environment}
        if caches is not None:
            folders = {
                "TORCHINDUCTOR_CACHE_DIR": "inductor",
                "TRITON_CACHE_DIR": "triton",
                "GRAPHOPT_CACHE_DIR": "graphopt",
            }
            environment.update({name: str(caches / folder) for name, folder in folders.items()})
        self._pipe, theirs = Pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "graphopt.commands.serve", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )
        theirs.close()

    def call(self, name: str, *arguments: object, heard: Callable[[str], None] | None = None) -> Any:
        """Run `name(*arguments)` over there and return its result. `heard` gets the text said meanwhile."""
        try:
            self._pipe.send((name, arguments))
            while True:
                kind, value = self._pipe.recv()
                if kind == "done":
                    return value
                if kind == "failed":
                    raise WorkerError(f"{self.system.name} failed in {name}:\n{value}")
                if heard is not None:
                    heard(value)
        except (EOFError, BrokenPipeError, ConnectionResetError):
            code = self._process.wait()
            lines = Path(self._log.name).read_text(errors="replace").splitlines()[-20:]
            raise WorkerError(f"{self.system.name} died in {name} (exit code {code}):\n" + "\n".join(lines)) from None

    def close(self) -> None:
        """End the process."""
        self._pipe.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=10)
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._log.close()


@contextlib.contextmanager
def workers(systems: list[System], cold: bool) -> Iterator[list[Worker]]:
    """A worker for each system, ended with the block. cold: each gets empty compile caches of its own."""
    with contextlib.ExitStack() as stack:
        started = []
        for system in systems:
            caches = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="graphopt-"))) if cold else None
            worker = Worker(system, caches)
            stack.callback(worker.close)
            started.append(worker)
        yield started
