"""The pass library: one folder per stage, one file per pass, imported as `graphopt.passes`.

`PIPELINE` is the order in which the passes of the library run.
"""

from collections.abc import Callable

PIPELINE: tuple[Callable[..., int], ...] = ()

if __name__ != "graphopt.passes":
    raise ImportError("this package is graphopt.passes: import graphopt.passes, not passes")
