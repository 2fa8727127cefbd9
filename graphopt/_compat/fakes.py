"""Fake and real execution, tracing with them, what is known of symbolic sizes, who holds a storage."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import _get_placeholder_expr

Target = Callable[..., object]


def fake_mode_of(graph_module: fx.GraphModule) -> FakeTensorMode | None:
    """The fake tensor mode under which the graph's `meta["val"]` were made."""
    for node in graph_module.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, FakeTensor):
            return value.fake_mode
    return None


def fake_value(graph_module: fx.GraphModule, value: torch.Tensor) -> torch.Tensor:
    """The fake value that stands for a constant tensor in the graph."""
    mode = fake_mode_of(graph_module)
    return value if mode is None else mode.from_tensor(value, static_shapes=True)


def is_fake(value: torch.Tensor) -> bool:
    """Whether a tensor stands for one of its shape and dtype, and holds no numbers."""
    return isinstance(value, FakeTensor)


@contextlib.contextmanager
def fake_execution(graph_module: fx.GraphModule) -> Iterator[None]:
    """Run torch operations on the graph's fake values, keeping symbolic sizes symbolic."""
    from torch._dispatch.python import enable_python_dispatcher

    mode = fake_mode_of(graph_module) or FakeTensorMode(allow_non_fake_inputs=True)
    with mode, enable_python_dispatcher(), torch.no_grad():
        yield


@contextlib.contextmanager
def real_execution() -> Iterator[None]:
    """Run torch operations on real tensors while a graph is being compiled (when fake values are in force)."""
    from torch.utils._python_dispatch import _disable_current_modes

    with _disable_current_modes(), torch.no_grad():
        yield


@contextlib.contextmanager
def new_fake_execution() -> Iterator[None]:
    """Run torch operations on fake tensors of their own, whatever compilation may be in progress around the block."""
    from torch._dispatch.python import enable_python_dispatcher

    with without_modes(), FakeTensorMode(), enable_python_dispatcher(), torch.no_grad():
        yield


@contextlib.contextmanager
def speculative_execution(graph_module: fx.GraphModule) -> Iterator[None]:
    """As `fake_execution`, for attempts that may fail: no guard on a symbolic size stays, no error is logged."""
    mode = fake_mode_of(graph_module)
    log = logging.getLogger("torch._subclasses.fake_tensor")
    disabled, log.disabled = log.disabled, True
    try:
        with contextlib.ExitStack() as stack:
            if mode is not None and mode.shape_env is not None:
                stack.enter_context(mode.shape_env.suppress_guards())
            stack.enter_context(fake_execution(graph_module))
            yield
    finally:
        log.disabled = disabled


def trace(function: Target, arguments: Sequence[object], decompositions: dict[Any, Any]) -> fx.GraphModule:
    """The ATen graph of `function(*arguments)` for fake arguments, decomposed by the table."""
    from torch.fx.experimental.proxy_tensor import make_fx

    return make_fx(function, decomposition_table=decompositions, _allow_non_fake_inputs=True)(*arguments)


def lazy_graph_module(root: fx.GraphModule, graph: fx.Graph) -> fx.GraphModule:
    """`fx.GraphModule(root, graph)` whose code, the dear part, is generated when it is first called."""
    from torch.fx._lazy_graph_module import _LazyGraphModule

    made: fx.GraphModule = _LazyGraphModule(root, graph)
    return made


def address(tensor: torch.Tensor) -> int:
    """Where torch keeps the tensor itself, not its data."""
    place: int = tensor._cdata
    return place


def storage_holders(tensor: torch.Tensor) -> int:
    """How many tensors, C++ or Python objects hold the memory of `tensor`, this question not counted."""
    storage = tensor.untyped_storage()
    holders: int = torch._C._storage_Use_Count(storage._cdata)
    return holders - 1


@contextlib.contextmanager
def without_modes() -> Iterator[None]:
    """Run torch on real tensors although a compilation (fake tensors, tracing) may be in progress around the block."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily
    from torch.utils._python_dispatch import _disable_current_modes

    with unset_fake_temporarily(), _disable_current_modes():
        yield


def placeholder_expression(value: torch.SymInt) -> Any:
    """What Inductor calls a symbolic number among a graph's inputs: its symbol from before it equalled another."""
    return _get_placeholder_expr(value.node)


@dataclasses.dataclass(frozen=True)
class SymbolFacts:
    """What is known of a graph's symbolic sizes: for each symbol (hint, lowest, highest), and true relations."""

    symbols: dict[Any, tuple[int | None, int, int]]
    relations: tuple[Any, ...]


def symbol_facts(values: Sequence[object]) -> SymbolFacts:
    """The symbols in the sizes of fake values, with hints, ranges and guards of their shape environment."""
    numbers = [value for value in values if isinstance(value, torch.SymInt)]
    for value in values:
        if isinstance(value, torch.Tensor):
            numbers += [part for part in (*value.shape, *value.stride()) if isinstance(part, torch.SymInt)]
    symbols: dict[Any, tuple[int | None, int, int]] = {}
    relations: dict[Any, None] = {}
    for number in numbers:
        environment = number.node.shape_env
        for symbol in number.node.expr.free_symbols:
            if environment is None or symbol in symbols:
                continue
            limits = environment.var_to_range.get(symbol)
            hint = environment.backed_var_to_val.get(symbol)
            low = int(limits.lower) if limits is not None and limits.lower.is_Integer else 0
            high = int(limits.upper) if limits is not None and limits.upper.is_Integer else 1 << 40
            symbols[symbol] = (None if hint is None else int(hint), max(low, 0), high)
            relations |= dict.fromkeys(guard.expr for guard in environment.guards)
    return SymbolFacts(symbols, tuple(relations))
