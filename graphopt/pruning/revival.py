"""What happens when a dead head comes alive: the call is run as eager runs it, and the next one compiles anew.

A pruned weight is made again when a weight that its removal rests on has changed. If what was zero no longer is,
`prune_weight` raises before the compiled graph has done anything, and the graph that Dynamo captured runs instead. Then
Dynamo forgets what it compiled for this code, so that the next call is compiled for the weights as they are now.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from graphopt import _compat
from graphopt.errors import StalePruningError
from graphopt.runtime.counters import counters


def guarded(compiled: Callable[..., Any], eager: Callable[..., Any]) -> Callable[..., Any]:
    """`compiled`, or `eager` for a call at which something pruned is alive again. Made while Dynamo compiles."""
    forget = _compat.forgetter()

    @functools.wraps(compiled)
    def call(*inputs: Any) -> Any:
        try:
            return compiled(*inputs)
        except StalePruningError:
            counters["revived"] += 1
            results = eager(*inputs)
            forget()
            return results

    return call
