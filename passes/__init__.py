"""The pass library: one folder per stage, one file per pass, imported as `graphopt.passes`.

`PIPELINE` is the order in which the passes of the library run; `OPTIONAL` holds those that run when an option
or a target asks for them.
"""

import functools
import importlib.metadata
from collections.abc import Callable
from typing import Any

from graphopt.errors import PassError
from graphopt.options import Options
from graphopt.passes.canonicalize.fold_constants import fold_constants
from graphopt.passes.canonicalize.merge_common_nodes import merge_common_nodes
from graphopt.passes.canonicalize.remove_noops import remove_noops
from graphopt.passes.canonicalize.simplify_shapes import simplify_shapes
from graphopt.passes.fuse.form_regions import form_regions
from graphopt.passes.fuse.merge_parallel_linears import merge_parallel_linears
from graphopt.passes.fuse.part_products import part_products
from graphopt.passes.kv_cache.append_in_place import append_in_place
from graphopt.passes.kv_cache.fix_capacity import fix_capacity
from graphopt.passes.kv_cache.page_cache import page_cache
from graphopt.passes.kv_cache.quantize_cache import quantize_cache
from graphopt.passes.kv_cache.start_with_room import start_with_room
from graphopt.passes.kv_cache.write_in_place import write_in_place
from graphopt.passes.prune.drop_layers import drop_layers, names_of
from graphopt.passes.prune.prune_by_importance import prune_by_importance
from graphopt.passes.prune.prune_certified import prune_certified
from graphopt.passes.prune.prune_dead import prune_dead
from graphopt.passes.prune.prune_experts import prune_experts
from graphopt.passes.prune.sparsify_linears import sparsify_linears
from graphopt.passes.quantize.merge_quantized_linears import merge_quantized_linears
from graphopt.passes.quantize.quantize_embeddings import quantize_embeddings
from graphopt.passes.quantize.quantize_experts import quantize_experts
from graphopt.passes.quantize.quantize_linears import quantize_linears
from graphopt.passes.recognize.drop_relayouts import drop_relayouts
from graphopt.passes.recognize.recognize_attention import recognize_attention
from graphopt.passes.recognize.recognize_linear import recognize_linear
from graphopt.passes.recognize.recognize_rms_norm import recognize_rms_norm
from graphopt.passes.recognize.recognize_rope import recognize_rope
from graphopt.passes.recognize.slice_before_linear import slice_before_linear
from graphopt.pipeline import describe
from graphopt.prune_options import PruneLayers, Sparsify, parse_prune
from graphopt.quantization import rounding
from graphopt.quantization.calibration import Calibration
from graphopt.quantize_options import Quantize

PIPELINE: tuple[Callable[..., int], ...] = (
    # kv_cache, first half: runs before a copy is known to do nothing
    start_with_room,
    # canonicalize: one form for one meaning, bit for bit
    fold_constants,
    simplify_shapes,
    remove_noops,
    merge_common_nodes,
    # recognize: write what passes reason about as one dialect operation each
    recognize_attention,
    drop_relayouts,
    recognize_rope,
    recognize_rms_norm,
    recognize_linear,
    slice_before_linear,
    # kv_cache: no cache is copied for a new token
    append_in_place,
    # prune: what contributes nothing, while linears are still apart
    prune_dead,
    prune_experts,
    # fuse: fewer bytes
    merge_parallel_linears,
)


OPTIONAL: tuple[Callable[..., int], ...] = (
    # the target triton
    write_in_place,
    part_products,
    form_regions,
    # kv_capacity, kv_cache, kv_dtype
    fix_capacity,
    page_cache,
    quantize_cache,
    # prune_heads, prune
    prune_by_importance,
    prune_certified,
    drop_layers,
    sparsify_linears,
    # quantize
    quantize_linears,
    quantize_embeddings,
    quantize_experts,
    merge_quantized_linears,
)


def for_target(target: str, options: Options) -> tuple[Callable[..., int], ...]:
    """What a target needs beyond the pipeline."""
    if target != "triton":
        return ()
    return write_in_place, part_products, _bound(form_regions, cost_model=options.cost_model)


@functools.cache
def installed() -> tuple[Callable[..., int], ...]:
    """Passes that other packages bring along, under the entry-point group `graphopt.passes`, by name.

    Raises PassError, naming the package, for one that cannot be imported or is not a pass.
    """
    found = []
    for entry in sorted(importlib.metadata.entry_points(group="graphopt.passes"), key=lambda entry: entry.name):
        origin = f"entry point {entry.name!r} ({entry.value}) of package {entry.dist.name if entry.dist else '?'}"
        try:
            function = entry.load()
            describe(function)
        except Exception as error:
            raise PassError(f"{origin} brings no pass: {error}; uninstall the package or repair it") from error
        found.append(function)
    return tuple(found)


def for_caches(options: Options) -> tuple[Callable[..., int], ...]:
    """The passes that the options for KV caches ask for."""
    if options.kv_dtype is not None:
        return (_bound(quantize_cache, kind=options.kv_dtype),)
    if options.kv_cache is not None:
        return (page_cache,)
    return () if options.kv_capacity is None else (_bound(fix_capacity, capacity=options.kv_capacity),)


def lossy(options: Options) -> tuple[Callable[..., int], ...]:
    """The passes that change answers, bound to what the options ask for; none unless they ask by name."""
    return (*_pruning(options), *_quantizing(options))


def _pruning(options: Options) -> tuple[Callable[..., int], ...]:
    found: list[Callable[..., int]] = []
    if options.prune_heads is not None:
        function = prune_by_importance if options.prune_heads.max_error is None else prune_certified
        found.append(_bound(function, prune=options.prune_heads))
    for asked in parse_prune(options.prune):
        if isinstance(asked, PruneLayers):
            found.append(_bound(drop_layers, names=names_of(asked)))
        elif isinstance(asked, Sparsify):
            if isinstance(asked.calibration, Calibration):
                rounding.register(asked.calibration)
            found.append(_bound(sparsify_linears, sparsify=asked))
    return tuple(found)


def _quantizing(options: Options) -> tuple[Callable[..., int], ...]:
    quantize = Quantize.parse(options.quantize)
    if quantize is None:
        return ()
    if isinstance(quantize.calibration, Calibration):
        rounding.register(quantize.calibration)
    return (
        _bound(quantize_linears, quantize=quantize),
        _bound(quantize_embeddings, quantize=quantize),
        _bound(quantize_experts, quantize=quantize),
        merge_quantized_linears,
    )


def _bound(function: Callable[..., int], **keywords: Any) -> Callable[..., int]:
    """A pass with its own options given."""
    bound = functools.partial(function, **keywords)
    bound.graph_pass = describe(function)  # type: ignore[attr-defined]
    return bound


if __name__ != "graphopt.passes":
    raise ImportError("this package is graphopt.passes: import graphopt.passes, not passes")
