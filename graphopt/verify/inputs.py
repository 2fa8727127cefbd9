"""Inputs for a cut-out rewrite: sizes for its symbols, then random and adversarial values for its tensors."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import sympy
import torch
from torch import fx

from graphopt import _compat, shapes
from graphopt.verify import execution

aten = torch.ops.aten
Sizes = dict[Any, int]

KINDS = {
    "sample": ("mixed", "special", "nan"),
    "all": ("normal", "mixed", "special", "nan", "infinite", "uniform", "large", "ties", "zeros"),
}
_EXTREMES = (0, 1, 2, 3, 7, 17)
_LARGE = 1 << 22


@dataclasses.dataclass(frozen=True)
class InputSet:
    """Values for the placeholders of a pair, and how they were made."""

    kind: str
    sizes: Sizes
    values: list[Any]


def generate(graph_module: fx.GraphModule, level: str) -> Iterator[InputSet]:
    """Input sets for the placeholders of `graph_module`; level is "sample" (few) or "all"."""
    placeholders = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    fakes = [node.meta["val"] for node in placeholders]
    bounds = [_index_bound(node) for node in placeholders]
    for number, sizes in enumerate(choose_sizes(fakes, level)):
        if not _is_meant(graph_module, sizes):
            continue
        kinds = KINDS[level]
        if sum(_numel(fake, sizes) for fake in fakes) > _LARGE:
            kinds = ("mixed",) if number else ("mixed", "nan")
        for kind in kinds:
            yield make(fakes, bounds, sizes, kind, seed=number)


def make(fakes: Sequence[Any], bounds: Sequence[sympy.Expr | None], sizes: Sizes, kind: str, seed: int) -> InputSet:
    """One set of values of the given kind."""
    generator = torch.Generator().manual_seed(seed)
    values = []
    for fake, bound in zip(fakes, bounds, strict=True):
        limit = None if bound is None else max(1, int(bound.xreplace(sizes)))
        values.append(_value(fake, sizes, kind, limit, generator))
    return InputSet(kind, sizes, values)


def choose_sizes(fakes: Sequence[Any], level: str) -> list[Sizes]:
    """Sizes for the symbols in `fakes`: those the graph was traced with, small and odd ones, and the extremes."""
    facts = _compat.symbol_facts(fakes)
    if not facts.symbols:
        return [{}]
    traced = {symbol: low if hint is None else hint for symbol, (hint, low, _) in facts.symbols.items()}
    odd = {symbol: value for symbol, value in zip(facts.symbols, itertools.cycle((3, 5, 7, 11)), strict=False)}
    chosen = [traced, odd] if level == "sample" else [traced, odd, *(dict.fromkeys(traced, n) for n in _EXTREMES)]
    if level == "all":
        chosen += [traced | {symbol: extreme} for symbol in traced for extreme in _EXTREMES]
    allowed: list[Sizes] = []
    for sizes in chosen:
        if sizes not in allowed and _is_possible(sizes, facts):
            allowed.append(sizes)
    return allowed or [traced]


def size(value: Any, sizes: Sizes) -> int:
    """A symbolic size as a number."""
    return int(shapes.expression(value).xreplace(sizes))


def _is_possible(sizes: Sizes, facts: _compat.SymbolFacts) -> bool:
    if any(not low <= sizes[symbol] <= high for symbol, (_, low, high) in facts.symbols.items()):
        return False
    return all(relation.xreplace(sizes) is not sympy.false for relation in facts.relations)


def _is_meant(graph_module: fx.GraphModule, sizes: Sizes) -> bool:
    """Whether the sizes give a program that means something: fused attention needs, unchecked, a value for each key."""
    for node in graph_module.graph.nodes:
        if "scaled_dot_product" in str(node.target):
            key, value = (node.args[position].meta["val"] for position in (1, 2))
            if size(key.shape[2], sizes) != size(value.shape[2], sizes):
                return False
    return True


def _numel(fake: Any, sizes: Sizes) -> int:
    return int(shapes.numel(fake).xreplace(sizes)) if isinstance(fake, torch.Tensor) else 0


def _value(fake: Any, sizes: Sizes, kind: str, limit: int | None, generator: torch.Generator) -> Any:
    if isinstance(fake, (int, torch.SymInt)) and not isinstance(fake, bool):
        return size(fake, sizes)
    if not isinstance(fake, torch.Tensor):
        return float(fake) if isinstance(fake, torch.SymFloat) else fake
    shape = [size(part, sizes) for part in fake.shape]
    values = _fill(shape, fake.dtype, kind, limit, generator)
    if fake.layout != torch.strided:
        return values.to(fake.device)
    strides = [size(part, sizes) for part in fake.stride()]
    made = execution.empty(shape, strides, fake.dtype, fake.device)
    # Elements that share memory get one value: write through the dimensions that do not repeat.
    once = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in strides)
    made[once] = values[once].to(fake.device)
    return made


def _fill(
    shape: list[int], dtype: torch.dtype, kind: str, limit: int | None, generator: torch.Generator
) -> torch.Tensor:
    if dtype == torch.bool:
        share = {"zeros": 0.0, "large": 1.0}.get(kind, 0.6)
        return torch.rand(shape, generator=generator) < share
    if not dtype.is_floating_point and not dtype.is_complex:
        return _fill_integers(shape, dtype, kind, limit, generator)
    if dtype.is_complex:
        return torch.randn(shape, dtype=dtype, generator=generator)
    if kind == "uniform":
        return torch.rand(shape, generator=generator).to(dtype)
    if kind == "ties":
        row = torch.randint(-2, 3, shape[-1:], generator=generator).float()
        return row.expand(shape).to(dtype)
    if kind == "zeros":
        return torch.zeros(shape, dtype=dtype)
    values = torch.randn(shape, generator=generator)
    if kind == "mixed":
        values *= 10.0 ** int(torch.randint(-4, 2, (), generator=generator))
    elif kind == "large":
        values *= torch.finfo(dtype).max ** 0.5
    values = values.to(dtype)
    if kind in ("special", "nan", "infinite") and values.numel():
        specials = _specials(dtype, kind)
        first = values.view(-1) if values.dim() == 0 else values.reshape(-1, values.shape[-1])[0]
        where = torch.randperm(first.numel(), generator=generator)[: max(1, first.numel() // 4)]
        chosen = torch.randint(len(specials), where.shape, generator=generator)
        first[where] = specials[chosen]
    return values


def _specials(dtype: torch.dtype, kind: str) -> torch.Tensor:
    info = torch.finfo(dtype)
    small = info.smallest_normal
    listed = {
        "special": [0.0, -0.0, info.max, info.min, small, small / 2, -small / 2, 1.0, -1.0],
        "nan": [torch.nan],
        "infinite": [torch.inf, -torch.inf],
    }[kind]
    return torch.tensor(listed, dtype=torch.float64).to(dtype)


def _fill_integers(
    shape: list[int], dtype: torch.dtype, kind: str, limit: int | None, generator: torch.Generator
) -> torch.Tensor:
    if limit is None and dtype in (torch.int8, torch.uint8):
        info = torch.iinfo(dtype)
        return torch.randint(info.min, info.max + 1, shape, generator=generator).to(dtype)
    bound = limit if limit is not None else 8
    if kind in ("zeros", "large"):
        return torch.full(shape, 0 if kind == "zeros" else bound - 1, dtype=dtype)
    return torch.randint(0, bound, shape, generator=generator).to(dtype)


def _index_bound(placeholder: fx.Node) -> sympy.Expr | None:
    """The smallest dimension that an integer input indexes, directly or after arithmetic; None if it indexes none."""
    value = placeholder.meta["val"]
    if not isinstance(value, torch.Tensor) or value.dtype.is_floating_point or value.dtype == torch.bool:
        return None
    bounds, waiting, seen = [], [placeholder], {placeholder}
    while waiting:
        node = waiting.pop()
        for user in node.users:
            bounds += [shapes.expression(bound) for bound in _indexed(user, node)]
            result = user.meta.get("val")
            if isinstance(result, torch.Tensor) and not result.dtype.is_floating_point and user not in seen:
                seen.add(user)
                waiting.append(user)
    known = [bound for bound in bounds if bound.is_Integer]
    return min(known) if known else next(iter(bounds), None)


def _indexed(user: fx.Node, index: fx.Node) -> list[Any]:
    """The sizes of the dimensions that `user` indexes by `index`."""
    args: Any = user.args
    if user.target is aten.embedding.default and args[1] is index:
        return [args[0].meta["val"].shape[0]]
    if user.target in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default):
        shape = args[0].meta["val"].shape
        return [shape[dim] for dim, item in enumerate(args[1]) if item is index]
    by_dim = ("gather", "index_select", "index_copy", "index_add", "scatter", "index_fill")
    name = getattr(getattr(user.target, "overloadpacket", None), "__name__", "").rstrip("_")
    if name.startswith(by_dim) and len(args) > 2 and args[2] is index:
        return [args[0].meta["val"].shape[args[1]]]
    return []
