"""Turn a region into kernels: group its outputs into sections that share rows, and sections into one launch."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Protocol

from torch.fx import GraphModule

from graphopt.backends.triton.attention import AttentionSection, attention_of
from graphopt.backends.triton.configs import configs
from graphopt.backends.triton.matmul import matmul_sections
from graphopt.backends.triton.matmul_split import split as split_product
from graphopt.backends.triton.operands import contraction_of
from graphopt.backends.triton.reduction_split import split as split_rows
from graphopt.backends.triton.region import Region, Unsupported
from graphopt.backends.triton.rows import Names, RowSection
from graphopt.backends.triton.source import (
    Kernel,
    Scratch,
    pointer_to,
    pointer_type,
    provenance,
    prune,
    signature,
    widened,
)


class Section(Protocol):
    """A part of a kernel with its own range of programs."""

    constants: dict[str, int]
    num_warps: int
    num_stages: int

    @property
    def helpers(self) -> set[str]:
        """The device functions that its lines call."""

    @property
    def programs(self) -> str:
        """How many programs it needs, as text."""

    def lines(self, program: str) -> list[str]:
        """Its lines; `program` is the number of the program within the section."""


def generate(graph_module: GraphModule) -> Kernel:
    """The kernel of a region.

    Raises Unsupported, with the reason, when the region contains something that has no kernel.
    """
    region = Region(graph_module)
    try:
        names = Names()
        if attention_of(region) is not None:
            section = AttentionSection(region, 0, names)
            return _assemble(region, "attention", [section], section.runs.scratch if section.runs else ())
        if contraction_of(region) is not None:
            products = matmul_sections(region, names)
            dealt = split_product(region, products)
            if dealt is None:
                return _assemble(region, "linear", products)
            left = [piece for section in dealt[0] for piece in section.scratch]
            return _chain(region, [("linear_parts", dealt[0]), ("linear_merge", dealt[1])], left)
        groups = _groups(region)
        phases = split_rows(region, groups)
        if phases:
            kinds = ["rows_parts"] * (len(phases) - 1) + ["rows_merge"]
            left = [piece for phase in phases for piece in phase.leaves]
            return _chain(region, [(kind, [phase]) for kind, phase in zip(kinds, phases, strict=True)], left)
        sections: list[Section] = [RowSection(region, group, number, names) for number, group in enumerate(groups)]
        return _assemble(region, "rows", sections)
    except RecursionError as error:
        raise Unsupported("the region nests too deeply") from error


def _chain(region: Region, steps: Sequence[tuple[str, Sequence[Section]]], scratch: Sequence[Scratch]) -> Kernel:
    """Kernels of one region, to be launched one after the other: for each its kind and its sections."""
    following: Kernel | None = None
    for kind, sections in reversed(steps):
        made = _assemble(region, kind, sections, scratch, alone=False)
        following = dataclasses.replace(made, following=following, scratch=())
    assert following is not None
    return dataclasses.replace(following, scratch=tuple(scratch))


def _assemble(
    region: Region, kind: str, sections: Sequence[Section], scratch: Sequence[Scratch] = (), alone: bool = True
) -> Kernel:
    """A kernel of sections; one of several for its region, not `alone`, takes only the memory that its lines name."""
    body: list[str] = [*widened(list(region.parameters)), "program = tl.program_id(0)"]
    grid: list[str] = []
    for number, section in enumerate(sections):
        last = number == len(sections) - 1
        program = "program" if number == 0 else f"program_{number}"
        _append(body, number, last, program, section)
        grid.append(section.programs)
    constants = {k: v for s in sections for k, v in s.constants.items()}
    body = prune(body)
    pointers = {f"{name}{i}": pointer_type(node) for name, nodes in (("in", region.inputs), ("out", region.outputs))
                for i, node in enumerate(nodes)} | {each.name: pointer_to(each.dtype) for each in scratch}
    if not alone:
        named = set(re.findall(r"\w+", "\n".join(body)))
        pointers = {name: kind for name, kind in pointers.items() if name in named}
    sizes = list(region.parameters)
    text = "\n".join([signature(list(pointers), sizes, constants), *(f"    {line}" for line in body)]) + "\n"
    helpers = frozenset().union(*(s.helpers for s in sections))
    return Kernel(
        kind=kind, body=text, parameters=tuple(pointers), types=tuple(pointers.values()),
        sizes=tuple(region.parameters.items()), constants=constants, grid=" + ".join(grid),
        num_warps=max(s.num_warps for s in sections), helpers=helpers, comment=provenance(region),
        num_stages=max(s.num_stages for s in sections), configs=configs(sections, whole=alone),
        scratch=tuple(scratch),
    )


def _append(body: list[str], number: int, last: bool, program: str, section: Section) -> None:
    """Append a section's lines under a condition of its own.

    Not under the `else` of the section before: Triton would give every branch shared memory of its own.
    """
    tests = []
    if number:
        before = "program" if number == 1 else f"program_{number - 1}"
        body.append(f"{program} = {before} - blocks_{number - 1}")
        tests.append(f"({program} >= 0)")
    if not last:
        body.append(f"blocks_{number} = {section.programs.replace('cdiv(', 'tl.cdiv(')}")
        tests.append(f"({program} < blocks_{number})")
    if tests:
        body.append(f"if {' & '.join(tests)}:")
    body += [f"{'    ' if tests else ''}{line}" for line in section.lines(program)]


def _groups(region: Region) -> list[list[int]]:
    """Outputs that one section can compute together, greedily."""
    groups: list[list[int]] = []
    for output in range(len(region.outputs)):
        for group in groups:
            if _fits(region, [*group, output]):
                group.append(output)
                break
        else:
            groups.append([output])
    return groups


def _fits(region: Region, outputs: list[int]) -> bool:
    try:
        RowSection(region, outputs, 0, Names()).lines("program")
    except Unsupported:
        return False
    return True

