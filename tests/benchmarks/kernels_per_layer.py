"""Kernels and bytes of one layer: graphopt's generated kernels and Inductor's for the same models, with no GPU.

    python -m tests.benchmarks.kernels_per_layer

A layer is the graph of three layers less that of two. Nothing runs: both compilers only write their code.

graphopt: launches of the generated program, and calls beside them that move data; bytes by its cost model. Memory
between the programs of one region is not counted, nor the copy of a cache for which there is no more room.

The least: what the captured graph must read and write (inputs, weights, results; of a cache that grows the new rows).
With many tokens there is more that no kernel avoids: a product needs whole rows of the product before it, for more rows
at a time than fit on chip, so that what products and attentions hand on (`handed`) is written once and read once. Norms
and all else between count nothing.

Inductor: it schedules Triton code only for CUDA tensors, so it is given fake ones, and told of an H100 (`pretended`).
Counted are the Triton kernels and the library calls (products, attention) of the `call` that it writes; bytes are the
sum of `get_read_write_buffers_sizes` over its scheduler's nodes, which is what `metrics.num_bytes_accessed` adds up.
Attention is the call that torch's dispatch makes on a GPU, flash without a mask and memory-efficient with one, as this
choice is missing in builds without CUDA. `shape_padding` is off: it is decided by timing. All else is the default.
"""

from __future__ import annotations

import contextlib
import itertools
import re
import types
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import sympy
import torch
import transformers
from torch import Tensor, nn
from torch._dynamo import device_interface
from torch._inductor import config as inductor_config
from torch._inductor.fx_passes import joint_graph, post_grad
from torch._inductor.graph import GraphLowering
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import cpp_extension
from torch.utils._triton import has_triton

from graphopt import backend, capture, cost, estimate, pipeline
from graphopt.backends.triton.program import write
from graphopt.options import Options
from graphopt.quantization import operations
from graphopt.quantize_options import Quantize
from graphopt.runtime import prologue

bf16 = torch.bfloat16
CACHED, BATCHES = (512, 4096), ((1, 16), (8, 128))
H100 = types.SimpleNamespace(
    name="NVIDIA H100", type="cuda", index=0, major=9, minor=0, cc=90, multi_processor_count=132, warp_size=32,
    total_memory=80 * 2**30, max_threads_per_multi_processor=2048, max_threads_per_block=1024,
    regs_per_multiprocessor=65536, shared_memory_per_block=49152, shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472, L2_cache_size=50 * 2**20, gcnArchName="",
)  # fmt: skip
GUARD = """#include <c10/core/impl/DeviceGuardImplInterface.h>
static c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> guard;
void pretend() { c10::impl::device_guard_impl_registry[static_cast<size_t>(c10::DeviceType::CUDA)].store(&guard); }"""

Counts = dict[str, int]
"""Kernels, library calls and bytes of a graph."""


def llama(layers: int) -> nn.Module:
    config = transformers.LlamaConfig(
        hidden_size=2048, intermediate_size=8192, num_attention_heads=32, num_key_value_heads=8,
        num_hidden_layers=layers, vocab_size=64, max_position_embeddings=8192,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)  # type: ignore[no-any-return]


def bert(layers: int) -> nn.Module:
    return transformers.BertModel(transformers.BertConfig(num_hidden_layers=layers, vocab_size=64))  # type: ignore[no-any-return]


def arguments(model: nn.Module, layers: int, cached: int, batch: tuple[int, int]) -> dict[str, Any]:
    """Of a decode step after `cached` tokens, or of encoding a batch [B, S] if there are none."""
    ids = torch.empty(batch, dtype=torch.long)
    if not cached:
        return {"input_ids": ids, "attention_mask": torch.empty(batch, dtype=torch.long)}
    past = transformers.DynamicCache(config=model.config)
    for layer in past.layers[:layers]:
        layer.keys, layer.values = (torch.empty(batch[0], 8, cached, 64, dtype=bf16) for _ in "kv")
        layer.dtype, layer.device, layer.is_initialized = bf16, layer.keys.device, True
    return {"input_ids": ids, "past_key_values": past, "use_cache": True}


class Counted(Exception):
    """Ends a compilation once its code is there."""


