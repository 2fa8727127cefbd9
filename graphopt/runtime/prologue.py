"""Work done at call time before the compiled graph runs: KV reservations and packed weights.

Some operations of a graph must not run inside the compiled code on every call: reserving room in a cache hands out a
view of memory that lives longer than the call, and packing a weight is done once until the weight changes. Passes
write such operations as ordinary nodes; `hoist` moves them, when all they read are inputs of the graph, into a
`Prologue`, and the graph receives their results as inputs instead. What is done after the graph, to results that are
not plain tensors, goes the same way into an `Epilogue`.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import sympy
import torch
from torch import fx
from torch.utils._pytree import tree_leaves

from graphopt import _compat, edit, shapes
from graphopt.runtime import packs, pages
from graphopt.runtime.epilogue import Epilogue, is_after_call, sink

_ARITHMETIC: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (operator.add, operator.sub, operator.mul, operator.floordiv, operator.getitem)
}
_INTEGERS = tuple(function for function in _ARITHMETIC.values() if function is not operator.getitem)
_call_time: dict[str, Callable[..., Any]] = {}
_together: dict[str, Callable[[list[tuple[Any, ...]]], list[Any]]] = {}
_packing: set[str] = set()


def call_time(
    op: torch._ops.OpOverload,
    *,
    packs_weights: bool = False,
    together: Callable[[list[tuple[Any, ...]]], list[Any]] | None = None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Declare a function to be how `op` runs at call time; `hoist` moves nodes of `op` out of graphs.

    packs_weights: the function is under `packs.packed`, so that its result is the same while its tensors are.
    together: does many calls at once, given the positional arguments of each.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        _call_time[str(op)] = function
        if together is not None:
            _together[str(op)] = together
        if packs_weights:
            _packing.add(str(op))
        return function

    return register


@dataclasses.dataclass(frozen=True)
class Input:
    """The value number `index`: an input of the call, or, beyond those, the result of an earlier step."""

    index: int


@dataclasses.dataclass(frozen=True)
class Step:
    """One call at call time: the name of a registered operation or of integer arithmetic, and its arguments."""

    function: str
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...] = ()


@dataclasses.dataclass(frozen=True)
class _Run:
    """Steps that are done together: their numbers, their function, and their arguments out of all values of a call."""

    numbers: tuple[int, ...]
    function: str
    arguments: Callable[[list[Any]], list[tuple[Any, ...]]]


@dataclasses.dataclass(frozen=True)
class _Packing:
    """The numbers of the steps that pack weights, those weights out of the values of a call, and in runs of steps that
    are done together all other steps, and all."""

    steps: frozenset[int]
    weights: Callable[[list[Any]], list[Any]]
    others: tuple[_Run, ...]
    all: tuple[_Run, ...]


@dataclasses.dataclass(frozen=True)
class Prologue:
    """Steps from the inputs of a call to the inputs of the compiled graph; plain data, so that it can be stored.

    A model has hundreds of packed weights: their results are kept as a whole and looked up one by one only when any of
    the weights has changed.
    """

    steps: tuple[Step, ...]
    results: tuple[int, ...]
    epilogue: Epilogue | None = None

    def around(self, compiled: Callable[[list[Any]], Any]) -> Callable[[list[Any]], Any]:
        """A boxed callable: the compiled graph with the work before it and, if there is any, that after it."""
        epilogue = self.epilogue
        if epilogue is None:
            return lambda inputs: compiled(self(inputs))

        def call(inputs: list[Any]) -> list[Any]:
            values = self._values(inputs)
            return epilogue(values, compiled(self._results(values)))

        return call

    def __call__(self, inputs: list[Any]) -> list[Any]:
        """The compiled graph's inputs. Empties `inputs`, as boxed callables do."""
        return self._results(self._values(inputs))

    def _values(self, inputs: list[Any]) -> list[Any]:
        values = list(inputs)
        inputs.clear()
        count = len(values)
        packing = self._packing(count)
        weights = packing.weights(values)
        kept = self._kept.get("packs")
        current = kept is not None and kept[0].holds(weights)
        values += kept[1] if kept is not None and current else [None] * len(self.steps)
        for run in packing.others if current else packing.all:
            if len(run.numbers) > 1:
                for number, result in zip(run.numbers, _together[run.function](run.arguments(values)), strict=True):
                    values[count + number] = result
            else:
                step = self.steps[run.numbers[0]]
                args = (_resolve(argument, values) for argument in step.args)
                kwargs = {name: _resolve(argument, values) for name, argument in step.kwargs}
                values[count + run.numbers[0]] = _function_of(step)(*args, **kwargs)
        if packing.steps and not current:
            results = [values[count + number] if number in packing.steps else None for number in range(len(self.steps))]
            pages.enlarge(tree_leaves(results))
            self._kept["packs"] = packs.Snapshot(weights, self._kept.clear), results
        return values

    def __getstate__(self) -> dict[str, Any]:
        return {"steps": self.steps, "results": self.results, "epilogue": self.epilogue}

    @functools.cached_property
    def _kept(self) -> dict[str, tuple[packs.Snapshot, list[Any]]]:
        """What packing steps gave, by the number of the step, and the weights it was made from as they were."""
        return {}

    @functools.cached_property
    def _results(self) -> Callable[[list[Any]], list[Any]]:
        return _taking(self.results)

    def _packing(self, count: int) -> _Packing:
        """Which steps pack weights, in a call with `count` inputs."""
        found: _Packing | None = self.__dict__.get("_packing_steps")
        if found is None:
            steps: set[int] = set()
            weights: dict[int, None] = {}
            for number, step in enumerate(self.steps):
                read = list(_inputs_of((step.args, tuple(value for _, value in step.kwargs))))
                packs_only = all(index < count or index - count in steps for index in read)
                if packs_only and (step.function in _packing or (read[0] >= count if read else False)):
                    steps.add(number)
                    weights.update(dict.fromkeys(index for index in read if index < count))
            every = range(len(self.steps))
            others = self._runs([number for number in every if number not in steps], count)
            found = _Packing(frozenset(steps), _taking(tuple(weights)), others, self._runs(every, count))
            self.__dict__["_packing_steps"] = found
        return found

    def _runs(self, numbers: Sequence[int], count: int) -> tuple[_Run, ...]:
        """The steps in their order, with those in one run that follow each other and can be done together."""
        runs: list[list[int]] = []
        function = ""  # that the steps of the last run share, if there can be more of them
        for number in numbers:
            step = self.steps[number]
            alone = step.kwargs or step.function not in _together
            reads = max(_inputs_of(step.args), default=-1)
            if step.function == function and not alone and reads < count + runs[-1][0]:
                runs[-1].append(number)
            else:
                runs.append([number])
            function = "" if alone else step.function
        return tuple(
            _Run(tuple(run), self.steps[run[0]].function, _arguments([self.steps[number].args for number in run]))
            for run in runs
        )


