"""CUDA graphs by torch's own machinery: Inductor's graph trees."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import fx


def incompatible_node(graph_module: fx.GraphModule) -> fx.Node | None:
    """A node that cannot be recorded: it waits for values, or its result's size depends on them; None if all can."""
    from torch._inductor.utils import get_first_incompatible_cudagraph_node

    found: fx.Node | None = get_first_incompatible_cudagraph_node(graph_module)
    return found


def placeholder_facts(graph: fx.Graph) -> tuple[Any, ...]:
    """What the machinery's messages say of the inputs; plain data."""
    from torch._inductor.cudagraph_utils import get_placeholder_info

    return tuple(get_placeholder_info(graph))


def cuda_graphs(
    compiled: Callable[[list[Any]], Any],
    *,
    static: Sequence[int],
    updated: Sequence[int],
    outputs: int,
    device_index: int,
    placeholders: Sequence[Any],
) -> Callable[[list[Any]], Any]:
    """A boxed callable that runs `compiled` once, records it for each set of integers among the inputs, then replays.

    static: inputs that stay at their addresses (a new address means a new recording); the others are copied to where
    the recording reads them. Tensors that it returns are overwritten by the next replay.
    """
    from torch._inductor.compile_fx import cudagraphify

    replayed: Callable[[list[Any]], Any] = cudagraphify(
        compiled,
        static_input_idxs=tuple(static),
        device_index=device_index,
        stack_traces=[None] * outputs,
        is_backward=False,
        is_inference=True,
        constants=(),
        placeholders=tuple(placeholders),
        mutated_input_idxs=tuple(updated),
    )
    return replayed
