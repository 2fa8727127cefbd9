"""The entry point of `torch.compile(model, backend="graphopt")`: options, capture, passes, lowering, one callable."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx

from graphopt import _compat, backends, passes, pipeline, report
from graphopt.capture import GraphInfo, capture
from graphopt.errors import GraphoptError, LoweringError
from graphopt.lowering import CustomLowering
from graphopt.options import Options
from graphopt.pruning import lines, revival
from graphopt.quantization import cache_operations, release
from graphopt.quantize_options import depends_on_values
from graphopt.runtime import artifact, cache, cuda_graphs, pages
from graphopt.verify import Checker
from graphopt.watch import Watchers

_compat.prepare_dynamo()
artifact.on_load.append(report.add)


def graphopt(
    graph_module: fx.GraphModule, inputs: Sequence[Any], *, mode: object = None, options: object = None
) -> Callable[..., Any]:
    """Compile a Dynamo graph. Called by torch.compile with the user's `mode` and `options`.

    Raises OptionError for a wrong option, before any work. What cannot be optimised runs as eager runs it, counted
    in `graphopt.counters` and named in the report; under `strict=True` it raises instead.
    """
    chosen = Options.parse(mode, options)
    cache_operations.check_devices(chosen.kv_dtype, inputs)
    target = backends.resolve(chosen.target, inputs)
    ordered = arranged(chosen, target)
    weights = _weights(graph_module, inputs)
    key = _cache_key(chosen, backends.prepare(target), _dead_lines(weights, ordered))
    if target == "cpu":
        pages.enlarge(weights)

    def compile_captured(captured: fx.GraphModule, fake_inputs: Sequence[Any], info: GraphInfo) -> Callable[..., Any]:
        with _compat.compile_caches(str(cache.cache_dir("inductor")), key):
            return _compile(captured, fake_inputs, info, chosen, ordered)

    with _compat.compile_caches(str(cache.cache_dir("inductor")), key, read=_may_reuse(chosen)):
        try:
            compiled: Callable[..., Any] = capture(graph_module, inputs, compile_captured)
            return revival.guarded(compiled, graph_module.forward)
        except Exception as raised:
            if chosen.strict or isinstance(raised, GraphoptError) or _compat.is_control_flow(raised):
                raise
            left = report.GraphReport("whole", "eager", len(graph_module.graph.nodes))
            left.fall_back("the whole graph", f"{type(raised).__name__}: {raised}")
            report.add(left)
            forward: Callable[..., Any] = graph_module.forward
            return forward


def arranged(options: Options, target: str) -> list[Callable[..., int]]:
    """The passes that run for a target under these options, in order: the library's, kernels of the user's, installed
    passes, the user's."""
    own = (*passes.PIPELINE, *passes.for_caches(options), *passes.lossy(options))
    added = (*passes.installed(), *options.passes)
    kernels = [function for function in added if isinstance(function, CustomLowering)]
    others = [function for function in added if not isinstance(function, CustomLowering)]
    # What is in a region is not seen by a kernel of the user's any more.
    ordered = pipeline.arrange((*own, *kernels, *passes.for_target(target, options), *others), passes.OPTIONAL)
    options.check_disabled({pipeline.describe(function).name for function in (*ordered, *passes.OPTIONAL)})
    return ordered


def _compile(
    graph_module: fx.GraphModule,
    inputs: Sequence[Any],
    info: GraphInfo,
    options: Options,
    arranged: Sequence[Callable[..., int]],
) -> Callable[..., Any]:
    started = time.perf_counter()
    target = backends.resolve(options.target, inputs)
    graph_report = report.GraphReport(info.kind, target, len(graph_module.graph.nodes))
    checker, watchers = _checker(options), Watchers(graph_module, graph_report, options)
    graph_report.passes = pipeline.run(
        graph_module, arranged, options, observer=checker, after_pass=watchers.after_pass
    )
    release.check_reads(graph_module)
    watchers.after_passes(graph_module)
    if checker is not None:
        graph_report.verification = checker.summary()
    meaning = copy.deepcopy(graph_module.graph)
    try:
        lowered = backends.TARGETS[target](graph_module, inputs, info, options)
    except Exception as raised:
        if _compat.is_control_flow(raised):
            raise
        if options.strict:
            raise LoweringError(f"target {target!r} cannot lower this graph: {raised}") from raised
        graph_report.fall_back(f"a graph of {len(meaning.nodes)} nodes", f"{type(raised).__name__}: {raised}")
        graph_module.graph = meaning
        lowered = backends.TARGETS["reference"](graph_module, inputs, info, options)
    graph_report.lowerings, graph_report.notes = lowered.choices, lowered.notes
    for what, reason in lowered.left_out:
        if options.strict:
            raise LoweringError(f"target {target!r} cannot use {what}: {reason}")
        graph_report.fall_back(what, reason)
    if options.mode in ("reduce-overhead", "max-autotune"):
        recording = cuda_graphs.plan(graph_module, info.training)
        if isinstance(recording, str):
            graph_report.notes.append(f"mode {options.mode!r}: no CUDA graphs: {recording}")
        else:
            lowered.artifact.replay(recording)
    graph_report.seconds = time.perf_counter() - started
    lowered.artifact.record = graph_report
    watchers.after_lowering(lowered)
    report.add(graph_report)
    artifact_of_graph: Callable[..., Any] = lowered.artifact
    return artifact_of_graph


def _checker(options: Options) -> Checker | None:
    """What watches the rewrites under `verify`; reproducers of failures go to the dump, else to the cache."""
    if options.verify == "off":
        return None
    directory = Path(options.dump) / "repro" if options.dump else cache.cache_dir("repro")
    return Checker(options.verify, directory=directory)


def _may_reuse(options: Options) -> bool:
    """Whether a stored artifact may stand in for running the passes: not when the user watches or extends them."""
    watched = options.dump or options.debug or options.verify != "off" or report.collector() is not None
    foreign = options.passes or passes.installed() or options.cost_model
    # What goes by the names of modules and weights is no part of the graph, nor of its key.
    by_value = depends_on_values(options.quantize) or options.prune_heads is not None or bool(options.prune)
    return not (watched or foreign or by_value)


def _cache_key(options: Options, prepared: str, dead: str) -> str:
    return f"{cache.source_digest()}|{options}|{prepared}|{dead}"


def _weights(graph_module: fx.GraphModule, inputs: Sequence[Any]) -> list[torch.Tensor]:
    """The parameters and buffers among the inputs of a Dynamo graph."""
    placeholders = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    names = [_compat.dynamo_source(node) or "" for node in placeholders]
    return [value for name, value in zip(names, inputs, strict=False) if "_parameters[" in name or "_buffers[" in name]


def _dead_lines(weights: Sequence[torch.Tensor], arranged: Sequence[Callable[..., int]]) -> str:
    """Which rows and columns of the weights are zero, for the cache's key: graphs are pruned by them."""
    if not any(pipeline.describe(function).stage == "prune" for function in arranged):
        return ""
    return lines.digest(weights)
