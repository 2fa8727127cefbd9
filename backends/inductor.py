"""Compile a graph with Inductor: C++ on the CPU, and an alternative to graphopt's own kernels on the GPU.

Dialect operations that a kernel of graphopt supports become calls of its operator inside the Inductor graph; all
others are expanded to ATen by their meaning and fused by Inductor.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx

from graphopt import _compat, capture, edit, ops, shapes, views
from graphopt.backends.eager_arithmetic import write_as_eager
from graphopt.backends.wide_products import widen
from graphopt.capture import NEVER_DECOMPOSED, GraphInfo, undecomposed
from graphopt.lowering import Choice, Lowered, choose, expand
from graphopt.options import Options
from graphopt.row_ops import EXTREMES, PRODUCTS, SUMS
from graphopt.runtime import kv as kv  # what the cache operations do at call time
from graphopt.runtime import kv_paged as kv_paged
from graphopt.runtime import kv_quantized as kv_quantized
from graphopt.runtime import prologue
from graphopt.runtime.artifact import Artifact

_REDUCTIONS = SUMS | PRODUCTS | EXTREMES


def compile_graph(
    graph_module: fx.GraphModule,
    inputs: Sequence[Any],
    info: GraphInfo,
    options: Options,
    choices: list[Choice] | None = None,
) -> Lowered:
    """The graph as a boxed Inductor artifact. choices: how dialect operations are lowered already; None: none is."""
    if choices is None:
        choices = choose(graph_module, ())
    graph_prologue, inputs = prologue.hoist(graph_module, inputs)
    expand(graph_module, {**undecomposed(), ops.rope: _rope_in_one_loop})
    write_as_eager(graph_module)
    widen(graph_module)
    _end_in_casts(graph_module)
    _hold_layouts(graph_module)
    graph_module.recompile()
    _compat.inductor_calls(*NEVER_DECOMPOSED)
    compiled = _compat.inductor_compile(
        graph_module,
        inputs,
        is_inference=info.kind == "inference",
        is_backward=info.kind == "backward",
        config=_config(graph_module, options),
    )
    return Lowered(Artifact(compiled, graph_prologue), choices)


def _rope_in_one_loop(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """The meaning of `graphopt.rope` with the halves exchanged by an index and a sign.

    Inductor's C++ writes each part of a `cat` by a loop of its own into a view of its own: 180 views in a decode step
    of 30 layers, and a second pass over the rows of a prompt.
    """
    pairs: Tensor = x.unflatten(-1, (-1, 2) if interleaved else (2, -1))
    sign = torch.arange(-1, 2, 2, device=x.device).to(x.dtype)
    rotated: Tensor = pairs.flip(-1) * sign if interleaved else pairs.flip(-2) * sign[:, None]
    return x * cos + rotated.flatten(-2) * sin


def _end_in_casts(graph_module: fx.GraphModule) -> None:
    """Let reductions of two-byte numbers that a graph holds twice be of float32, and end in a cast.

    They are outputs each (gradients of two biases that are added), else they would have been merged. Inductor's C++
    reduces once and stores twice, and declares what it stores by one name both times: a compile error of torch 2.13.
    """
    equal: defaultdict[str, list[fx.Node]] = defaultdict(list)
    for node in graph_module.graph.nodes:
        value = node.meta.get("val")
        if node.target in _REDUCTIONS and value.dtype in (torch.bfloat16, torch.float16) and value.device.type == "cpu":
            equal[f"{node.target} {node.args} {node.kwargs}"].append(node)
    for node in (node for nodes in equal.values() if len(nodes) > 1 for node in nodes):
        with edit.rewriting(graph_module, node) as rewrite:
            target = cast(Callable[..., Tensor], node.target)
            function = functools.partial(_reduced_in_float32, target, node.meta["val"].dtype)
            rewrite.replace(node, rewrite.inline(function, *node.args, decompositions=capture.decompositions()))
    edit.eliminate_dead_code(graph_module)


def _reduced_in_float32(target: Callable[..., Tensor], dtype: torch.dtype, x: Tensor, *how: Any) -> Tensor:
    return target(x.float(), *how).to(dtype)


def _hold_layouts(graph_module: fx.GraphModule) -> None:
    """Lay out memory as eager does where an output shows only a part of it.

    Inductor keeps the strides of outputs that fill their memory; of the others it lays out the whole as it likes, and
    the part has strides that eager's has not.
    """
    graph = graph_module.graph
    parts = {node: views.storage(node) for node in graph.output_node().all_input_nodes}
    for whole in dict.fromkeys(
        whole for node, whole in parts.items() if whole is not node and _is_partial(node, whole)
    ):
        value = whole.meta.get("val")
        if whole.op != "call_function" or not isinstance(value, torch.Tensor):
            continue
        users = list(whole.users)
        with graph.inserting_before(whole.next):
            strides = [_stride(whole, dimension) for dimension in range(value.dim())]
            held = graph.call_function(_compat.force_stride_order(), (whole, strides))
        held.meta["val"] = value
        for user in users:
            user.replace_input_with(whole, held)


def _stride(node: fx.Node, dimension: int) -> int | fx.Node:
    stride = node.meta["val"].stride(dimension)
    if isinstance(stride, int):
        return stride
    symbolic = node.graph.call_function(torch.ops.aten.sym_stride.int, (node, dimension))
    symbolic.meta["val"] = stride
    return symbolic


def _is_partial(node: fx.Node, whole: fx.Node) -> bool:
    shown, memory = node.meta.get("val"), whole.meta.get("val")
    if not isinstance(shown, torch.Tensor) or not isinstance(memory, torch.Tensor):
        return False
    return bool(shapes.numel(shown) != shapes.numel(memory))


def _config(graph_module: fx.GraphModule, options: Options) -> dict[str, Any]:
    tuned = options.mode.startswith("max-autotune")
    return {
        # Random numbers are eager's own: the same seed gives the same dropout mask with and without compiling.
        "fallback_random": True,
        # A cast that the program writes loses its bits, also where the value is cast up again.
        "emulate_precision_casts": True,
        # Of sizes and strides only what an operator says of its results can be wrong: inputs are guarded by Dynamo. A
        # check takes 0.7 us, and a model of 30 layers would make 500 of them for each token.
        "size_asserts": not all(map(_is_known, graph_module.graph.nodes)),
        # A loop that is shared out among threads should take longer than waking them: 512 elements take no microsecond.
        "cpp.min_chunk_size": 4096,
    } | ({"max_autotune": True} if tuned else {})


def _is_known(node: fx.Node) -> bool:
    """Whether the node's results are surely laid out as its fake value says."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return True
    return node.target.namespace == "graphopt_cpp" or _compat.inductor_generates(node.target)
