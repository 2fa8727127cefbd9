"""Chains: in a decode step, linears and what lies between them as one call of `torch.ops.graphopt_cpp.chain`.

Between two attentions a decoder computes o_proj, residual, norm, gate and up, their product, down, residual, norm and
qkv: on a few rows each takes microseconds, and so do a call from Python, waking threads and filling buffers. A chain is
one call and one parallel region, whose threads wait for each other only behind linears. Every step rounds to the dtype
of the rows, as eager's tensors do. The text of the steps is explained in src/chain_op.h.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from graphopt import edit, ops
from graphopt.backends.cpp.operands import DTYPES
from graphopt.lowering import Choice, arguments

aten = torch.ops.aten
ROWS = 16
"""The most rows that the kernels take as a decode step (src/kernels.h)."""

Word = fx.Node | float | None
"""An operand of a step: rows or a weight, a number, or nothing."""


@dataclasses.dataclass(frozen=True)
class Step:
    """A node as a step: its name (of a linear: "linear SCHEME"), rows, and what follows them in the text.

    For a linear `weights` has the tensors of each weight and its bias.
    """

    name: str
    x: fx.Node
    words: tuple[Word, ...] = ()
    weights: tuple[tuple[tuple[fx.Node, ...], fx.Node | None], ...] = ()

    @property
    def is_linear(self) -> bool:
        return bool(self.weights)


def form(graph_module: fx.GraphModule) -> list[Choice]:
    """Make a chain of each run of steps on the same few rows, as long as one follows the other. In place.

    The steps move down to the last of them; a chain ends before the first other node that reads one of them, and before
    any that writes into its arguments.
    """
    chains: list[Choice] = []
    chain = _Chain()
    for node in list(graph_module.graph.nodes):
        if chain.takes(node):
            continue
        if chain.is_read_by(node) or _writes(node) or node.op == "output":
            chains += chain.emit(graph_module, node)
            chain = _Chain()
            chain.takes(node)
    return chains


class _Chain:
    """Steps on rows of one leading shape and dtype, each with its node. picks: of results of those that have several,
    wherever they stand."""

    def __init__(self) -> None:
        self.steps: dict[fx.Node, Step] = {}
        self.picks: dict[fx.Node, None] = {}

    def takes(self, node: fx.Node) -> bool:
        """Add a node, if it is a step that belongs here."""
        if node in self.picks:
            return True
        step = step_of(node)
        if step is None or not self._belongs(node, step):
            return False
        self.steps[node] = step
        self.picks |= dict.fromkeys(user for user in node.users if user.target is operator.getitem)
        return True

    def _belongs(self, node: fx.Node, step: Step) -> bool:
        if self.steps:
            first = next(iter(self.steps.values())).x.meta["val"]
            x = step.x.meta["val"]
            if x.shape[:-1] != first.shape[:-1] or x.dtype != first.dtype:
                return False
        reads = [word for word in (step.x, *step.words) if isinstance(word, fx.Node)]
        return step.is_linear or any(self._has(node) for node in reads) or _feeds_a_linear(node)

    def _has(self, node: fx.Node) -> bool:
        return node in self.steps or node in self.picks

    def is_read_by(self, node: fx.Node) -> bool:
        return any(self._has(source) for source in node.all_input_nodes)

    def emit(self, graph_module: fx.GraphModule, anchor: fx.Node) -> list[Choice]:
        """One call before the anchor for all steps, if there is something to gain."""
        if len(self.steps) < 2 or not any(step.is_linear for step in self.steps.values()):
            return []
        text = _Text(self.steps)
        values = {pick: text.value(pick) for pick in (*self.steps, *self.picks) if isinstance(pick.meta["val"], Tensor)}
        shown = [node for node in values if any(not self._has(user) for user in node.users)]
        steps = "; ".join([*text.lines, "out " + " ".join(values[node] for node in shown)])
        with edit.rewriting(graph_module, anchor) as rewrite:
            made = rewrite.call(torch.ops.graphopt_cpp.chain.default, text.inputs, text.weights, steps)
            for place, node in enumerate(shown):
                rewrite.replace(node, rewrite.call(operator.getitem, made, place))
        if not rewrite.applied:
            return []
        for node in sorted((*self.steps, *self.picks), reverse=True):
            graph_module.graph.erase_node(node)
        return [Choice(made.name, steps, "cpp.chain")]


class _Text:
    """The steps as lines, with the inputs and weights that their words number."""

    def __init__(self, steps: dict[fx.Node, Step]) -> None:
        made = set(steps)
        reads = [word for step in steps.values() for word in (step.x, *step.words) if isinstance(word, fx.Node)]
        self.inputs = list(dict.fromkeys(node for node in reads if _maker(node) not in made and _is_rows(node)))
        self.weights: list[fx.Node] = []
        self._values = {node: number for number, node in enumerate(self.inputs)}
        self.lines = []
        count = len(self.inputs)
        for node, step in steps.items():
            self.lines.append(self._line(step))
            self._values[node] = count
            count += max(1, len(step.weights))

    def value(self, node: fx.Node) -> str:
        """The word of rows: an input, or a result of a step."""
        if node in self._values:
            return f"v{self._values[node]}"
        maker, place = node.args
        assert isinstance(maker, fx.Node) and isinstance(place, int)
        return f"v{self._values[maker] + place}"

    def _line(self, step: Step) -> str:
        words = [self._word(word) for word in step.words]
        for parts, bias in step.weights:
            words += [self._weight(parts), "-" if bias is None else self._weight((bias,))]
        return " ".join([step.name, self.value(step.x), *words])

    def _word(self, word: Word) -> str:
        if word is None:
            return "-"
        if not isinstance(word, fx.Node):
            return repr(float(word))
        return self.value(word) if _is_rows(word) else self._weight((word,))

    def _weight(self, parts: tuple[fx.Node, ...]) -> str:
        self.weights += parts
        return f"w{len(self.weights) - len(parts)}"


def step_of(node: fx.Node) -> Step | None:
    """The node as a step of a chain, or None."""
    make = _makers().get(node.target)
    step = make(node) if make else None
    if step is None or not _is_rows(step.x):
        return None
    x = step.x.meta["val"]
    operands = [word.meta["val"] for word in step.words if isinstance(word, fx.Node)]
    results = _results(node)
    if not all(isinstance(value, Tensor) and value.is_contiguous() for value in [*operands, *results]):
        return None
    fits = all(value.dtype == x.dtype and value.shape in (x.shape, x.shape[-1:]) for value in operands)
    return step if fits and all(value.shape[-1] > 0 for value in results) else None


def _results(node: fx.Node) -> list[Any]:
    """The values that a node gives as a step."""
    value = node.meta["val"]
    if isinstance(value, Tensor):
        return [value]
    return list(value[:1]) if node.target is aten.native_layer_norm.default else list(value)


def _linear(node: fx.Node) -> Step | None:
    given = arguments(node)
    weights = given["weights"] if "weights" in given else [given["weight"]]
    biases = given["biases"] if "biases" in given else [given["bias"]]
    dense = all(bias is None or bias.meta["val"].is_contiguous() for bias in biases)
    if not dense or not all(_has_rows_apart(weight.meta["val"]) for weight in weights):
        return None
    return Step("linear plain", given["x"], weights=tuple(((w,), b) for w, b in zip(weights, biases, strict=True)))


def _has_rows_apart(weight: Tensor) -> bool:
    """Not those of an expanded or overlapping weight, which torch multiplies."""
    return weight.is_contiguous() or bool(weight.stride(1) == 1 and weight.stride(0) >= weight.shape[1])


def _quantized_linear(node: fx.Node) -> Step:
    given = arguments(node)
    packed, biases = given["packed"], given["biases"] if "biases" in given else [given["bias"]]
    count = len(packed) // len(biases)
    weights = [(tuple(packed[i * count : (i + 1) * count]), bias) for i, bias in enumerate(biases)]
    return Step(f"linear {given['scheme']}", given["x"], weights=tuple(weights))


def _binary(name: str) -> Callable[[fx.Node], Step | None]:
    def make(node: fx.Node) -> Step | None:
        given = arguments(node)
        a, b = given["self"], given["other"]
        if given.get("alpha", 1) != 1:
            return None
        if isinstance(b, fx.Node) and isinstance(a, fx.Node):
            a, b = (a, b) if _is_rows(a) else (b, a)
        known = isinstance(a, fx.Node) and (isinstance(b, fx.Node) or isinstance(b, (int, float)))
        return Step(name, a, (b,)) if known else None

    return make


def _unary(name: str) -> Callable[[fx.Node], Step]:
    return lambda node: Step(name, arguments(node)["self"])


def _gelu(node: fx.Node) -> Step:
    given = arguments(node)
    return Step("gelu_tanh" if given["approximate"] == "tanh" else "gelu", given["self"])


def _power(node: fx.Node) -> Step | None:
    given = arguments(node)
    return Step("cube", given["self"]) if given["exponent"] == 3 else None


def _rms_norm(node: fx.Node) -> Step:
    given = arguments(node)
    words = (given["weight"], given["eps"], given["weight_offset"], given["cast_first"])
    return Step("rms_norm", given["x"], words)


def _layer_norm(node: fx.Node) -> Step | None:
    given = arguments(node)
    if len(given["normalized_shape"]) != 1 or any(user.args[1] != 0 for user in node.users):
        return None
    return Step("layer_norm", given["input"], (given["weight"], given["bias"], given["eps"]))


@functools.cache
def _makers() -> dict[Any, Callable[[fx.Node], Step | None]]:
    kernels = torch.ops.graphopt_cpp
    return {
        kernels.linear.default: _linear,
        kernels.parallel_linear.default: _linear,
        kernels.quantized_linear.default: _quantized_linear,
        kernels.parallel_quantized_linear.default: _quantized_linear,
        ops.rms_norm: _rms_norm,
        aten.native_layer_norm.default: _layer_norm,
        aten.add.Tensor: _binary("add"),
        aten.mul.Tensor: _binary("mul"),
        aten.pow.Tensor_Scalar: _power,
        aten.relu.default: _unary("relu"),
        aten.tanh.default: _unary("tanh"),
        aten.silu.default: _unary("silu"),
        aten.gelu.default: _gelu,
    }


def _is_rows(node: fx.Node) -> bool:
    """Whether the node's value is a few rows, of sizes known now."""
    value = node.meta["val"]
    if not isinstance(value, Tensor) or value.dim() < 2 or value.dtype not in DTYPES or value.device.type != "cpu":
        return False
    known = value.layout == torch.strided and all(isinstance(size, int) for size in value.shape)
    return known and 0 < math.prod(value.shape[:-1]) <= ROWS and value.shape[-1] > 0


def _maker(node: fx.Node) -> object:
    return node.args[0] if node.target is operator.getitem else node


def _feeds_a_linear(node: fx.Node) -> bool:
    """Whether a linear takes this node's first result as its rows."""
    readers = [reader for user in node.users for reader in (user.users if user.target is operator.getitem else (user,))]
    steps = map(step_of, readers)
    return any(step is not None and step.is_linear and _maker(step.x) is node for step in steps)


def _writes(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
