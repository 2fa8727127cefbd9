"""AOTAutograd and Inductor: capture, decompositions, compiling, and what their caches store."""

from __future__ import annotations

import contextlib
import copy
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import fx
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.output_code import OutputCode as OutputCode

from graphopt._compat.dynamo import static_input_indices
from graphopt._compat.fakes import fake_mode_of


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


def inductor_calls_function(operator: Any, function: Callable[..., Any]) -> None:
    """Let code that Inductor writes call `function` with all arguments of `operator`, in order, in its place.

    Such code may be loaded from a cache in another process: the function must be declared there as well.
    """
    from torch._inductor import ir, lowering
    from torch._inductor.select_algorithm import extern_kernels
    from torch._library.utils import get_layout_constraint_tag
    from torch.utils._pytree import tree_map

    name = "graphopt_" + operator._schema.name.partition("::")[2]
    setattr(extern_kernels, name, function)

    class Call(ir.FallbackKernel):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.python_kernel_name = f"extern_kernels.{name}"

    def lower(*args: Any, **kwargs: Any) -> Any:
        parameters = operator._schema.arguments[len(args) :]
        rest = [kwargs.get(parameter.name, parameter.default_value) for parameter in parameters]
        results = Call.create(operator, *args, *rest)
        return tree_map(lambda value: ir.TensorBox.create(value) if isinstance(value, ir.IRNode) else value, results)

    constraint = lowering.tag_to_layout_constraint(get_layout_constraint_tag(operator, with_default=True))
    lowering.make_fallback(operator, layout_constraint=constraint)
    lowering.register_lowering(operator, type_promotion_kind=None)(lower)


def inductor_generates(operator: Any) -> bool:
    """Whether Inductor writes code for this operator, and does not call it as eager does."""
    from torch._inductor import lowering

    return operator in lowering.lowerings and operator not in lowering.fallbacks


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
