"""Constants that count are written as counting where masks are made of them; others, and others' readers, are left."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from graphopt.passes.fuse.written_positions import write_positions

aten, prims = torch.ops.aten, torch.ops.prims
COUNTING = {
    "keys": torch.arange(7)[None, None, None],
    "queries behind a cache": torch.arange(5, 12)[None, None, :, None],
    "the same for each sequence": torch.arange(7).expand(2, 1, 7, 7).contiguous(),
    "every second, backwards": torch.arange(12, -2, -2, dtype=torch.int32)[None],
}
OTHERS = {
    "gaps": torch.tensor([0, 1, 2, 4])[None],
    "two dimensions": torch.arange(16).view(4, 4),
    "one number": torch.zeros(1, 4, dtype=torch.int64),
    "floating point": torch.arange(7.0),
}


def mask_of(constant: Tensor, *, sorted_too: bool = False) -> tuple[fx.GraphModule, fx.Node]:
    """A graph that compares a constant with a number, and the comparison."""
    graph, mode = fx.Graph(), FakeTensorMode()
    held = graph.get_attr("constant")
    seen = graph.call_function(aten.le.Scalar, (held, 3))
    outputs = [seen, *([graph.call_function(aten.sort.default, (held,))] if sorted_too else [])]
    graph.output(tuple(outputs))
    with mode:
        held.meta["val"] = mode.from_tensor(constant)
        seen.meta["val"] = aten.le.Scalar(held.meta["val"], 3)
        for node in outputs[1:]:
            node.meta["val"] = aten.sort.default(held.meta["val"])
    root = torch.nn.Module()
    root.register_buffer("constant", constant)
    return fx.GraphModule(root, graph), seen


@pytest.mark.parametrize("name", COUNTING)
def test_written_as_counting(name: str) -> None:
    module, seen = mask_of(COUNTING[name])
    assert write_positions(module, [seen]) == 1
    assert seen.all_input_nodes[0].target is aten.expand.default
    module.recompile()
    assert torch.equal(module()[0], COUNTING[name] <= 3)
    assert write_positions(module, [seen]) == 0


@pytest.mark.parametrize("name", OTHERS)
def test_what_does_not_count_is_left(name: str) -> None:
    module, seen = mask_of(OTHERS[name])
    assert write_positions(module, [seen]) == 0 and seen.all_input_nodes[0].op == "get_attr"


def test_what_is_read_outside_of_kernels_is_left() -> None:
    """There it would have to be made, which takes a launch."""
    module, seen = mask_of(COUNTING["keys"], sorted_too=True)
    assert write_positions(module, [seen]) == 0 and seen.all_input_nodes[0].op == "get_attr"
