"""The only module that touches torch's private modules, so that a new torch is ported in one place."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import fx
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.exc import BackendCompilerFailed, TorchDynamoException
from torch._guards import TracingContext
from torch._inductor.output_code import OutputCode as OutputCode
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

Target = Callable[..., object]


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


def fake_mode_of(graph_module: fx.GraphModule) -> FakeTensorMode | None:
    """The fake tensor mode under which the graph's `meta["val"]` were made."""
    for node in graph_module.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, FakeTensor):
            return value.fake_mode
    return None


def fake_value(graph_module: fx.GraphModule, value: torch.Tensor) -> torch.Tensor:
    """The fake value that stands for a constant tensor in the graph."""
    mode = fake_mode_of(graph_module)
    return value if mode is None else mode.from_tensor(value, static_shapes=True)


@contextlib.contextmanager
def fake_execution(graph_module: fx.GraphModule) -> Iterator[None]:
    """Run torch operations on the graph's fake values, keeping symbolic sizes symbolic."""
    from torch._dispatch.python import enable_python_dispatcher

    mode = fake_mode_of(graph_module) or FakeTensorMode(allow_non_fake_inputs=True)
    with mode, enable_python_dispatcher(), torch.no_grad():
        yield


@contextlib.contextmanager
def real_execution() -> Iterator[None]:
    """Run torch operations on real tensors while a graph is being compiled (when fake values are in force)."""
    from torch.utils._python_dispatch import _disable_current_modes

    with _disable_current_modes(), torch.no_grad():
        yield


@contextlib.contextmanager
def new_fake_execution() -> Iterator[None]:
    """Run torch operations on fake tensors of their own, whatever compilation may be in progress around the block."""
    from torch._dispatch.python import enable_python_dispatcher

    with without_modes(), FakeTensorMode(), enable_python_dispatcher(), torch.no_grad():
        yield


@contextlib.contextmanager
def speculative_execution(graph_module: fx.GraphModule) -> Iterator[None]:
    """As `fake_execution`, for attempts that may fail: no guard on a symbolic size stays, no error is logged."""
    mode = fake_mode_of(graph_module)
    log = logging.getLogger("torch._subclasses.fake_tensor")
    disabled, log.disabled = log.disabled, True
    try:
        with contextlib.ExitStack() as stack:
            if mode is not None and mode.shape_env is not None:
                stack.enter_context(mode.shape_env.suppress_guards())
            stack.enter_context(fake_execution(graph_module))
            yield
    finally:
        log.disabled = disabled


def trace(function: Target, arguments: Sequence[object], decompositions: dict[Any, Any]) -> fx.GraphModule:
    """The ATen graph of `function(*arguments)` for fake arguments, decomposed by the table."""
    from torch.fx.experimental.proxy_tensor import make_fx

    return make_fx(function, decomposition_table=decompositions, _allow_non_fake_inputs=True)(*arguments)


def aot(
    graph_module: fx.GraphModule,
    inputs: Sequence[object],
    *,
    forward: Callable[..., Any],
    backward: Callable[..., Any],
    inference: Callable[..., Any],
    decompositions: dict[Any, Any],
) -> Callable[..., Any]:
    """AOTAutograd: functional ATen graphs go to the three compilers, in-place updates of inputs stay in the graph.

    A compiler may return Inductor's `OutputCode`, which torch's AOTAutograd cache can store, or any boxed callable.
    """
    from torch._functorch._aot_autograd.schemas import SerializableAOTDispatchCompiler
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    def dispatcher(compiler: Callable[..., Any]) -> Callable[..., Any]:
        return SerializableAOTDispatchCompiler(OutputCode, compiler)

    compiled: Callable[..., Any] = aot_autograd(
        fw_compiler=dispatcher(forward),
        bw_compiler=dispatcher(backward),
        inference_compiler=dispatcher(inference),
        decompositions=decompositions,
        partition_fn=min_cut_rematerialization_partition,
        keep_inference_input_mutations=True,
    )(graph_module, inputs)
    return compiled


