"""A graph becomes a callable that runs generated Triton kernels."""

from __future__ import annotations

import hashlib
import linecache
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import GraphModule

from graphopt.backends.triton import interpret as interpreter
from graphopt.backends.triton.check import resources
from graphopt.backends.triton.program import Fallback, write
from graphopt.backends.triton.source import Kernel
from graphopt.runtime.autotune import Config, Tuner
from graphopt.runtime.launch import Launch, Launcher, jit


class KernelFailed(Exception):
    """A kernel could not be compiled or launched; name is its name in the generated file."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name}: {reason}")
        self.name, self.reason = name, reason


class CompiledGraph:
    """A compiled graph: call it with the graph's inputs.

    source: the generated file, runnable alone. kernels: the kernels in it, by name; calls: by kernel the nodes that
    launch it. fallbacks: what runs as ATen calls, with reasons.

    A kernel that fails at its first launch (it does not compile, or asks for more than the GPU has) is left out from
    then on: its region runs as ATen calls and is listed in `fallbacks`, and `refused` is called with its name and the
    reason. With `strict` the failure is raised.

    tuner: times the configurations of each kernel with the arguments of the first call; later calls use the best.
    """

    def __init__(
        self, graph_module: GraphModule, interpret: bool, strict: bool = False, tuner: Tuner | None = None
    ) -> None:
        self._graph_module, self._interpret, self._strict, self._tuner = graph_module, interpret, strict, tuner
        self._refused: dict[str, str] = {}
        self.refused: Callable[[str, str], None] = lambda what, why: None
        self._chosen: dict[str, Config] = {}
        self._build()

    def _build(self) -> None:
        with torch.no_grad():
            program = write(self._graph_module, self._refused, self._chosen)
        self.source: str = program.source
        self.kernels: dict[str, Kernel] = program.kernels
        self.fallbacks: list[Fallback] = program.fallbacks
        self.calls: dict[str, list[str]] = program.calls
        self._may_repeat = program.updates_last
        self.namespace = load(program.source)
        self.namespace.update(program.constants)
        if self._interpret:
            self.namespace["launch"] = self._guarded(interpreter.launch)
        else:
            self.namespace["launch"] = Launcher(self._guarded(jit))
        if self._tuner is not None:
            self.namespace["launch"] = self._tuning(self._tuner, self.namespace["launch"])

    def _tuning(self, tuner: Tuner, run: Launch) -> Launch:
        """Launch each kernel as it is, and find out its best configuration."""

        def launch(kernel: Any, grid: int, *arguments: Any, **constants: Any) -> None:
            run(kernel, grid, *arguments, **constants)
            own = self.kernels[kernel.fn.__name__]
            if grid > 0 and own.digest not in self._chosen and len(own.configs) > 1:
                sizes = arguments[len(own.parameters) :]

                def time(config: Config) -> None:
                    settings = dict(config.constants, num_warps=config.num_warps, num_stages=config.num_stages)
                    run(kernel, own.configured(config).programs(sizes), *arguments, **{**constants, **settings})

                fitting = [config for config in own.configs if _fits(own.configured(config), tuner.architecture)]
                self._chosen[own.digest] = tuner.best(
                    own.digest, [_shape_of(a) for a in arguments], fitting or own.configs[:1], time)

        return launch

    @property
    def launches(self) -> int:
        """How many kernels one call launches."""
        return sum(map(len, self.calls.values()))

    def _guarded(self, run: Launch) -> Launch:
        """Name the kernel in the error of its first launch; later launches go straight through."""
        proven: set[Callable[..., Any]] = set()

        def launch(kernel: Any, grid: int, *arguments: Any, **constants: Any) -> Any:
            if kernel.fn in proven:
                return run(kernel, grid, *arguments, **constants)
            try:
                compiled = run(kernel, grid, *arguments, **constants)
            except Exception as error:
                raise KernelFailed(kernel.fn.__name__, f"{type(error).__name__}: {error}"[:300]) from error
            proven.add(kernel.fn)
            return compiled

        return launch

    def __call__(self, *inputs: Any) -> Sequence[Any]:
        """Run the graph on its inputs; returns its outputs."""
        while True:
            try:
                outputs: Sequence[Any] = self.namespace["call"](list(inputs))
                if self._tuner is not None:
                    self._tuner = None
                    self._build()
                return outputs
            except KernelFailed as failure:
                digest = self.kernels[failure.name].digest
                if self._strict or not self._may_repeat or digest in self._refused:
                    raise
                self._refused[digest] = f"the kernel failed: {failure.reason}"
                self.refused(failure.name, self._refused[digest])
                self._build()


def load(source: str) -> dict[str, Any]:
    """Execute a generated file and return its names. The text is kept where `inspect`, and so Triton, finds it."""
    filename = f"<graphopt kernels {hashlib.sha256(source.encode()).hexdigest()[:16]}>"
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    namespace: dict[str, Any] = {"__name__": filename}
    exec(compile(source, filename, "exec"), namespace)
    return namespace


def _shape_of(argument: Any) -> Any:
    """What of an argument the best configuration depends on; plain data."""
    if isinstance(argument, torch.Tensor):
        return [str(argument.dtype), list(argument.shape), list(argument.stride())]
    return argument


def _fits(kernel: Kernel, architecture: str | None) -> bool:
    """Does the kernel compile with no spills and no more memory than there is? For an unknown GPU the launch tells."""
    if architecture is None:
        return True
    try:
        return resources(kernel, architecture).fits
    except Exception:  # a configuration that does not compile is none
        return False


def compile_graph(
    graph_module: GraphModule, interpret: bool, strict: bool = False, tuner: Tuner | None = None
) -> CompiledGraph:
    """Generate, load and wrap the program of a graph whose fused regions are `call_module` nodes.

    graph_module: placeholders carry fake values in `meta["val"]`; it is not changed. interpret: run the kernels under
    Triton's interpreter on CPU tensors (slow; for checking); otherwise they need a GPU. strict: raise when a kernel
    fails, instead of running its region as ATen calls. tuner: finds the best configuration of each kernel.
    Raises Unsupported when a node cannot be written at all; what merely has no kernel runs as ATen calls and is listed
    in `fallbacks`.
    """
    return CompiledGraph(graph_module, interpret, strict, tuner)
