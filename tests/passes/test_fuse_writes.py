"""Writes of new rows into caches as the end of the region that makes them: what joins, what stays alone, and why."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from graphopt import cost, edit, ops, views
from graphopt.passes.fuse.form_regions import form_regions

aten = torch.ops.aten
B, H, S, D = 2, 3, 5, 4
ROWS, CACHE = B * H * D * 4, B * H * (S + 1) * D * 4
"""Bytes of the new rows, and of the cache with them."""


class Build:
    """A graph over past [B, H, S, D] and new rows [B, H, 1, D], with room for them."""

    def __init__(self) -> None:
        self.graph, self.mode = fx.Graph(), FakeTensorMode()
        self.past, self.new = self.input(H, S), self.input(H, 1)
        self.room = self.call(ops.kv_reserve, self.past, 1, 2)

    def input(self, heads: int, length: int, dtype: torch.dtype = torch.float32) -> fx.Node:
        node = self.graph.placeholder(f"input_{len(self.graph.nodes)}")
        with self.mode:
            node.meta.update(val=torch.empty(B, heads, length, D, dtype=dtype), role="input")
        return node

    def call(self, target: Any, *args: Any) -> fx.Node:
        node = self.graph.call_function(target, args)
        with self.mode:
            node.meta["val"] = target(*fx.map_arg(args, lambda n: n.meta["val"]))
        return node

    def write(self, rows: fx.Node, room: fx.Node | None = None) -> fx.Node:
        return self.call(ops.kv_write, self.room if room is None else room, rows, 2, S, S + 1)

    def formed(self, *outputs: fx.Node) -> tuple[fx.GraphModule, list[list[str]]]:
        """The graph in regions, and the operators of each region."""
        self.graph.output(outputs)
        module = fx.GraphModule(torch.nn.Module(), self.graph)
        form_regions(module)
        regions = [region for region in module.children() if isinstance(region, fx.GraphModule)]
        return module, [[_name(n) for n in region.graph.nodes if n.op == "call_function"] for region in regions]

    def refused(self, *outputs: fx.Node) -> list[str]:
        """The reasons why writes are no end of a region; they must then stand in the graph."""
        with edit.session(edit.Session()) as session:
            module, _ = self.formed(*outputs)
        assert module.graph.find_nodes(op="call_function", target=ops.kv_write)
        return [refusal.reason for refusal in session.refusals]


def _name(node: fx.Node) -> str:
    return str(node.target).split(".")[-2]


def test_a_write_ends_the_region_that_makes_the_rows() -> None:
    build = Build()
    module, regions = build.formed(build.write(build.call(aten.mul.Tensor, build.new, 2.0)))
    assert regions == [["mul", "kv_write"]]
    past, new = torch.randn(B, H, S, D), torch.randn(B, H, 1, D)
    assert torch.equal(module(past, new)[0], torch.cat([past, 2 * new], 2))
    (call,) = module.graph.find_nodes(op="call_module")
    (room,) = views.rooms_of(call)
    assert room is not None and room.target is ops.kv_reserve
    assert cost.graph_cost(module).bytes == 2 * ROWS


def test_a_write_of_rows_that_are_given_is_a_region_of_its_own() -> None:
    build = Build()
    _, regions = build.formed(build.write(build.new))
    assert regions == [["kv_write"]]


def test_a_write_ends_the_product_that_makes_the_rows() -> None:
    build = Build()
    x = build.graph.placeholder("x")
    weight = build.graph.placeholder("weight")
    with build.mode:
        x.meta.update(val=torch.empty(B, 1, 6))
        weight.meta.update(val=torch.empty(H * D, 6))
    made = build.call(aten.view.default, build.call(ops.linear, x, weight), [B, 1, H, D])
    module, regions = build.formed(build.write(build.call(aten.permute.default, made, [0, 2, 1, 3])))
    assert regions == [["linear", "view", "permute", "kv_write"]]
    past, given, by = torch.randn(B, H, S, D), torch.randn(B, 1, 6), torch.randn(H * D, 6)
    rows = (given @ by.T).view(B, 1, H, D).transpose(1, 2)
    torch.testing.assert_close(module(past, torch.empty(0), given, by)[0], torch.cat([past, rows], 2))


def test_what_reads_the_cache_waits_for_another_launch() -> None:
    build = Build()
    written = build.write(build.call(aten.mul.Tensor, build.new, 2.0))
    scaled = build.call(aten.mul.Tensor, build.call(aten.view.default, written, [B * H, S + 1, D]), 3.0)
    module, regions = build.formed(scaled, written)
    assert regions == [["mul", "kv_write"], ["view", "mul"]]
    past, new = torch.randn(B, H, S, D), torch.randn(B, H, 1, D)
    torch.testing.assert_close(module(past, new)[0].view(B, H, S + 1, D), 3 * torch.cat([past, 2 * new], 2))


def test_what_reads_a_cache_that_was_just_started_waits_too() -> None:
    """The room is as large as the rows: nothing but the write keeps its reader out of the launch."""
    build = Build()
    room = build.graph.call_function(
        ops.kv_allocate, ([B, H, 1, D], 2), {"dtype": torch.float32, "device": torch.device("cpu")}
    )
    room.meta["val"] = build.new.meta["val"]
    written = build.call(ops.kv_write, room, build.call(aten.mul.Tensor, build.new, 2.0), 2, 0, 1)
    module, regions = build.formed(build.call(aten.mul.Tensor, written, 3.0), written)
    assert regions == [["mul", "kv_write"], ["mul"]]
    new = torch.randn(B, H, 1, D)
    torch.testing.assert_close(tuple(module(torch.empty(B, H, S, D), new)), (6 * new, 2 * new))


def test_a_write_that_nothing_reads_is_no_dead_code() -> None:
    build = Build()
    build.write(build.call(aten.mul.Tensor, build.new, 2.0))
    module, regions = build.formed(build.new)
    assert regions == [["mul", "kv_write"]]
    edit.eliminate_dead_code(module)
    assert len(module.graph.find_nodes(op="call_module")) == 1


def test_a_write_by_itself_costs_the_rows_and_not_the_cache() -> None:
    build = Build()
    written = build.write(build.new)
    build.graph.output((written,))
    module = fx.GraphModule(torch.nn.Module(), build.graph)
    assert cost.node_cost(module, written).bytes == 2 * ROWS < CACHE


def test_the_least_for_a_cache_that_grows_is_to_read_it_and_to_write_the_rows() -> None:
    build = Build()
    grown = build.call(aten.cat.default, [build.past, build.new], 2)
    build.graph.output((grown,))
    module = fx.GraphModule(torch.nn.Module(), build.graph)
    build.graph.erase_node(build.room)
    assert cost.minimal_bytes(module) == CACHE + ROWS


def test_memory_of_the_caller_is_refused() -> None:
    build = Build()
    assert build.refused(build.write(build.new, build.input(H, S + 1))) == [
        "its memory is not room that was handed out for new rows: others may show it"
    ]


def test_room_that_is_read_besides_is_refused() -> None:
    build = Build()
    before = build.call(aten.sum.default, build.room)
    assert build.refused(build.write(build.new), before) == ["aten.sum.default reads or writes the room as well"]


def test_rows_of_another_dtype_are_refused() -> None:
    build = Build()
    wide = build.input(H, 1, torch.float64)
    assert build.refused(build.write(wide)) == ["its rows are of another dtype than the room, or lie on another device"]


def test_rows_that_are_broadcast_are_refused() -> None:
    build = Build()
    assert build.refused(build.write(build.input(1, 1))) == ["its rows are broadcast to their place"]


@pytest.mark.parametrize("views_of_rows", [[], [(aten.permute.default, [0, 2, 1, 3]), (aten.view.default, [B, 1, -1])]])
def test_no_prologue_of_a_product_writes(views_of_rows: list[tuple[Any, Any]]) -> None:
    """Each program of a product would write the rows again."""
    build = Build()
    made = build.call(aten.mul.Tensor, build.new, 2.0)
    build.write(made)
    for target, how in views_of_rows:
        made = build.call(target, made, how)
    weight = build.graph.placeholder("weight")
    with build.mode:
        weight.meta.update(val=torch.empty(6, made.meta["val"].shape[-1]))
    _, regions = build.formed(build.call(ops.linear, made, weight))
    assert sorted(map(len, regions)) != [1] and not any({"linear", "kv_write"} <= set(region) for region in regions)
