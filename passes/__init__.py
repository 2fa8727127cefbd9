"""The pass library: one folder per stage, one file per pass, imported as `graphopt.passes`.

`PIPELINE` is the order in which the passes of the library run.
"""

from collections.abc import Callable

from graphopt.passes.canonicalize.fold_constants import fold_constants
from graphopt.passes.canonicalize.merge_common_nodes import merge_common_nodes
from graphopt.passes.canonicalize.remove_noops import remove_noops
from graphopt.passes.canonicalize.simplify_shapes import simplify_shapes
from graphopt.passes.fuse.merge_parallel_linears import merge_parallel_linears
from graphopt.passes.kv_cache.append_in_place import append_in_place
from graphopt.passes.recognize.recognize_linear import recognize_linear

PIPELINE: tuple[Callable[..., int], ...] = (
    # canonicalize: one form for one meaning, bit for bit
    fold_constants,
    simplify_shapes,
    remove_noops,
    merge_common_nodes,
    # recognize: write what passes reason about as one dialect operation each
    recognize_linear,
    # kv_cache: no cache is copied for a new token
    append_in_place,
    # fuse: fewer bytes
    merge_parallel_linears,
)

if __name__ != "graphopt.passes":
    raise ImportError("this package is graphopt.passes: import graphopt.passes, not passes")
