"""Call-time operations leave the graph, run once a call, and hand their results to the compiled graph."""

from __future__ import annotations

from unittest import mock

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from graphopt import edit, ops
from graphopt.runtime import kv as kv  # registers what cache operations do at call time
from graphopt.runtime import prologue


def reserve_and_write(past: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    room = torch.ops.graphopt.kv_reserve(past, new.shape[2], 2)
    return torch.ops.aten.slice_scatter.default(room, new, 2, past.shape[2], None)


def targets(graph_module: fx.GraphModule) -> list[object]:
    return [node.target for node in graph_module.graph.nodes if node.op == "call_function"]


def test_a_reservation_leaves_the_graph_for_good() -> None:
    past, new = torch.randn(1, 2, 5, 4), torch.randn(1, 2, 1, 4)
    graph_module = make_fx(reserve_and_write, tracing_mode="fake")(past, new)
    inputs = [node.meta["val"] for node in graph_module.graph.nodes if node.op == "placeholder"]
    made, new_inputs = prologue.hoist(graph_module, inputs)
    assert made is not None
    assert ops.kv_reserve not in targets(graph_module)
    graph_module.recompile()
    given = made([past, new])
    assert len(given) == len(new_inputs)
    (result,) = torch.utils._pytree.tree_leaves(graph_module(*given))
    assert torch.equal(result, torch.cat([past, new], 2))


def test_a_graph_without_call_time_operations_has_no_prologue() -> None:
    graph_module = make_fx(lambda x: x + 1, tracing_mode="fake")(torch.randn(3))
    before = len(graph_module.graph.nodes)
    made, inputs = prologue.hoist(graph_module, ["given"])
    assert made is None and inputs == ["given"]
    edit.eliminate_dead_code(graph_module)
    assert len(graph_module.graph.nodes) == before


def test_only_what_call_time_operations_read_is_computed_there() -> None:
    def grow(past: torch.Tensor, count: int) -> tuple[torch.Tensor, int]:
        room = torch.ops.graphopt.kv_reserve(past, count * 2, 2)
        upper, _ = torch.unbind(past.narrow(2, 0, count + 2))
        return room, upper.shape[1] - 1

    graph_module = make_fx(grow, tracing_mode="symbolic")(torch.randn(2, 2, 5, 4), 3)
    inputs = [node.meta["val"] for node in graph_module.graph.find_nodes(op="placeholder")]
    made, _ = prologue.hoist(graph_module, inputs)
    assert made is not None and [step.function for step in made.steps] == ["mul", "graphopt.kv_reserve.default"]
    past = torch.randn(2, 2, 5, 4)
    graph_module.recompile()
    room, number = graph_module(*made([past, 3]))
    assert room.shape == (2, 2, 11, 4) and torch.equal(room[:, :, :5], past) and number == 4


def test_reservations_are_made_together_unless_one_continues_another() -> None:
    def grow(first: torch.Tensor, second: torch.Tensor) -> list[torch.Tensor]:
        reserve = torch.ops.graphopt.kv_reserve
        rooms = [reserve(first, 1, 2), reserve(second, 1, 2, 99)]
        return [*rooms, reserve(rooms[0], 3, 2), reserve(rooms[1], 4, 2)]

    pasts = [torch.randn(1, 2, 5, 4), torch.randn(1, 2, 6, 4)]
    graph_module = make_fx(grow, tracing_mode="fake")(*pasts)
    inputs = [node.meta["val"] for node in graph_module.graph.find_nodes(op="placeholder")]
    made, _ = prologue.hoist(graph_module, inputs)
    assert made is not None
    with mock.patch.object(prologue, "_together", {"graphopt.kv_reserve.default": mock.Mock(wraps=kv.reserve_many)}):
        graph_module.recompile()
        rooms = graph_module(*made(list(pasts)))
        (together,) = prologue._together.values()
    assert [len(call.args[0]) for call in together.call_args_list] == [2, 2]  # type: ignore[attr-defined]
    assert [room.shape[2] for room in rooms] == [6, 7, 9, 11]
    for room, past in zip(rooms, pasts * 2, strict=True):
        assert torch.equal(room[:, :, : past.shape[2]], past)


def test_what_is_done_together_gets_the_arguments_of_each_step() -> None:
    """From inputs, from constants, from inputs in one step and constants in another, from results of earlier steps."""
    reserve, at = "graphopt.kv_reserve.default", prologue.Input
    steps = (
        prologue.Step(reserve, (at(0), at(2), 2)),
        prologue.Step(reserve, (at(1), 3, 2)),
        prologue.Step("add", (at(2), 1)),
        prologue.Step(reserve, (at(3), at(5), 2)),
        prologue.Step(reserve, (at(4), at(5), 2)),
    )
    made = prologue.Prologue(steps, (3, 4, 6, 7, 5))
    for count in (4, 6):
        pasts = [torch.randn(1, 2, 5, 4), torch.randn(1, 2, 6, 4)]
        *rooms, number = made([*pasts, count])
        assert number == count + 1
        assert [room.shape[2] for room in rooms] == [5 + count, 9, 5 + 2 * count + 1, 10 + count]
