"""Nodes as steps of a chain: what the kernels of src/chain_op.h compute, and of which operands."""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, fx

from graphopt import ops
from graphopt.backends.cpp.operands import DTYPES
from graphopt.lowering import arguments

aten = torch.ops.aten
ROWS = 16
"""The most rows that the kernels take as a decode step (src/kernels.h)."""


@dataclasses.dataclass(frozen=True)
class Operand:
    """Rows ("v"), the tensors of a weight or another that is no rows ("w"), or a room that is written into ("r")."""

    kind: Literal["v", "w", "r"]
    nodes: tuple[fx.Node, ...]


Word = Operand | float | None
"""What follows a step's name: an operand, a number, or nothing."""


@dataclasses.dataclass(frozen=True)
class Step:
    """A node as a step: its name (of a linear: "linear SCHEME"), and what follows it, the rows it is about first."""

    name: str
    words: tuple[Word, ...]

    @property
    def is_linear(self) -> bool:
        return self.name.startswith("linear ")

    @property
    def x(self) -> fx.Node:
        return self.operands("v")[0]

    @property
    def results(self) -> int:
        return len(self.words) // 2 if self.is_linear else 1

    def operands(self, kind: str) -> list[fx.Node]:
        """The nodes of all operands of a kind, in order."""
        return [node for word in self.words if isinstance(word, Operand) and word.kind == kind for node in word.nodes]


def rows(node: fx.Node) -> Operand:
    """An operand of rows."""
    return Operand("v", (node,))


def weight(*nodes: fx.Node) -> Operand:
    """An operand of a weight's tensors."""
    return Operand("w", nodes)


def write(step: Step) -> tuple[list[fx.Node], list[fx.Node], list[fx.Node], str]:
    """The arguments of an operator `chain` for one step."""
    found: dict[str, list[fx.Node]] = {kind: [] for kind in "vwr"}
    line = line_of(step, lambda operand: _numbered(operand, found[operand.kind]))
    return found["v"], found["w"], found["r"], f"{line}; out v{len(found['v'])}"


def line_of(step: Step, spell: Callable[[Operand], str]) -> str:
    """The step as text, with operands as `spell` has them."""
    words = (
        "-" if word is None else spell(word) if isinstance(word, Operand) else repr(float(word)) for word in step.words
    )
    return " ".join([step.name, *words])


def _numbered(operand: Operand, known: list[fx.Node]) -> str:
    known += operand.nodes
    return f"{operand.kind}{len(known) - len(operand.nodes)}"


def step_of(node: fx.Node) -> Step | None:
    """The node as a step of a chain, or None."""
    make = _makers().get(node.target)
    step = make(node) if make else None
    if step is None or not is_rows(step.x):
        return None
    if node.target is torch.ops.graphopt_cpp.chain.default:
        return step
    x = step.x.meta["val"]
    operands = [] if step.is_linear else [node.meta["val"] for node in (*step.operands("v"), *step.operands("w"))]
    results = _results(node)
    if not all(isinstance(value, Tensor) and value.is_contiguous() for value in [*operands, *results]):
        return None
    fits = all(value.dtype == x.dtype and value.shape in (x.shape, x.shape[-1:]) for value in operands)
    return step if fits and all(value.shape[-1] > 0 for value in results) else None


def _one_step(node: fx.Node) -> Step | None:
    """A chain that is one step (`write`)."""
    values, weights, rooms, text = node.args
    assert isinstance(text, str)
    line, _, end = text.partition("; ")
    name, *words = line.split()
    if not end.startswith("out ") or name == "linear":
        return None
    listed: dict[str, Any] = {"v": values, "w": weights, "r": rooms}

    def read(word: str) -> Word:
        if word == "-":
            return None
        kind: Any = word[0]
        return Operand(kind, (listed[kind][int(word[1:])],)) if kind in listed else float(word)

    return Step(name, tuple(map(read, words)))


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
    return _product("plain", given["x"], [(w,) for w in weights], biases)


def _has_rows_apart(weight: Tensor) -> bool:
    """Not those of an expanded or overlapping weight, which torch multiplies."""
    return weight.is_contiguous() or bool(weight.stride(1) == 1 and weight.stride(0) >= weight.shape[1])


def _quantized_linear(node: fx.Node) -> Step:
    given = arguments(node)
    packed, biases = given["packed"], given["biases"] if "biases" in given else [given["bias"]]
    count = len(packed) // len(biases)
    return _product(
        given["scheme"], given["x"], [tuple(packed[i * count :][:count]) for i in range(len(biases))], biases
    )


def _product(scheme: str, x: fx.Node, weights: list[tuple[fx.Node, ...]], biases: list[fx.Node | None]) -> Step:
    pairs = ((weight(*parts), _or_none(bias)) for parts, bias in zip(weights, biases, strict=True))
    return Step(f"linear {scheme}", (rows(x), *(word for pair in pairs for word in pair)))


def _or_none(node: fx.Node | None) -> Operand | None:
    return None if node is None else weight(node)


def _binary(name: str) -> Callable[[fx.Node], Step | None]:
    def make(node: fx.Node) -> Step | None:
        given = arguments(node)
        a, b = given["self"], given["other"]
        if given.get("alpha", 1) != 1:
            return None
        if isinstance(b, fx.Node) and isinstance(a, fx.Node):
            a, b = (a, b) if is_rows(a) else (b, a)
        if not isinstance(a, fx.Node) or not isinstance(b, (fx.Node, int, float)):
            return None
        other = b if not isinstance(b, fx.Node) else rows(b) if is_rows(b) else weight(b)
        return Step(name, (rows(a), other))

    return make


def _unary(name: str) -> Callable[[fx.Node], Step]:
    return lambda node: Step(name, (rows(arguments(node)["self"]),))


def _gelu(node: fx.Node) -> Step:
    given = arguments(node)
    return Step("gelu_tanh" if given["approximate"] == "tanh" else "gelu", (rows(given["self"]),))


def _power(node: fx.Node) -> Step | None:
    given = arguments(node)
    return Step("cube", (rows(given["self"]),)) if given["exponent"] == 3 else None


def _rms_norm(node: fx.Node) -> Step:
    given = arguments(node)
    numbers = (given["eps"], given["weight_offset"], given["cast_first"])
    return Step("rms_norm", (rows(given["x"]), _or_none(given["weight"]), *numbers))


def _layer_norm(node: fx.Node) -> Step | None:
    given = arguments(node)
    if len(given["normalized_shape"]) != 1 or any(user.args[1] != 0 for user in node.users):
        return None
    words = (_or_none(given["weight"]), _or_none(given["bias"]), given["eps"])
    return Step("layer_norm", (rows(given["input"]), *words))


@functools.cache
def _makers() -> dict[Any, Callable[[fx.Node], Step | None]]:
    kernels = torch.ops.graphopt_cpp
    return {
        kernels.chain.default: _one_step,
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


def is_rows(node: fx.Node) -> bool:
    """Whether the node's value is a few rows, of sizes known now."""
    value = node.meta["val"]
    if not isinstance(value, Tensor) or value.dim() < 2 or value.dtype not in DTYPES or value.device.type != "cpu":
        return False
    known = value.layout == torch.strided and all(isinstance(size, int) for size in value.shape)
    return known and 0 < math.prod(value.shape[:-1]) <= ROWS and value.shape[-1] > 0


def maker(node: fx.Node) -> fx.Node:
    """The node that a result was picked from; the node itself if it was not picked."""
    made = node.args[0] if node.target is operator.getitem else node
    assert isinstance(made, fx.Node)
    return made
