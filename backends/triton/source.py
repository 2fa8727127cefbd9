"""The text of one kernel, and what its caller must know to launch it."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections import Counter
from collections.abc import Sequence

import sympy
import torch
from torch.fx import Node

from graphopt import cost, edit
from graphopt.backends.triton import expressions
from graphopt.backends.triton.region import Region
from graphopt.runtime.autotune import Config

_ASSIGNED = re.compile(r"\s*([A-Za-z_]\w*) = ")
_WORD = re.compile(r"[A-Za-z_]\w*")
_UNPRINTABLE = re.compile(r"[^ -~]")


@dataclasses.dataclass(frozen=True)
class Scratch:
    """Memory in which a program leaves something for others, of the same launch or of the next.

    name: the pointer parameter that it is; dtype: of its elements; elements: how many, as text in the kernel's sizes.
    zeroed: it is 0 before the launch, and the launch leaves it so.
    """

    name: str
    dtype: torch.dtype
    elements: str
    zeroed: bool = False


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A generated kernel.

    body: the function after its name, that is from the parameter list on; kernels with equal bodies are one kernel.
    parameters: the pointer parameters, `in0` ... for the region's inputs, `out0` ... for its outputs, and the names of
    scratch memory; types: Triton's names of their types ("*bf16").
    sizes: the size parameters with the expressions, in the symbols of the graph the kernel was generated for.
    constants: the values of the constexpr parameters. grid: the number of programs, in parameters and constants.

    configs: what autotuning may choose from, the kernel's own configuration first.

    following: the kernel to be launched after this one, where one launch does not do for the region: it goes on from
    what this one leaves in scratch memory. scratch: all such memory of the region; the first kernel of a chain has it.
    """

    kind: str
    body: str
    parameters: tuple[str, ...]
    types: tuple[str, ...]
    sizes: tuple[tuple[sympy.Symbol, sympy.Expr], ...]
    constants: dict[str, int]
    grid: str
    num_warps: int
    num_stages: int
    helpers: frozenset[str]
    comment: tuple[str, ...] = ()
    configs: tuple[Config, ...] = ()
    following: Kernel | None = None
    scratch: tuple[Scratch, ...] = ()

    @property
    def chain(self) -> list[Kernel]:
        """This kernel and those to be launched after it, in order."""
        return [self, *(self.following.chain if self.following is not None else ())]

    def configured(self, config: Config) -> Kernel:
        """The kernel in another configuration."""
        constants = dict(config.constants)
        return dataclasses.replace(
            self, constants=constants, num_warps=config.num_warps, num_stages=config.num_stages)

    def programs(self, sizes: Sequence[int]) -> int:
        """The number of programs for values of the size parameters."""
        given = {symbol.name: size for (symbol, _), size in zip(self.sizes, sizes, strict=True)}
        known = {"__builtins__": {}, "cdiv": lambda a, b: -(-a // b), "max": max}
        return int(eval(self.grid, known, self.constants | given))

    @property
    def digest(self) -> str:
        """What equal kernels share."""
        whole = repr((self.kind, self.body, sorted(self.constants.items()), self.num_warps, self.num_stages))
        return hashlib.sha256(whole.encode()).hexdigest()[:12]

    def text(self, name: str) -> str:
        """The kernel's definition under the given name."""
        comment = "".join(f"# {line}\n" for line in self.comment)
        return f"{comment}@triton.jit\ndef {name}{self.body}"


def harmless(text: str) -> str:
    """Text of a graph made fit for a one-line comment: printable ASCII only, at most 160 characters."""
    return _UNPRINTABLE.sub("?", text)[:160]


def provenance(region: Region) -> tuple[str, ...]:
    """Comment lines: a region's operators, the passes that made them, the model's source lines, shapes and bytes."""
    nodes = [n for n in region.graph_module.graph.nodes if n.op == "call_function"]
    operators = [str(getattr(n.target, "overloadpacket", n.target)).rsplit(".", 1)[-1] for n in nodes]
    passes = {p.pass_name: None for n in nodes if (p := n.meta.get("graphopt")) is not None and hasattr(p, "pass_name")}
    lines = {edit.source_line(n): None for n in nodes}
    comment = [f"computes: {harmless(', '.join(operators))}"]
    if passes:
        comment.append(f"passes: {harmless(', '.join(passes))}")
    comment += [f"from {harmless(line)}" for line in list(lines)[:4] if line]
    for label, group in (("in", region.inputs), ("out", region.outputs)):
        for place, node in enumerate(group):
            shape = ", ".join(str(s) for s in region.sizes(node))
            room = region.places[place].room if label == "out" else None
            within = f" within [{', '.join(map(str, region.sizes(room)))}]" if room else ""
            dtype = str(node.meta["val"].dtype).removeprefix("torch.")
            comment.append(harmless(f"{label}{place}: {dtype} [{shape}]{within}"))
    moved = cost.region_cost(region.graph_module).bytes
    comment.append(harmless(f"bytes of the region: {moved.xreplace({v: k for k, v in region.parameters.items()})}"))
    return tuple(comment)


def pointer_type(node: Node) -> str:
    """Triton's name for a pointer to a node's elements."""
    return pointer_to(node.meta["val"].dtype)


def pointer_to(dtype: torch.dtype) -> str:
    """Triton's name for a pointer to elements of a dtype."""
    name = expressions.STORED[dtype].removeprefix("tl.")
    short = {"float64": "fp64", "float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "uint8": "u8", "int1": "i1"}
    return "*" + short.get(name, name.replace("int", "i"))


def signature(pointers: Sequence[str], sizes: Sequence[sympy.Symbol], constants: dict[str, int]) -> str:
    """The parameter list of a kernel: pointers, sizes, constants, and the integer type of indices."""
    names = [*pointers, *(s.name for s in sizes)]
    fixed = [f"{name}: tl.constexpr" for name in (*constants, "INDEX")]
    return f"({', '.join(names + fixed)}):"


def widened(sizes: Sequence[sympy.Symbol]) -> list[str]:
    """Lines that give sizes the type of indices: Triton passes each in 32 bits if it fits, and products wrap."""
    return [f"{size.name} = tl.full([], {size.name}, INDEX)" for size in sizes]


def prune(lines: Sequence[str]) -> list[str]:
    """The lines without assignments to variables that nothing reads."""
    kept = list(lines)
    while True:
        words = Counter(word for line in kept for word in set(_WORD.findall(line)))
        dead = [line for line in kept if (found := _ASSIGNED.match(line)) and words[found[1]] == 1]
        if not dead:
            return kept
        kept = [line for line in kept if line not in dead]


def power_of_two(number: int) -> int:
    """The smallest power of two that is not below `number`."""
    return 1 << max(0, number - 1).bit_length()
