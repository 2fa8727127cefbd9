"""What dead code elimination removes, and what must stay although nothing reads it."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from graphopt import edit

aten = torch.ops.aten


def survivors(target: object, *args: object, **kwargs: object) -> list[object]:
    """What is left of a graph that calls `target` on three inputs for nothing."""
    graph = fx.Graph()
    inputs = [graph.placeholder(name) for name in "qkv"]
    graph.call_function(target, (*inputs, *args), kwargs)  # type: ignore[arg-type]
    graph.output(())
    module = fx.GraphModule({}, graph)
    edit.eliminate_dead_code(module)
    return [node.target for node in module.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize(
    ("target", "args", "kwargs"),
    [
        (aten._scaled_dot_product_flash_attention_for_cpu.default, (), {}),
        (aten._scaled_dot_product_flash_attention_for_cpu.default, (0.0, True), {"scale": 0.5}),
        (aten._scaled_dot_product_flash_attention.default, (), {"dropout_p": 0.0}),
    ],
)
def test_attention_without_dropout_goes(target: object, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
    assert survivors(target, *args, **kwargs) == []


def test_attention_with_dropout_stays() -> None:
    target = aten._scaled_dot_product_flash_attention_for_cpu.default
    assert survivors(target, 0.5) == [target]
    assert survivors(target, dropout_p=0.5) == [target]