def _taking(positions: Sequence[int]) -> Callable[[list[Any]], list[Any]]:
    """A function that takes these out of a list: for hundreds of them the loop must not be one of Python."""
    if len(positions) < 2:
        return lambda values: [values[position] for position in positions]
    take = operator.itemgetter(*positions)
    return lambda values: list(take(values))


def _arguments(steps: Sequence[tuple[Any, ...]]) -> Callable[[list[Any]], list[tuple[Any, ...]]]:
    """A function from all values of a call to the arguments of each step."""

    def column(arguments: tuple[Any, ...]) -> Callable[[list[Any]], Sequence[Any]]:
        if all(isinstance(argument, Input) for argument in arguments):
            return _taking([argument.index for argument in arguments])
        if not any(isinstance(argument, (Input, tuple)) for argument in arguments):
            return lambda values: arguments
        return lambda values: [_resolve(argument, values) for argument in arguments]

    if len({len(arguments) for arguments in steps}) > 1:
        return lambda values: [tuple(_resolve(argument, values) for argument in arguments) for arguments in steps]
    columns = [column(arguments) for arguments in zip(*steps, strict=True)]
    return lambda values: list(zip(*(of(values) for of in columns), strict=True))


def _function_of(step: Step) -> Callable[..., Any]:
    return _call_time.get(step.function) or _ARITHMETIC[step.function]


def _inputs_of(argument: Any) -> Iterator[int]:
    if isinstance(argument, Input):
        yield argument.index
    elif isinstance(argument, tuple):
        for item in argument:
            yield from _inputs_of(item)


def _resolve(argument: Any, values: list[Any]) -> Any:
    if isinstance(argument, Input):
        return values[argument.index]
    if isinstance(argument, tuple):
        return [_resolve(item, values) for item in argument]
    return argument


