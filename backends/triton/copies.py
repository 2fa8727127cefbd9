"""Values that go into memory of the caller as they are: copied there in one call, after everything else was computed.

Counters of caches of fixed size (`cumulative_length`) are an example: every layer's is made by one launch, and one call
of `_foreach_copy_`, which is one launch on a GPU, puts all of them into the caller's tensors. A copy of elements from
memory into memory of the same form has no better kernel than torch's own. The values are not stored there by the kernel
that makes them: others may have to read the old ones first.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch.fx import Node

from graphopt import views
from graphopt.shapes import same

_COPY = torch.ops.aten.copy_.default


def is_plain(node: Node) -> bool:
    """Does a node do nothing but move elements: into memory of the same shape, dtype and device?"""
    if node.target is not _COPY or node.kwargs or len(node.args) > 2:
        return False
    to, value = (argument.meta.get("val") if isinstance(argument, Node) else None for argument in node.args)
    if not isinstance(to, torch.Tensor) or not isinstance(value, torch.Tensor):
        return False
    alike = (to.dtype, to.device, to.dim()) == (value.dtype, value.device, value.dim())
    return alike and all(itertools.starmap(same, zip(to.shape, value.shape, strict=True)))


def runs(nodes: Sequence[Node]) -> dict[Node, list[Node]]:
    """For the last of each run of plain copies that one call may make in any order, the copies of the run."""
    found: dict[Node, list[Node]] = {}
    run: list[Node] = []
    for node in nodes:
        if run and not (is_plain(node) and _may_follow(run, node)):
            found[run[-1]] = run
            run = []
        if is_plain(node):
            run.append(node)
    return found


def _may_follow(run: Sequence[Node], node: Node) -> bool:
    """Is a copy of the run's dtype and device, and does it share no memory with it but what both only read?"""
    to, value = _memory(node)
    first, _ = _memory(run[0])
    if any(getattr(to.meta["val"], what) != getattr(first.meta["val"], what) for what in ("dtype", "device")):
        return False
    others = [_memory(each) for each in run]
    return all(to not in other and value is not other[0] for other in others)


def _memory(node: Node) -> tuple[Node, Node]:
    """The memory that a copy writes, and that it reads."""
    to, value = node.args[:2]
    assert isinstance(to, Node) and isinstance(value, Node)
    return views.storage(to), views.storage(value)
