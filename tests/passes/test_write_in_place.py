"""write_in_place: what it rewrites and what it leaves, on graphs as the passes before it leave them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from graphopt import edit, ops
from graphopt.passes.kv_cache.write_in_place import write_in_place

aten = torch.ops.aten
B, H, D = 2, 3, 4


def appending(length: int, batch: int, *, reserved: bool = True, read_early: bool = False) -> fx.GraphModule:
    """past [B, H, S, D], new [B, H, 1, D] -> the longer cache, its sum, and the sum of the room before the write."""
    graph = fx.Graph()
    past, new = graph.placeholder("past"), graph.placeholder("new")
    room = graph.call_function(ops.kv_reserve, (past, 1, 2)) if reserved else graph.placeholder("room")
    early = [graph.call_function(aten.sum.default, (room,))] if read_early else []
    moved = graph.call_function(aten.slice_scatter.default, (room, new, 2, length, length + 1))
    total = graph.call_function(aten.sum.default, (moved,))
    graph.call_function(aten.copy_.default, (room, moved))
    graph.output((moved, total, *early))
    module = fx.GraphModule(torch.nn.Module(), graph)
    with FakeTensorMode():
        sizes = {"past": length, "new": 1, "room": length + 1}
        for node in graph.nodes:
            if node.op == "placeholder":
                node.meta["val"] = torch.empty(batch, H, sizes[node.name], D)
            elif node.op == "call_function":
                args, kwargs = fx.map_arg((node.args, node.kwargs), lambda argument: argument.meta["val"])
                node.meta["val"] = node.target(*args, **kwargs)
    return module


def fixed(*, role: str = "buffer", read_early: bool = False, returned: bool = False) -> fx.GraphModule:
    """cache [B, H, 9, D], new [B, H, 2, D], places [2] -> the sum of the cache with the rows; it is copied back."""
    graph = fx.Graph()
    cache, new, places = map(graph.placeholder, ("cache", "new", "places"))
    early = [graph.call_function(aten.sum.default, (cache,))] if read_early else []
    moved = graph.call_function(aten.index_copy.default, (cache, 2, places, new))
    shown = [graph.call_function(aten.permute.default, (moved, [1, 0, 2, 3]))] if returned else []
    total = graph.call_function(aten.sum.default, (moved,))
    graph.call_function(aten.copy_.default, (cache, moved))
    graph.output((total, *early, *shown))
    module = fx.GraphModule(torch.nn.Module(), graph)
    cache.meta["role"] = role
    with FakeTensorMode():
        given = {"cache": torch.empty(B, H, 9, D), "new": torch.empty(B, H, 2, D), "places": torch.empty(2).long()}
        for node in graph.nodes:
            if node.op == "placeholder":
                node.meta["val"] = given[node.name]
            elif node.op == "call_function":
                args, kwargs = fx.map_arg((node.args, node.kwargs), lambda argument: argument.meta["val"])
                node.meta["val"] = node.target(*args, **kwargs)
    return module


def targets(module: fx.GraphModule) -> list[str]:
    return [str(node.target).removesuffix(".default") for node in module.graph.nodes if node.op == "call_function"]


def rows(count: int, batch: int = B) -> Tensor:
    return torch.randn(batch, H, count, D)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("length", [0, 1, 9])
def test_one_write_of_the_new_rows(length: int, batch: int) -> None:
    module = appending(length, batch)
    assert write_in_place(module) == 1
    module.recompile()
    assert targets(module) == ["graphopt.kv_reserve", "graphopt.kv_write", "aten.sum"]
    past, new = rows(length, batch), rows(1, batch)
    grown, total = module(past, new)
    assert torch.equal(grown, torch.cat([past, new], 2))
    torch.testing.assert_close(total, grown.sum())
    assert write_in_place(module) == 0


def test_leaves_room_that_is_read_before() -> None:
    module = appending(5, B, read_early=True)
    assert write_in_place(module) == 0 and "aten.copy_" in targets(module)


def test_leaves_memory_of_the_caller() -> None:
    module = appending(5, B, reserved=False)
    assert write_in_place(module) == 0 and "aten.copy_" in targets(module)


def test_stays_without_readers() -> None:
    """The write is what it is for: it is no dead code."""
    module = appending(5, B)
    write_in_place(module)
    module.graph.output_node().args = ((),)
    edit.eliminate_dead_code(module)
    assert "graphopt.kv_write" in targets(module)


def test_the_version_counter_is_left_to_others() -> None:
    room = rows(6)
    before, kept = room._version, room.clone()
    assert ops.kv_write(room, rows(1) * 0, 2, 5, 6) is room
    assert room._version == before and torch.equal(room[:, :, :5], kept[:, :, :5]) and not room[:, :, 5].any()


@pytest.mark.parametrize("role", ["input", "buffer"])
def test_rows_go_to_places_of_a_cache_of_fixed_size(role: str) -> None:
    module = fixed(role=role)
    assert write_in_place(module) == 1
    module.recompile()
    assert targets(module) == ["graphopt.kv_write_at", "aten.sum"]
    cache, new, places = torch.randn(B, H, 9, D), rows(2), torch.tensor([7, 3])
    want = cache.index_copy(2, places, new)
    address, (total,) = cache.data_ptr(), module(cache, new, places)
    assert torch.equal(cache, want) and cache.data_ptr() == address
    torch.testing.assert_close(total, want.sum())
    assert write_in_place(module) == 0


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"read_early": True}, "aten.sum.default reads the room before the rows are written"),
        ({"returned": True}, "the graph returns the cache as well: its caller would be given its own memory"),
        ({"role": "weight"}, None),
    ],
)
def test_leaves_a_cache_of_fixed_size_that_is_used_otherwise(changes: dict[str, Any], reason: str | None) -> None:
    module = fixed(**changes)
    with edit.session(edit.Session()) as session:
        assert write_in_place(module) == 0
    assert "aten.copy_" in targets(module)
    assert [refusal.reason for refusal in session.refusals] == ([reason] if reason else [])
