"""Change a graph: every rewrite of every pass goes through `rewriting`, so that it is numbered and can be checked.

    with edit.rewriting(graph_module, node) as rewrite:
        new = rewrite.call(torch.ops.aten.neg.default, node.args[0])
        rewrite.replace(node, new)
    count += rewrite.applied

New nodes get `meta["val"]` by running their target on fake values, the model's source line of the node they stand
for, and a `Provenance`. A refusal is recorded with `refuse(node, reason)`; the report prints it.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import fx

from graphopt import _compat, shapes
from graphopt.errors import PassError


@dataclasses.dataclass(frozen=True)
class Provenance:
    """Where a node came from: the pass, the number of the rewrite within the graph, the nodes it replaced."""

    pass_name: str
    number: int
    sources: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Refusal:
    """A place where a pass could have applied but did not, and why."""

    pass_name: str
    node: str
    reason: str
    where: str


@dataclasses.dataclass(frozen=True)
class Application:
    """One rewrite, seen while both sides are still in the graph: `pairs` holds (replaced node, its replacement).

    same_layout: whether the replacements lie in memory as the replaced values did.
    """

    graph_module: fx.GraphModule
    provenance: Provenance
    exactness: str
    pairs: tuple[tuple[fx.Node, fx.Node], ...]
    same_layout: bool = True


@dataclasses.dataclass
class Session:
    """The rewrites made in one graph: their count, its limit, what was refused and noted, and who watches.

    only: which attempts may be applied, by their number from 1 (`selecting`); None means all.
    """

    limit: int | None = None
    observer: Callable[[Application], None] | None = None
    pass_name: str = "by hand"
    exactness: str = "rounding"
    rewrites: int = 0
    refusals: list[Refusal] = dataclasses.field(default_factory=list)
    only: frozenset[int] | None = None
    attempts: int = 0
    notes: list[str] = dataclasses.field(default_factory=list)

    def permits(self) -> bool:
        """Count one more attempt; may it be applied?"""
        self.attempts += 1
        within = self.limit is None or self.rewrites < self.limit
        return within and (self.only is None or self.attempts in self.only)


aten = torch.ops.aten

_DENSE = {"memory_format": torch.contiguous_format}

_session: contextvars.ContextVar[Session | None] = contextvars.ContextVar("graphopt_session", default=None)


@contextlib.contextmanager
def session(current: Session) -> Iterator[Session]:
    """Number and watch all rewrites made inside the block."""
    token = _session.set(current)
    try:
        yield current
    finally:
        _session.reset(token)


@contextlib.contextmanager
def selecting(pass_name: str, numbers: frozenset[int] | None) -> Iterator[Session]:
    """Run a pass of this name: only some of the rewrites that it tries happen, by their order from 1; None: all."""
    with contextlib.ExitStack() as stack:
        current = _session.get() or stack.enter_context(session(Session()))
        saved = current.pass_name, current.only, current.attempts
        current.pass_name, current.only, current.attempts = pass_name, numbers, 0
        try:
            yield current
        finally:
            current.pass_name, current.only, current.attempts = saved


def refuse(node: fx.Node, reason: str) -> None:
    """Record that the running pass leaves `node` alone, and why; shown by `graphopt.explain`."""
    current = _session.get()
    if current is not None:
        current.refusals.append(Refusal(current.pass_name, node.name, reason, source_line(node)))


def note(text: str) -> None:
    """Record what the user of the running pass should know of its choice; shown by `graphopt.explain`."""
    current = _session.get()
    if current is not None:
        current.notes.append(text)


def source_line(node: fx.Node) -> str:
    """The line of the model's source that the node came from ("file.py:12"), or ""."""
    trace = node.meta.get("stack_trace") or ""
    frames = [line.strip() for line in trace.splitlines() if line.strip().startswith("File ")]
    if not frames:
        return ""
    file, line = frames[-1].split(",")[:2]
    return f"{file.removeprefix('File ').strip(chr(34))}:{line.strip().removeprefix('line ')}"