def in_memory_format_of(like: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, laid out as eager's operators do that keep the memory format of an operand (channels last)."""
    from torch._prims_common import suggest_memory_format

    return tensor.contiguous(memory_format=suggest_memory_format(like))


def inductor_decompositions() -> dict[Any, Any]:
    """Inductor's table of decompositions, from operator to a function on tensors.

    Random operators stay whole: a decomposed one draws other numbers than eager under the same seed.
    """
    from torch._inductor import config as inductor_config
    from torch._inductor.decomposition import select_decomp_table

    with inductor_config.patch(fallback_random=True):
        return dict(select_decomp_table())


@functools.cache
def inductor_calls(*operators: Any) -> None:
    """Let Inductor call these operators as eager does, although it knows a decomposition or code of its own."""
    from torch._inductor.lowering import make_fallback

    for operator in operators:
        make_fallback(operator, override_decomp=True)


def force_stride_order() -> Any:
    """Inductor's operator (tensor, strides) -> the tensor, laid out in the order of these strides."""
    from torch._inductor import inductor_prims

    return inductor_prims.force_stride_order


def inductor_compile(
    graph_module: fx.GraphModule,
    inputs: Sequence[Any],
    *,
    is_inference: bool,
    is_backward: bool,
    config: dict[str, Any],
) -> Callable[[list[Any]], Any]:
    """Compile a decomposed ATen graph with Inductor. Returns a boxed callable (an `OutputCode`).

    Every output keeps the strides that `meta["val"]` promises.
    """
    from torch._inductor import config as inductor_config
    from torch._inductor.compile_fx import compile_fx_inner, record_original_output_strides
    from torch._inductor.utils import BoxedBool
    from torch._inductor.virtualized import V

    record_original_output_strides(graph_module)
    output = graph_module.graph.output_node()
    output.meta["user_visible_output_idxs"] = [
        index for index, value in enumerate(cast(Sequence[Any], output.args[0])) if isinstance(value, fx.Node)
    ]
    mode = fake_mode_of(graph_module)
    with contextlib.ExitStack() as stack:
        stack.enter_context(inductor_config.patch(config))
        if mode is not None:
            stack.enter_context(V.set_fake_mode(mode))
            # Constants that passes folded are real tensors in the graph.
            stack.callback(setattr, mode, "allow_non_fake_inputs", mode.allow_non_fake_inputs)
            mode.allow_non_fake_inputs = True
        code: Callable[[list[Any]], Any] = compile_fx_inner(
            graph_module,
            inputs,
            static_input_idxs=static_input_indices(),
            cudagraphs=BoxedBool(False),
            graph_id=0,
            is_inference=is_inference,
            is_backward=is_backward,
            boxed_forward_device_index=None,
        )
    return code


@contextlib.contextmanager
def compile_caches(directory: str, key: str, read: bool = True) -> Iterator[None]:
    """Keep all that torch writes while compiling inside `directory`, and salt its AOT cache with `key`.

    read: whether a stored AOT artifact may be served (else the compilers are always called).

    AOTAutogradCache's own key does not name the backend: without the salt, the artifact of another backend, or of
    other passes, would be served for the same model. Files are made private whatever the umask.
    """
    import torch._functorch.config as functorch_config
    import torch.compiler.config as compiler_config

    enabled = functorch_config.enable_autograd_cache and read
    saved = {name: os.environ.get(name) for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")}
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = directory
    os.environ["TRITON_CACHE_DIR"] = os.path.join(directory, "triton")
    umask = os.umask(0o077)
    try:
        with (
            compiler_config.patch(  # type: ignore[attr-defined]
                cache_key_tag=f"{compiler_config.cache_key_tag}|graphopt:{key}"
            ),
            functorch_config.patch(enable_autograd_cache=enabled, bundled_autograd_cache=True),
        ):
            yield
    finally:
        os.umask(umask)
        for name, value in saved.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def storable(compiled: Callable[[list[Any]], Any]) -> Callable[[list[Any]], Any]:
    """A copy of an Inductor artifact without its loaded code. Anything else makes the AOT cache store nothing."""
    from torch._functorch._aot_autograd.autograd_cache import BypassAOTAutogradCache
    from torch._inductor.output_code import CompiledFxGraph

    if not isinstance(compiled, CompiledFxGraph):
        raise BypassAOTAutogradCache("not an Inductor artifact")
    stored = copy.copy(compiled)
    stored.prepare_for_serialization()
    return stored


def reload(compiled: Any, inputs: Sequence[Any], graph_kwargs: Any) -> Callable[[list[Any]], Any]:
    """Load the code of an artifact that `storable` made; raises when its files are gone."""
    from torch._inductor.codecache import FxGraphCache
    from torch._inductor.output_code import CompiledFxGraphConstants

    constants = CompiledFxGraphConstants()
    loaded, _ = FxGraphCache.cache_hit_post_compile(compiled, {}, constants)
    if loaded is None:
        raise RuntimeError("a compiled graph is gone from the cache directory")
    loaded.post_compile(inputs, constants, graph_kwargs)
    result: Callable[[list[Any]], Any] = loaded
    return result


def suggest_dynamic(tensor: torch.Tensor, dim: int) -> None:
    """Let Dynamo treat the size of `dim` as a symbol from the first time it sees `tensor` (it may decline)."""
    torch._dynamo.maybe_mark_dynamic(tensor, dim)


def storage_holders(tensor: torch.Tensor) -> int:
    """How many tensors, C++ or Python objects hold the memory of `tensor`, this question not counted."""
    storage = tensor.untyped_storage()
    holders: int = torch._C._storage_Use_Count(storage._cdata)
    return holders - 1


def prepare_dynamo() -> None:
    """Make Dynamo keep float attributes (eps, scale) as constants of the graph, also under `dynamic=True`."""
    import torch._dynamo.config as dynamo_config

    dynamo_config.specialize_float = True


@dataclasses.dataclass
class DynamoEvents:
    """Why Dynamo broke or recompiled graphs, one line each."""

    graph_breaks: list[str] = dataclasses.field(default_factory=list)
    recompiles: list[str] = dataclasses.field(default_factory=list)


_TOLD_BY = {
    "graph_breaks": ("torch._dynamo.symbolic_convert.__graph_breaks", "torch._dynamo.convert_frame.__graph_breaks"),
    "recompiles": ("torch._dynamo.guards.__recompiles",),
}


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


@contextlib.contextmanager
def without_modes() -> Iterator[None]:
    """Run torch on real tensors although a compilation (fake tensors, tracing) may be in progress around the block."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily
    from torch.utils._python_dispatch import _disable_current_modes

    with unset_fake_temporarily(), _disable_current_modes():
        yield


@dataclasses.dataclass(frozen=True)
class SymbolFacts:
    """What is known of a graph's symbolic sizes: for each symbol (hint, lowest, highest), and true relations."""

    symbols: dict[Any, tuple[int | None, int, int]]
    relations: tuple[Any, ...]


def symbol_facts(values: Sequence[object]) -> SymbolFacts:
    """The symbols in the sizes of fake values, with hints, ranges and guards of their shape environment."""
    numbers = [value for value in values if isinstance(value, torch.SymInt)]
    for value in values:
        if isinstance(value, torch.Tensor):
            numbers += [part for part in (*value.shape, *value.stride()) if isinstance(part, torch.SymInt)]
    symbols: dict[Any, tuple[int | None, int, int]] = {}
    relations: dict[Any, None] = {}
    for number in numbers:
        environment = number.node.shape_env
        for symbol in number.node.expr.free_symbols:
            if environment is None or symbol in symbols:
                continue
            limits = environment.var_to_range.get(symbol)
            hint = environment.backed_var_to_val.get(symbol)
            low = int(limits.lower) if limits is not None and limits.lower.is_Integer else 0
            high = int(limits.upper) if limits is not None and limits.upper.is_Integer else 1 << 40
            symbols[symbol] = (None if hint is None else int(hint), max(low, 0), high)
            relations |= dict.fromkeys(guard.expr for guard in environment.guards)
    return SymbolFacts(symbols, tuple(relations))
