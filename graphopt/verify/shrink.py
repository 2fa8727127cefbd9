"""Make a failing before/after pair small: fewer outputs, fewer nodes, smaller sizes, simpler values.

Each step is kept only if the pair still fails (delta debugging; Zeller and Hildebrandt, 2002). A size is shrunk by
replacing a number wherever it occurs, in the sizes of inputs and in the arguments of nodes, and running again.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx

from graphopt.verify import execution
from graphopt.verify.cut import Pair, writes
from graphopt.verify.inputs import InputSet
from graphopt.verify.judge import Difference

Compare = Callable[[Pair, list[Any]], Difference | None]
_MOST_TRIALS = 300


@dataclasses.dataclass
class _Case:
    pair: Pair
    values: list[Any]
    found: Difference


class _Shrinker:
    def __init__(self, case: _Case, compare: Compare) -> None:
        self.case = case
        self._compare = compare
        self._trials = 0

    def keeps(self, pair: Pair, values: list[Any]) -> bool:
        """Whether the smaller case fails too, and only in ways in which the case before failed; it then replaces that.

        Otherwise a lost NaN might end as a rounding error somewhere else, and the reader mend the wrong thing
        ("slippage" of test case reduction).
        """
        self._trials += 1
        if self._trials > _MOST_TRIALS:
            return False
        try:
            found = self._compare(pair, values)
        except Exception:
            return False
        if found is None or not found.kinds <= self.case.found.kinds:
            return False
        self.case = _Case(pair, values, found)
        return True


def shrink(pair: Pair, given: InputSet, found: Difference, compare: Compare) -> tuple[Pair, InputSet, Difference]:
    """A smaller pair and inputs that fail in the same way, and what differs there."""
    shrinker = _Shrinker(_Case(pair, list(given.values), found), compare)
    for step in (_fewer_outputs, _cut_tails, _cut_heads, _smaller_sizes, _simpler_values):
        step(shrinker)
    case = shrinker.case
    for graph in (case.pair.before, case.pair.after):
        _annotate(graph, case.values)
    return case.pair, InputSet(given.kind, given.sizes, case.values), case.found


def _fewer_outputs(shrinker: _Shrinker) -> None:
    for index in range(len(_outputs(shrinker.case.pair.before))):
        pair = shrinker.case.pair
        if len(pair.exposed) == 1:
            return
        before, after = (_with_outputs(graph, [_outputs(graph)[index]], []) for graph in (pair.before, pair.after))
        smaller = dataclasses.replace(pair, before=before, after=after, exposed=(pair.exposed[index],))
        if shrinker.keeps(*_drop_unused(smaller, shrinker.case.values)):
            return


def _cut_tails(shrinker: _Shrinker) -> None:
    """While both graphs end in the same operation, compare what goes into it instead."""
    while True:
        pair = shrinker.case.pair
        ends = [_outputs(graph) for graph in (pair.before, pair.after)]
        if any(len(end) != 1 for end in ends):
            return
        last, other = ends[0][0], ends[1][0]
        if last.op != "call_function" or last.target is not other.target:
            return
        for source, twin in zip(last.all_input_nodes, other.all_input_nodes, strict=False):
            if source.op != "call_function" or twin.op != "call_function":
                continue
            before = _with_outputs(pair.before, [source], [])
            after = _with_outputs(pair.after, [twin], [])
            smaller = dataclasses.replace(pair, before=before, after=after)
            if shrinker.keeps(*_drop_unused(smaller, shrinker.case.values)):
                break
        else:
            return


def _cut_heads(shrinker: _Shrinker) -> None:
    """Turn what both graphs compute alike into inputs."""
    progress = True
    while progress:
        progress = False
        pair, values = shrinker.case.pair, shrinker.case.values
        common = _common(pair)
        for before_node, after_node in reversed(common):
            made = _evaluate(pair.before, before_node, values)
            if not isinstance(made, torch.Tensor):
                continue
            before = _with_outputs(pair.before, _outputs(pair.before), [before_node])
            after = _with_outputs(pair.after, _outputs(pair.after), [after_node])
            smaller = dataclasses.replace(
                pair, before=before, after=after, exposed_inputs=(*pair.exposed_inputs, False)
            )
            if shrinker.keeps(*_drop_unused(smaller, [*values, made])):
                progress = True
                break


def _smaller_sizes(shrinker: _Shrinker) -> None:
    progress = True
    while progress:
        progress = False
        for size in sorted(_sizes(shrinker.case.values), reverse=True):
            for smaller in (1, 2, 3, size // 2):
                if 0 < smaller < size and _resize(shrinker, size, smaller):
                    progress = True
                    break


def _resize(shrinker: _Shrinker, size: int, smaller: int) -> bool:
    """Replace a size, and multiples of it in the arguments of nodes, everywhere."""
    pair, values = shrinker.case.pair, shrinker.case.values

    def change(number: Any) -> Any:
        if isinstance(number, bool) or not isinstance(number, int) or number < size or size < 2:
            return number
        return number // size * smaller if number % size == 0 else number

    resized: list[Any] = []
    for value in values:
        if not isinstance(value, torch.Tensor):
            resized.append(change(value))
            continue
        kept = value[tuple(slice(0, change(length)) for length in value.shape)]
        dense = value.is_contiguous()
        resized.append(kept.contiguous() if dense else _compact(kept))
    before, after = (_map_numbers(graph, change) for graph in (pair.before, pair.after))
    return shrinker.keeps(dataclasses.replace(pair, before=before, after=after), resized)


def _compact(value: torch.Tensor) -> torch.Tensor:
    """A copy with the strides in the same order and no gaps."""
    order = sorted(range(value.dim()), key=lambda dim: value.stride(dim), reverse=True)
    dense = value.permute(order).contiguous()
    back = [order.index(dim) for dim in range(value.dim())]
    return dense.permute(back)


def _simpler_values(shrinker: _Shrinker) -> None:
    for index in range(len(shrinker.case.values)):
        for simple in _simpler(shrinker.case.values[index]):
            values = list(shrinker.case.values)
            values[index] = simple
            if shrinker.keeps(shrinker.case.pair, values):
                break
    for index in range(len(shrinker.case.values)):
        value = shrinker.case.values[index]
        if not isinstance(value, torch.Tensor) or value.numel() > 64 or 0 in value.stride():
            continue
        for place in range(value.numel()):
            current = shrinker.case.values[index]
            where = _unravel(place, current.shape)
            if current[where].item() == 0:
                continue
            values = list(shrinker.case.values)
            values[index] = execution.copy(current)
            values[index][where] = 0
            shrinker.keeps(shrinker.case.pair, values)


def _simpler(value: Any) -> Iterator[Any]:
    if isinstance(value, torch.Tensor) and 0 not in value.stride():
        for simple in (torch.zeros_like, torch.ones_like):
            yield execution.copy(value).copy_(simple(value))
        if value.dtype.is_floating_point:
            yield execution.copy(value).copy_(value.float().round().to(value.dtype))


def _unravel(place: int, shape: torch.Size) -> tuple[int, ...]:
    index = []
    for length in reversed(shape):
        index.append(place % length)
        place //= length
    return tuple(reversed(index))


def _outputs(graph_module: fx.GraphModule) -> list[fx.Node]:
    return list(graph_module.graph.output_node().args[0])  # type: ignore[arg-type]


def _copied(graph_module: fx.GraphModule) -> tuple[fx.GraphModule, dict[fx.Node, fx.Node]]:
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    for node in graph_module.graph.nodes:
        mapping[node] = graph.node_copy(node, lambda source: mapping[source])
    return fx.GraphModule(graph_module, graph), mapping


def _with_outputs(graph_module: fx.GraphModule, outputs: list[fx.Node], new_inputs: list[fx.Node]) -> fx.GraphModule:
    """A copy with these outputs, in which `new_inputs` are further placeholders."""
    made, mapping = _copied(graph_module)
    graph = made.graph
    for node in new_inputs:
        placeholders = [item for item in graph.nodes if item.op == "placeholder"]
        with graph.inserting_after(placeholders[-1]) if placeholders else graph.inserting_before():
            fresh = graph.placeholder(f"in{len(placeholders)}")
        fresh.meta = {"val": node.meta.get("val"), "source": node.name}
        mapping[node].replace_all_uses_with(fresh)
        mapping[node] = fresh
    graph.output_node().args = (tuple(mapping[node] for node in outputs),)
    graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output") or writes(node))
    made.recompile()
    return made


def _drop_unused(pair: Pair, values: list[Any]) -> tuple[Pair, list[Any]]:
    """The pair without the inputs that neither graph reads."""
    sides = [_copied(graph)[0] for graph in (pair.before, pair.after)]
    placeholders = [[node for node in side.graph.nodes if node.op == "placeholder"] for side in sides]
    used = [bool(old.users) or bool(new.users) for old, new in zip(*placeholders, strict=True)]
    for side, nodes in zip(sides, placeholders, strict=True):
        for node, keep in zip(nodes, used, strict=True):
            if not keep:
                side.graph.erase_node(node)
        side.recompile()
    kept = [value for value, keep in zip(values, used, strict=True) if keep]
    exposed = tuple(item for item, keep in zip(pair.exposed_inputs, used, strict=True) if keep)
    return dataclasses.replace(pair, before=sides[0], after=sides[1], exposed_inputs=exposed), kept


def _common(pair: Pair) -> list[tuple[fx.Node, fx.Node]]:
    """Nodes of both graphs that compute the same, by structure, in order."""
    known: dict[str, fx.Node] = {}
    names: dict[fx.Node, str] = {}

    def name(node: fx.Node) -> str:
        if node.op == "placeholder":
            return node.name
        shown = fx.map_arg((node.args, node.kwargs), lambda source: _Named(names[source]))
        return f"{node.target}{shown}"

    for node in pair.before.graph.nodes:
        if node.op != "output":
            names[node] = name(node)
            known[names[node]] = node
    found = []
    for node in pair.after.graph.nodes:
        if node.op != "output":
            names[node] = name(node)
            twin = known.get(names[node])
            if twin is not None and node.op == "call_function":
                found.append((twin, node))
    return found


def _annotate(graph_module: fx.GraphModule, values: list[Any]) -> None:
    """Put the types of the values that the shrunk graph really computes in the place of the traced ones."""

    class Annotate(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            n.meta["val"] = (
                torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
                if isinstance(value, torch.Tensor)
                else value
            )
            return value

    try:
        Annotate(graph_module).run(*map(execution.copy, values))
    except Exception:
        return  # the failure is that it raises: the types up to that node are right


class _Named(str):
    __repr__ = str.__str__


def _evaluate(graph_module: fx.GraphModule, node: fx.Node, values: list[Any]) -> Any:
    try:
        return execution.run(_with_outputs(graph_module, [node], []), values)[0][0]
    except Exception:
        return None


def _map_numbers(graph_module: fx.GraphModule, change: Callable[[Any], Any]) -> fx.GraphModule:
    made, _ = _copied(graph_module)
    for node in made.graph.nodes:
        if node.op == "call_function":
            node.args = tuple(_changed_lists(item, change) for item in node.args)
    made.recompile()
    return made


def _changed_lists(item: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(item, (list, tuple)):
        return type(item)(_changed_lists(part, change) for part in item)
    return change(item)


def _sizes(values: list[Any]) -> set[int]:
    shapes = [value.shape for value in values if isinstance(value, torch.Tensor)]
    found = {length for shape in shapes for length in shape if length > 1}
    divisors = {math.gcd(a, b) for a in found for b in found}
    return found | {divisor for divisor in divisors if divisor > 1}