class Rewrite:
    """One rewrite under construction; see `rewriting`. permitted: whether it is within the limit."""

    def __init__(self, graph_module: fx.GraphModule, anchor: fx.Node, provenance: Provenance, permitted: bool) -> None:
        self.graph_module = graph_module
        self.anchor = anchor
        self.provenance = provenance
        self.applied = 0
        self.permitted = permitted
        self._same_layout = True
        self._new: list[fx.Node] = []
        self._pairs: list[tuple[fx.Node, fx.Node]] = []

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """A new node before the anchor, with its fake value."""
        return self._call_before(self.anchor, target, args, kwargs)

    def call_last(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """A new node behind all others: where a graph writes into its inputs."""
        return self._call_before(self.graph_module.graph.output_node(), target, args, kwargs)

    def _call_before(
        self, place: fx.Node, target: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> fx.Node:
        fx.map_arg((args, kwargs), lambda source: self._check_source(source, place))
        with self.graph_module.graph.inserting_before(place):
            node = self.graph_module.graph.call_function(target, args, kwargs)
        node.meta["val"] = evaluate(self.graph_module, node)
        self._adopt(node)
        return node

    def _check_source(self, source: fx.Node, place: fx.Node) -> None:
        name = self.provenance.pass_name
        if source.graph is not self.graph_module.graph:
            raise PassError(f"{name}: %{source.name} is a node of another graph")
        if not source < place:
            raise PassError(f"{name}: %{source.name} is computed only after %{place.name}, before which it is wanted")

    def inline(
        self, function: Callable[..., Any], *args: Any, decompositions: dict[Any, Any] | None = None, **kwargs: Any
    ) -> Any:
        """The ATen graph of `function(*args, **kwargs)` copied before the anchor; returns its output node or nodes.

        Nodes may stand anywhere in the arguments; the function is traced on their fake values.
        """
        nodes: dict[fx.Node, None] = {}
        fx.map_arg((args, kwargs), lambda node: nodes.setdefault(node))
        return self.paste(self.trace(function, *args, decompositions=decompositions, **kwargs), list(nodes))

    def trace(
        self, function: Callable[..., Any], *args: Any, decompositions: dict[Any, Any] | None = None, **kwargs: Any
    ) -> fx.GraphModule:
        """The ATen graph of `function(*args, **kwargs)`, for `paste`; one placeholder for each node given."""
        with _compat.fake_execution(self.graph_module):
            return trace_call(function, args, kwargs, decompositions or {})[0]

    def paste(self, traced: fx.GraphModule, nodes: Sequence[fx.Node]) -> Any:
        """A traced graph copied before the anchor, `nodes` standing for its placeholders; returns its output."""
        placeholders = [node for node in traced.graph.nodes if node.op == "placeholder"]
        environment: dict[fx.Node, fx.Node] = dict(zip(placeholders, nodes, strict=True))
        with self.graph_module.graph.inserting_before(self.anchor):
            for node in traced.graph.nodes:
                if node.op == "get_attr":
                    environment[node] = self.constant(getattr(traced, node.target))
                elif node.op == "call_function":
                    copy = self.graph_module.graph.node_copy(node, lambda source: environment[source])
                    self._adopt(copy)
                    environment[node] = copy
        return fx.map_arg(traced.graph.output_node().args[0], lambda source: environment[source])

    def like(self, new: fx.Node, old: fx.Node) -> fx.Node:
        """`new`, or a copy of it that lies in memory as `old` does, so that it may replace `old`."""
        mine, wanted = new.meta["val"], old.meta["val"]
        if not isinstance(mine, torch.Tensor) or not shapes.difference(wanted, mine).startswith("stride"):
            return new
        order = shapes.memory_order(wanted)
        if order == list(range(len(order))):
            return self.call(aten.clone.default, new, **_DENSE)
        dense = self.call(aten.clone.default, self.call(aten.permute.default, new, order), **_DENSE)
        return self.call(aten.permute.default, dense, [order.index(dim) for dim in range(len(order))])

    def constant(self, value: torch.Tensor | Callable[[], torch.Tensor]) -> fx.Node:
        """A new node that holds a tensor known now. It is shared by all calls: never let it become an output.

        value: the tensor, or a function that makes it: what a pass computes itself is fake, passes run while a model
        is traced.
        """
        if not isinstance(value, torch.Tensor) and callable(value):
            with _compat.without_modes():
                value = value()
        if not isinstance(value, torch.Tensor) or _compat.is_fake(value):
            what = "a tensor without numbers, made while tracing" if isinstance(value, torch.Tensor) else repr(value)
            raise PassError(
                f"{self.provenance.pass_name}: constant() needs a tensor that is known now, got {what};"
                " give a function that makes it: constant(lambda: torch.ones(8))"
            )
        name = f"_graphopt_constant{sum(1 for _ in self.graph_module.named_buffers())}"
        self.graph_module.register_buffer(name, value)
        with self.graph_module.graph.inserting_before(self.anchor):
            node = self.graph_module.graph.get_attr(name)
        node.meta["val"] = _compat.fake_value(self.graph_module, value)
        self._adopt(node)
        return node

    def replace(self, old: fx.Node, new: fx.Node | Sequence[fx.Node], *, same_layout: bool = True) -> None:
        """Let all users of `old` use `new`. Shape, dtype and strides must be the same.

        A node with several results may be replaced by a sequence of nodes. same_layout=False permits other strides;
        the pass then answers for the values of all nodes that depend on them.
        """
        self._same_layout &= same_layout
        if isinstance(new, fx.Node):
            self._pair(old, new)
            return
        if not isinstance(new, (list, tuple)):
            raise PassError(f"{self.provenance.pass_name}: %{old.name} must be replaced by a node, got {new!r}")
        for user in list(old.users):
            if user.target is not operator.getitem:
                raise PassError(f"{old.name} has several results but {user.name} uses it as one value")
            self._pair(user, new[cast(int, user.args[1])])

    def _pair(self, old: fx.Node, new: fx.Node) -> None:
        if new.graph is not self.graph_module.graph:
            raise PassError(f"{self.provenance.pass_name}: %{new.name} is a node of another graph")
        if self.permitted:
            difference = shapes.difference(old.meta.get("val"), new.meta.get("val"))
            if difference and (self._same_layout or not difference.startswith("stride")):
                name = self.provenance.pass_name
                raise PassError(f"{name} replaces {old.name} by {new.name} of another {difference}")
        self._pairs.append((old, new))

    def _adopt(self, node: fx.Node) -> None:
        node.meta["graphopt"] = self.provenance
        for key in ("stack_trace", "nn_module_stack", "seq_nr"):
            if key in self.anchor.meta:
                node.meta.setdefault(key, self.anchor.meta[key])
        self._new.append(node)

    def _finish(self, current: Session | None) -> None:
        if not self.permitted or not self._pairs:
            self._discard()
            return
        sources = tuple(old.name for old, _ in self._pairs)
        provenance = dataclasses.replace(self.provenance, sources=sources)
        for node in self._new:
            node.meta["graphopt"] = provenance
        if current is not None:
            current.rewrites += 1
            if current.observer is not None:
                current.observer(
                    Application(
                        self.graph_module, provenance, current.exactness, tuple(self._pairs), self._same_layout
                    )
                )
        for old, new in self._pairs:
            # The new node may itself read the old one (a pass that adds a step behind it).
            old.replace_all_uses_with(new, delete_user_cb=lambda user: user not in self._new)
        self.applied = 1

    def _discard(self) -> None:
        for node in reversed(self._new):
            if not node.users:
                self.graph_module.graph.erase_node(node)


@contextlib.contextmanager
def rewriting(graph_module: fx.GraphModule, anchor: fx.Node) -> Iterator[Rewrite]:
    """Build one rewrite; new nodes stand before `anchor`. At the end of the block it is applied as a whole.

    Past the session's limit (`Options.limit`) the block runs but changes nothing, and `applied` stays 0.
    """
    current = _session.get()
    number = current.rewrites + 1 if current else 0
    permitted = current is None or current.permits()
    provenance = Provenance(current.pass_name if current else "by hand", number, ())
    rewrite = Rewrite(graph_module, anchor, provenance, permitted)
    try:
        yield rewrite
    except BaseException:
        rewrite._discard()
        raise
    rewrite._finish(current)


def evaluate(graph_module: fx.GraphModule, node: fx.Node) -> Any:
    """The fake value of a node, from its arguments' fake values."""
    with _compat.fake_execution(graph_module):
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda argument: argument.meta["val"])
        assert callable(node.target)
        return node.target(*args, **kwargs)


def trace_call(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], decompositions: dict[Any, Any]
) -> tuple[fx.GraphModule, list[fx.Node]]:
    """The graph of `function(*args, **kwargs)`, and the nodes among the arguments in the order of its placeholders."""
    nodes: dict[fx.Node, None] = {}
    fx.map_arg((args, kwargs), lambda node: nodes.setdefault(node))

    def call(*values: Any) -> Any:
        given = dict(zip(nodes, values, strict=True))
        actual_args, actual_kwargs = fx.map_arg((args, kwargs), lambda node: given[node])
        return function(*actual_args, **actual_kwargs)

    traced = _compat.trace(call, [node.meta["val"] for node in nodes], decompositions)
    return traced, list(nodes)