def ours(
    build: Callable[[int], nn.Module], layers: int, cached: int, batch: tuple[int, int], quantize: str | None = None
) -> Counts:
    """The counts of graphopt's program; of quantised weights the least counts what they are packed in."""
    found: Counts = {}

    def count(graph_module: torch.fx.GraphModule, fake: Any, info: Any) -> Any:
        sizes = estimate.example_sizes(graph_module)

        def number(expression: Any) -> int:
            moved = sympy.sympify(expression)
            return int(moved.xreplace({s: sympy.Integer(sizes.get(s.name, 1)) for s in moved.free_symbols}))

        found["least"] = number(cost.minimal_bytes(graph_module))
        options = Options(target="triton", quantize=Quantize(quantize) if quantize else None)
        pipeline.run(graph_module, backend.arranged(options, "triton"), options)
        for node in graph_module.graph.find_nodes(op="call_function", target=operations.quantize_weight):
            weight = node.args[0].meta["val"]
            found["least"] += number(cost.value_bytes(node.meta["val"]) - cost.value_bytes(weight))
        prologue.hoist(graph_module, fake)  # what is done at call time is no part of the program
        program = write(graph_module)
        found["handed"] = found["least"] + number(_handed_on(graph_module))
        found["kernels"] = sum(map(len, program.calls.values()))
        found["calls"] = sum(
            node.op == "call_function" and cost.node_cost(graph_module, node).bytes != 0
            for node in graph_module.graph.nodes
        )
        found["bytes"] = number(cost.graph_cost(graph_module).bytes)
        raise Counted

    _compile(build(layers).to(bf16).eval(), lambda g, i: capture.capture(g, i, count), layers, cached, batch, found)
    return found


def _handed_on(graph_module: torch.fx.GraphModule) -> Any:
    """Bytes of writing and reading what regions with a product or attention make for others."""
    results = graph_module.graph.output_node().all_input_nodes
    moved: Any = 0
    for node in graph_module.graph.find_nodes(op="call_module"):
        if graph_module.get_submodule(node.target).meta["kind"] != "rows":
            moved += sum(2 * cost.value_bytes(made.meta["val"]) for made in node.users if made not in results)
    return moved


def theirs(build: Callable[[int], nn.Module], layers: int, cached: int, batch: tuple[int, int]) -> Counts:
    """The counts of Inductor's code."""
    found: Counts = {}

    def count(graph: GraphLowering, *rest: Any) -> None:
        code = graph.codegen()[0]
        call = re.split(r"\n *def call\(", getattr(code, "value", str(code)))[1]
        found["kernels"] = len(re.findall(r"^ *triton_\w+\.run\(", call, re.MULTILINE))
        found["calls"] = len(re.findall(r"^ *(?:\w+ = )?(?:extern_kernels|torch\.ops\.aten)\.", call, re.MULTILINE))
        found["bytes"] = int(sum(node.get_read_write_buffers_sizes() for node in graph.scheduler.nodes))
        raise Counted

    with torch.device("meta"):
        model = build(layers).to(bf16).eval()
    with pretended(), mock.patch.object(GraphLowering, "compile_to_module", count):
        with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"):
            for module in model.modules():
                for name, value in (*module._parameters.items(), *module._buffers.items()):
                    if value is not None:
                        fake = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)
                        setattr(module, name, nn.Parameter(fake) if name in module._parameters else fake)
            model.requires_grad_(False)
        with inductor_config.patch(shape_padding=False, force_disable_caches=True):
            _compile(model, "inductor", layers, cached, batch, found)
    return found


def _compile(model: nn.Module, compiler: Any, layers: int, cached: int, batch: tuple[int, int], found: Counts) -> None:
    torch._dynamo.reset()
    cuda = compiler == "inductor"
    with FakeTensorMode(allow_non_fake_inputs=True) if cuda else contextlib.nullcontext():
        with torch.device("cuda" if cuda else "cpu"):
            given = arguments(model, layers, cached, batch)
    try:
        with torch.no_grad(), torch._functorch.config.patch(enable_autograd_cache=False):
            torch.compile(model.forward, backend=compiler, dynamic=False)(**given)
    except Exception:
        if not found:
            raise


def _attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False,
    scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """What `scaled_dot_product_attention` calls for CUDA tensors in bfloat16."""
    if attn_mask is None:
        flash: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal, scale=scale)[0]
        return flash
    bias = torch.where(attn_mask, 0.0, float("-inf")).to(q.dtype) if attn_mask.dtype == torch.bool else attn_mask
    bias = bias.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    efficient: Tensor = torch.ops.aten._scaled_dot_product_efficient_attention(
        q, k, v, bias, False, 0.0, is_causal, scale=scale
    )[0]
    return efficient


