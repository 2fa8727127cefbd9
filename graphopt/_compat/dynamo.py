"""What Dynamo knows of the inputs it traced, what it says while it traces, and how it is steered."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator

import torch
from torch import fx
from torch._dynamo.exc import BackendCompilerFailed, TorchDynamoException
from torch._functorch._aot_autograd import runtime_wrappers
from torch._guards import TracingContext

_TOLD_BY = {
    "graph_breaks": ("torch._dynamo.symbolic_convert.__graph_breaks", "torch._dynamo.convert_frame.__graph_breaks"),
    "recompiles": ("torch._dynamo.guards.__recompiles",),
}


def dynamo_source(node: fx.Node) -> str | None:
    """The name of the Python value that a placeholder of a Dynamo graph stands for, e.g. "L['x']"."""
    source = getattr(node, "_dynamo_source", None)
    if source is None:
        return None
    name = source.name
    return str(name() if callable(name) else name)


def aot_input_index(node: fx.Node) -> int | None:
    """Which input of the Dynamo graph a placeholder of an AOTAutograd graph is, if it is one."""
    index = getattr(node.meta.get("desc"), "idx", None)
    return index if isinstance(index, int) and type(node.meta["desc"]).__name__ == "PlainAOTInput" else None


def forgetter() -> Callable[[], None]:
    """A function that lets Dynamo forget what it compiled for the code it is compiling now; its next call is compiled.

    Outside of a compilation by Dynamo the function does nothing.
    """
    from torch._C._dynamo.eval_frame import reset_code
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        code = InstructionTranslator.current_tx().f_code
    except AttributeError:
        return lambda: None
    return lambda: reset_code(code)


def static_input_indices() -> list[int]:
    """Indices of the inputs that are parameters, buffers or attributes of modules, in the graph being compiled."""
    context = TracingContext.try_get()
    metadata = context.fw_metadata if context is not None else None
    return list(metadata.static_input_indices or []) if metadata is not None else []


def is_control_flow(error: BaseException) -> bool:
    """Whether Dynamo itself raised `error` to steer its tracing (restarts, graph breaks): never to be swallowed.

    That Inductor cannot compile a graph is no such thing, although its error is one of Dynamo's by class.
    """
    dynamos = isinstance(error, TorchDynamoException) and not isinstance(error, BackendCompilerFailed)
    return dynamos or type(error).__name__.endswith("RestartAnalysis")


def suggest_dynamic(tensor: torch.Tensor, dim: int) -> None:
    """Let Dynamo treat the size of `dim` as a symbol from the first time it sees `tensor` (it may decline).

    torch 2.13 has a mark of its own for what compilers make, which costs no guard; older ones have the users' alone.
    """
    mark = getattr(runtime_wrappers, "mark_dynamo_propagated_dynamic_indices", None)
    if mark is not None:
        mark(tensor, {dim})
    else:
        torch._dynamo.maybe_mark_dynamic(tensor, dim)


def prepare_dynamo() -> None:
    """Make Dynamo keep float attributes (eps, scale) as constants of the graph, also under `dynamic=True`."""
    import torch._dynamo.config as dynamo_config

    dynamo_config.specialize_float = True


@dataclasses.dataclass
class DynamoEvents:
    """Why Dynamo broke or recompiled graphs, one line each."""

    graph_breaks: list[str] = dataclasses.field(default_factory=list)
    recompiles: list[str] = dataclasses.field(default_factory=list)


@contextlib.contextmanager
def watching_dynamo() -> Iterator[DynamoEvents]:
    """Record the graph breaks and recompilations that happen inside the block, as `TORCH_LOGS` would print them."""
    from torch._logging._internal import log_state

    events = DynamoEvents()
    with contextlib.ExitStack() as stack:
        for kind, names in _TOLD_BY.items():
            listener = _Listener(getattr(events, kind))
            if not log_state.is_artifact_enabled(kind):
                log_state.enable_artifact(kind)
                stack.callback(log_state.artifact_names.discard, kind)
            for logger in map(logging.getLogger, names):
                stack.callback(logger.setLevel, logger.level)
                stack.callback(setattr, logger, "propagate", logger.propagate)
                stack.callback(logger.removeHandler, listener)
                logger.addHandler(listener)
                logger.setLevel(logging.DEBUG)
                logger.propagate = False
        yield events


class _Listener(logging.Handler):
    """Keeps of each message of Dynamo one line: for a graph break its reasons and its place, else the whole message."""

    def __init__(self, kept: list[str]) -> None:
        super().__init__()
        self._kept = kept

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage().strip()
        place, _, rest = text.removeprefix("Graph break in user code at ").partition("\nGraph Break Reason: ")
        if rest:
            rows = rest.partition("User code traceback:")[0].partition("Stack variable")[0].splitlines()
            reasons = [row for row in rows if row and not row.startswith((" ", "*")) and not row.endswith(":")]
            text = f"{'; '.join(reasons) or rows[0]} ({place})"
        message = " ".join(text.split())
        if message not in self._kept:
            self._kept.append(message)
