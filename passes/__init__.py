"""The pass library: one folder per stage, one file per pass, imported as `graphopt.passes`.

`PIPELINE` is the order in which the passes of the library run.
"""

from collections.abc import Callable

from graphopt.passes.fuse.merge_parallel_linears import merge_parallel_linears
from graphopt.passes.recognize.recognize_linear import recognize_linear

PIPELINE: tuple[Callable[..., int], ...] = (
    # recognize: write what passes reason about as one dialect operation each
    recognize_linear,
    # fuse: fewer bytes
    merge_parallel_linears,
)

if __name__ != "graphopt.passes":
    raise ImportError("this package is graphopt.passes: import graphopt.passes, not passes")
