"""A compiled graph as an object that torch's AOT cache can store: Inductor's artifact and graphopt's own prologue."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from graphopt import _compat
from graphopt.runtime.cuda_graphs import Recording
from graphopt.runtime.prologue import Prologue

on_load: list[Callable[[Any], None]] = []
"""Called with an artifact's `record` when it comes out of the cache, in place of the work that made it."""


@dataclasses.dataclass
class Artifact(_compat.OutputCode):
    """A boxed callable. record: what the report says about the graph, stored with it. recording: how it is replayed."""

    compiled: Callable[[list[Any]], Any]
    prologue: Prologue | None = None
    record: Any = None
    recording: Recording | None = None

    def __post_init__(self) -> None:
        self._boxed_call = True
        self._call = self._make_call()

    @property
    def source(self) -> str:
        """The file that Inductor wrote for the graph; "" if it wrote none."""
        return str(getattr(self.compiled, "source_code", "") or "")

    def _make_call(self) -> Callable[[list[Any]], Any]:
        compiled, prologue = self.compiled, self.prologue
        if self.recording is not None:
            compiled = self.recording.around(compiled)
        if prologue is None:
            return compiled
        return prologue.around(compiled)

    def replay(self, recording: Recording) -> None:
        """Record the compiled graph at its first calls and replay it from then on."""
        self.recording = recording
        self._call = self._make_call()

    def __call__(self, inputs: Sequence[Any]) -> Any:
        return self._call(inputs)  # type: ignore[arg-type]

    def prepare_for_serialization(self) -> None:
        """Leave out what cannot be stored; refuses (the cache then stores nothing) when there is no stored form."""
        self.compiled = _compat.storable(self.compiled)
        del self._call

    def post_compile(self, example_inputs: Sequence[Any], constants: Any, graph_kwargs: Any) -> None:
        """Called when the artifact comes out of the cache."""
        self.compiled = _compat.reload(self.compiled, example_inputs, graph_kwargs)
        self._call = self._make_call()
        for listener in on_load:
            listener(self.record)

    def set_triton_bundle(self, triton_bundle: Any) -> None:
        """Part of torch's protocol: Triton kernels are bundled by the inner artifact."""
        if isinstance(self.compiled, _compat.OutputCode):
            self.compiled.set_triton_bundle(triton_bundle)
