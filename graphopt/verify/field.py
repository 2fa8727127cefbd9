"""Check a rewrite that only adds, multiplies and moves values over a finite field, where there is no rounding.

A polynomial identity that holds at random points modulo a prime holds for all real numbers, except with
probability degree/prime (Schwartz, 1980; Zippel, 1979): a wrong constant shows however small it is. Floating point
constants are taken as the exact fractions they are.
"""

from __future__ import annotations

import fractions
import math
from typing import Any

import torch
from torch import fx

from graphopt import ops
from graphopt.verify import inputs, judge
from graphopt.verify.cut import Pair

aten = torch.ops.aten
# Products of two residues, summed over up to 2**22 terms, fit 64 bits.
PRIME = 1048573
_LARGEST = 1 << 20

_MOVES = {
    "view", "_unsafe_view", "reshape", "permute", "transpose", "t", "expand", "slice", "select", "squeeze",
    "unsqueeze", "clone", "cat", "stack", "split", "split_with_sizes", "alias", "detach", "contiguous", "unbind",
    "lift_fresh_copy",
}  # fmt: skip
_SUMS = {"add", "sub", "mul", "neg", "mm", "bmm", "matmul", "addmm", "sum", "linear", "parallel_linear", "dot", "mv"}
_CASTS = {"convert_element_type", "_to_copy"}


def applies(pair: Pair) -> bool:
    """Whether both graphs consist of additions, multiplications and moves of floating point values."""
    if pair.exactness == "lossy":
        return False
    nodes = [node for graph in (pair.before, pair.after) for node in graph.graph.nodes]
    kinds = [node.meta.get("val") for node in nodes if node.op == "placeholder"]
    floating = all(isinstance(kind, torch.Tensor) and kind.dtype.is_floating_point for kind in kinds)
    if not floating or not kinds or not all(_is_polynomial(node) for node in nodes):
        return False
    # A product of constants, or a reciprocal, that was rounded when it was folded is no longer exact.
    known = _constants(pair.before)
    return all(number in known or _is_short(number) for number in _constants(pair.after))


def compare(pair: Pair) -> judge.Difference | None:
    """How the two graphs differ at a random point modulo PRIME."""
    fakes = [node.meta["val"] for node in pair.before.graph.nodes if node.op == "placeholder"]
    sizes = inputs.choose_sizes(fakes, "sample")[-1]
    shapes = [[inputs.size(part, sizes) for part in fake.shape] for fake in fakes]
    if sum(torch.Size(shape).numel() for shape in shapes) > _LARGEST:
        return None
    generator = torch.Generator().manual_seed(1)
    values = [torch.randint(0, PRIME, shape, generator=generator) for shape in shapes]
    try:
        old, new = (_Field(graph).run(*values) for graph in (pair.before, pair.after))
    except (RuntimeError, ValueError, OverflowError, IndexError):
        return None
    for index, (a, b) in enumerate(zip(old, new, strict=True)):
        if a.shape != b.shape or not torch.equal(a % PRIME, b % PRIME):
            told = f"value {index} is another polynomial of the inputs (evaluated modulo {PRIME})"
            return judge.Difference(told, frozenset({"another polynomial"}))
    return None


class _Field(fx.Interpreter):
    """Runs a graph on residues modulo PRIME."""

    def run_node(self, n: fx.Node) -> Any:
        if n.op != "call_function":
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        name = _name(n)
        if name in _CASTS or name == "lift_fresh_copy":
            return args[0]
        if name == "div":
            return args[0] * _residue(1 / fractions.Fraction(args[1])) % PRIME
        if name in _SUMS and name not in ("sum", "linear", "parallel_linear"):
            args = tuple(_residue(item) for item in args)
            kwargs = {key: _residue(item) for key, item in kwargs.items()}
        kwargs = {key: item for key, item in kwargs.items() if key != "dtype"}
        meaning = ops.meaning(n.target)
        result: Any = (meaning or n.target)(*args, **kwargs)  # type: ignore[operator]
        if isinstance(result, (list, tuple)):
            return [part % PRIME for part in result]
        return result % PRIME


def _name(node: fx.Node) -> str:
    packet = getattr(node.target, "overloadpacket", None)
    return getattr(packet, "__name__", getattr(node.target, "__name__", ""))


def _is_polynomial(node: fx.Node) -> bool:
    if node.op in ("placeholder", "output"):
        return True
    if node.op != "call_function":
        return False
    name = _name(node)
    if name == "getitem" or name in _MOVES:
        return True
    value = node.meta.get("val")
    parts = value if isinstance(value, (list, tuple)) else [value]
    floating = all(isinstance(part, torch.Tensor) and part.dtype.is_floating_point for part in parts)
    if name == "div":
        return floating and len(node.args) == 2 and isinstance(node.args[1], (int, float)) and node.args[1] != 0
    return floating and (name in _SUMS or name in _CASTS)


def _constants(graph_module: fx.GraphModule) -> set[float]:
    args = [item for node in graph_module.graph.nodes for item in (*node.args, *node.kwargs.values())]
    return {float(item) for item in args if isinstance(item, (int, float)) and not isinstance(item, bool)}


def _is_short(number: float) -> bool:
    """Whether a constant has so few digits that it was not made by rounding."""
    return math.isfinite(number) and fractions.Fraction(number).numerator.bit_length() <= 12


def _residue(item: Any) -> Any:
    if isinstance(item, bool) or not isinstance(item, (int, float, fractions.Fraction)):
        return item
    fraction = fractions.Fraction(item)
    return fraction.numerator * pow(fraction.denominator, -1, PRIME) % PRIME