def eliminate_dead_code(graph_module: fx.GraphModule) -> None:
    """Erase unused nodes. Mutation and random numbers stay: a dropped draw would shift the generator's state."""
    graph_module.graph.eliminate_dead_code(is_impure_node=is_impure)


def erase_unused(node: fx.Node) -> None:
    """Erase a pure node that nothing uses, and what then is unused; does nothing to one that was erased before."""
    waiting = [node]
    while waiting:
        node = waiting.pop()
        if not node.users and not node._erased and node.op in ("call_function", "get_attr") and not is_impure(node):
            waiting += node.all_input_nodes
            node.graph.erase_node(node)


def is_impure(node: fx.Node) -> bool:
    """Whether a node must stay even if nothing uses it."""
    if node.op in ("placeholder", "output"):
        return True
    if node.op == "call_module" and isinstance(region := _module_of(node), fx.GraphModule):
        return any(is_impure(step) for step in region.graph.nodes if step.op not in ("placeholder", "output"))
    if isinstance(node.target, torch._ops.OpOverload):
        seeded = torch.Tag.nondeterministic_seeded in node.target.tags
        if seeded and not _never_drops(node):
            return True
        return node.target._schema.is_mutable or bool(node.is_impure(impure_random=False))
    return bool(node.is_impure())


def _module_of(node: fx.Node) -> torch.nn.Module | None:
    owner = node.graph.owning_module
    return owner.get_submodule(str(node.target)) if owner is not None else None


def _never_drops(node: fx.Node) -> bool:
    """Whether the only random thing about an operation is a dropout (of attention) that is switched off."""
    assert isinstance(node.target, torch._ops.OpOverload)
    for position, argument in enumerate(node.target._schema.arguments):
        if argument.name == "dropout_p":
            given = node.args[position] if position < len(node.args) else None
            return bool(node.kwargs.get("dropout_p", argument.default_value if given is None else given) == 0.0)
    return False