def hoist(
    graph_module: fx.GraphModule, inputs: Sequence[Any], *, packs_only: bool = False
) -> tuple[Prologue | None, list[Any]]:
    """Move call-time operations out of the graph, in place. Returns the prologue, if any, and the graph's new inputs.

    inputs: the fake inputs of the graph. A call-time operation that reads something computed inside the graph stays
    where it is and runs there. packs_only: move those that pack weights, and nothing else.
    """
    moved = _packing if packs_only else _call_time.keys()
    placeholders = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    index = {node: position for position, node in enumerate(placeholders)}
    read = _read_at_call_time(graph_module)
    steps: list[Step] = []
    hoisted: list[fx.Node] = []
    for node in graph_module.graph.nodes:
        if _may_hoist(node, index, hoisted, moved) and (node in read or node.target not in _INTEGERS):
            function = str(node.target) if str(node.target) in _call_time else node.target.__name__
            kwargs = tuple((key, _frozen(node.kwargs[key], index)) for key in sorted(node.kwargs))
            steps.append(Step(function, _frozen(node.args, index), kwargs))
            index[node] = len(index)
            if str(node.target) in _call_time or node.target is operator.getitem:
                hoisted.append(node)
    epilogue = None if packs_only else sink(graph_module, index)
    if not hoisted and epilogue is None:
        return None, list(inputs)
    results = list(range(len(placeholders)))
    new_inputs = list(inputs)
    anchor = next(node for node in graph_module.graph.nodes if node.op != "placeholder")
    for number, node in enumerate(hoisted):
        if not any(user not in hoisted for user in node.users):
            continue
        with graph_module.graph.inserting_before(anchor):
            placeholder = graph_module.graph.placeholder(f"prologue_{number}")
        placeholder.meta.update(node.meta, role="prologue")
        node.replace_all_uses_with(placeholder)
        results.append(index[node])
        new_inputs.append(node.meta["val"])
    for node in reversed(hoisted):
        # Erased here and not as dead code: reserving memory twice is not the same as once, so its nodes are impure.
        if not node.users:
            graph_module.graph.erase_node(node)
    edit.eliminate_dead_code(graph_module)
    unread = [node for node in placeholders if not node.users]
    for node in reversed(_dispensable(unread, new_inputs)):
        graph_module.graph.erase_node(node)
        position = placeholders.index(node)
        del results[position], new_inputs[position]
    return Prologue(tuple(steps), tuple(results), epilogue), new_inputs


def _dispensable(unread: Sequence[fx.Node], inputs: Sequence[Any]) -> list[fx.Node]:
    """Those of the unread inputs that can go: a compiler takes the symbols in all sizes from inputs."""
    told = [symbol for value in inputs for symbol in _symbols_told(value)]
    dispensable = []
    for node in unread:
        symbols = _symbols_told(node.meta.get("val"))
        if not isinstance(node.meta.get("val"), torch.SymInt) and all(told.count(symbol) > 1 for symbol in symbols):
            dispensable.append(node)
            for symbol in symbols:
                told.remove(symbol)
    return dispensable


def _symbols_told(value: Any) -> set[sympy.Expr]:
    """The symbols that are a size or stride of a value by themselves, or the value itself."""
    if isinstance(value, torch.SymInt):
        return {_compat.placeholder_expression(value)}
    sizes = (*value.shape, *value.stride()) if isinstance(value, torch.Tensor) else ()
    expressions = (shapes.expression(size) for size in sizes if isinstance(size, torch.SymInt))
    return {expression for expression in expressions if expression.is_symbol}


def _read_at_call_time(graph_module: fx.GraphModule) -> set[fx.Node]:
    """What operations at call time are computed from; other integer arithmetic need not be done twice."""
    read: set[fx.Node] = set()
    for node in reversed(graph_module.graph.nodes):
        if node in read or str(node.target) in _call_time or is_after_call(node):
            read.update(node.all_input_nodes)
    return read


def _may_hoist(node: fx.Node, index: dict[fx.Node, int], hoisted: Sequence[fx.Node], moved: Collection[str]) -> bool:
    if node.op != "call_function" or any(argument not in index for argument in node.all_input_nodes):
        return False
    if str(node.target) in moved:
        return True
    if node.target is operator.getitem:
        return node.args[0] in hoisted
    return node.target in _INTEGERS and isinstance(node.meta.get("val"), (int, torch.SymInt))


def _frozen(argument: Any, index: dict[fx.Node, int]) -> Any:
    """The argument as plain data: nodes by the position of their value, lists as tuples."""
    if isinstance(argument, fx.Node):
        return Input(index[argument])
    return tuple(_frozen(item, index) for item in argument) if isinstance(argument, (list, tuple)) else argument