@contextlib.contextmanager
def pretended() -> Iterator[None]:
    """Let torch believe in an H100 as far as Inductor asks while it writes code."""
    cpp_extension.load_inline("pretended_guard", [GUARD], functions=["pretend"]).pretend()
    for passes in (joint_graph, post_grad):
        passes.lazy_init(torch.device("cpu"))  # makes its examples on the device that it is told of
    deduce = joint_graph.UniformValueConstantFolder._deduce_value

    def deduce_on_cpu(self: Any, node: torch.fx.Node) -> Any:
        saved = node.kwargs
        node.kwargs = {**saved, "device": torch.device("cpu")} if "device" in saved else saved
        try:
            return deduce(self, node)
        finally:
            node.kwargs = saved

    answers: dict[str, Any] = {
        "is_available": True, "device_count": 1, "current_device": 0, "get_device_properties": H100, "set_device": None,
        "get_device_capability": (9, 0), "synchronize": None, "get_device_name": H100.name, "is_bf16_supported": True,
        "get_rng_state": torch.zeros(16, dtype=torch.uint8), "set_rng_state": None, "_lazy_init": None,
        "_exchange_device": 0, "_maybe_exchange_device": 0,
    }  # fmt: skip
    asked: dict[str, Any] = {
        "is_available": True, "current_device": 0, "get_compute_capability": 90, "device_count": 1, "synchronize": None,
        "is_triton_capable": True, "raise_if_triton_unavailable": None, "is_bf16_supported": True,
        "get_device_properties": H100, "exchange_device": 0, "maybe_exchange_device": 0,
    }  # fmt: skip

    def answering(value: Any) -> Callable[..., Any]:
        return lambda *args, **kwargs: value

    interface = device_interface.CudaInterface
    with contextlib.ExitStack() as stack:
        for name, value in answers.items():
            stack.enter_context(mock.patch(f"torch.cuda.{name}", answering(value)))
        for name, value in asked.items():
            stack.enter_context(mock.patch.object(interface, name, staticmethod(answering(value))))
        for name in ("get_device_properties", "current_device"):
            stack.enter_context(mock.patch.object(interface.Worker, name, staticmethod(answering(asked[name]))))
        for passes in (joint_graph, post_grad):
            stack.enter_context(mock.patch.object(passes, "lazy_init", answering(None)))
        folder = joint_graph.UniformValueConstantFolder
        stack.enter_context(mock.patch.object(folder, "_deduce_value", deduce_on_cpu))
        stack.enter_context(mock.patch("torch.utils._triton.triton_hash_with_backend", answering("0" * 16)))
        stack.enter_context(mock.patch("torch.nn.functional.scaled_dot_product_attention", _attention))
        has_triton.cache_clear()
        stack.callback(has_triton.cache_clear)
        yield


def per_layer(count: Callable[..., Counts], *what: Any) -> Counts:
    """A graph of three layers less one of two."""
    build, *rest = what
    two, three = (count(build, layers, *rest) for layers in (2, 3))
    return {name: three[name] - two[name] for name in two}


def main() -> None:
    """Print a line for each layer."""
    cases: list[tuple[str, Any, int, tuple[int, int]]] = [
        *((f"Llama, a decode step after {cached} tokens", llama, cached, (1, 1)) for cached in CACHED),
        *((f"BERT base, {batch[0]} x {batch[1]} tokens", bert, 0, batch) for batch in BATCHES),
    ]
    print("| layer | compiler | kernels | calls | MB | of the least | of that and what products hand on |")
    print("|---|---|---|---|---|---|---|")
    for name, *what in cases:
        mine, inductor = per_layer(ours, *what), per_layer(theirs, *what)
        for compiler, found in (("graphopt", mine), ("Inductor", inductor)):
            shares = " | ".join(f"{found['bytes'] / mine[least]:.3f}" for least in ("least", "handed"))
            counts = f"{found['kernels']} | {found['calls']} | {found['bytes'] / 1e6:.2f}"
            print(f"| {name} | {compiler} | {counts} | {shares} |", flush=True)
    quantised()


def quantised() -> None:
    """Print a line for each scheme of a Llama layer with quantised weights; Inductor has none of them."""
    for scheme, cached in itertools.product(("int8", "int4", "int8-dynamic"), CACHED):
        mine = per_layer(ours, llama, cached, (1, 1), scheme)
        shares = " | ".join(f"{mine['bytes'] / mine[least]:.3f}" for least in ("least", "handed"))
        counts = f"{mine['kernels']} | {mine['calls']} | {mine['bytes'] / 1e6:.2f}"
        name = f"Llama in {scheme}, a decode step after {cached} tokens"
        print(f"| {name} | graphopt | {counts} | {shares} |", flush=True)


if __name__ == "__main__":
    main()
