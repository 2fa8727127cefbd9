"""CUDA graphs without a GPU: which graphs may be recorded, what torch's machinery is told, and what is handed out."""

from __future__ import annotations

import operator
from typing import Any
from unittest import mock

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.fx import Graph, GraphModule
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import graphopt
from graphopt import _compat
from graphopt.report import collecting
from graphopt.runtime.artifact import Artifact
from graphopt.runtime.cuda_graphs import Recording, copies, plan

aten = torch.ops.aten


class Build:
    """A graph over fake values, on a GPU that need not be there."""

    def __init__(self, device: str = "cuda:0") -> None:
        self.graph, self.device, self.mode = Graph(), device, FakeTensorMode(shape_env=ShapeEnv())

    def input(self, role: str = "input", device: str | None = None) -> Any:
        node = self.graph.placeholder(f"{role}_{len(self.graph.nodes)}")
        with self.mode:
            node.meta.update(val=torch.empty(4, 4, device=device or self.device), role=role)
        return node

    def call(self, target: Any, *args: Any) -> Any:
        node = self.graph.call_function(target, args)
        with self.mode:
            node.meta["val"] = target(*torch.fx.map_arg(args, lambda n: n.meta["val"]))  # type: ignore[attr-defined]
        return node

    def plan(self, *outputs: Any, training: bool = False) -> Any:
        self.graph.output(outputs)
        return plan(GraphModule(torch.nn.Module(), self.graph), training)


def test_weights_and_buffers_stay_where_they_are_and_inputs_are_copied() -> None:
    build = Build()
    x, w, b = build.input(), build.input("weight"), build.input("buffer")
    found = build.plan(build.call(aten.mm.default, x, w), build.call(aten.add.Tensor, x, b))
    assert (found.static, found.updated, found.fresh, found.device_index) == ((1, 2), (), (True, True), 0)


def test_a_buffer_may_be_updated_and_what_shows_an_input_is_not_copied() -> None:
    build = Build()
    x, b = build.input(), build.input("buffer")
    view = build.call(aten.view.default, b, [16])
    build.call(aten.copy_.default, view, build.call(aten.view.default, x, [16]))
    found = build.plan(build.call(aten.mul.Tensor, x, 2), view, None, 3)
    assert (found.static, found.updated, found.fresh) == ((1,), (1,), (True, False, False, False))


def test_rows_written_to_a_cache_count_as_an_update() -> None:
    build = Build()
    rows, cache = build.input(), build.input()
    found = build.plan(build.call(graphopt.ops.kv_write, cache, rows, 0, 0, 4))
    assert "is updated in place and may lie elsewhere" in found


def test_rows_that_a_region_writes_to_a_cache_count_as_an_update() -> None:
    build, region = Build(), Build()
    given = [region.input(), region.input()]
    region.graph.output((region.call(graphopt.ops.kv_write, *given, 0, 0, 4),))
    rows, cache = build.input("weight"), build.input()
    root = torch.nn.Module()
    root.add_module("region", GraphModule(torch.nn.Module(), region.graph))
    call = build.graph.call_module("region", (cache, rows))
    written = build.graph.call_function(operator.getitem, (call, 0))
    written.meta["val"] = cache.meta["val"]
    build.graph.output((written,))
    assert "is updated in place and may lie elsewhere" in plan(GraphModule(root, build.graph), training=False)


REFUSED: dict[str, Any] = {
    "one half of training": lambda b: b.plan(b.call(aten.mul.Tensor, b.input(), 2), training=True),
    "works on cpu": lambda b: b.plan(b.call(aten.mul.Tensor, b.input(device="cpu"), 2)),
    "works on cpu, cuda:0": lambda b: b.plan(b.input(), b.input(device="cpu")),
    "several devices: cuda:0, cuda:1": lambda b: b.plan(b.input(), b.input(device="cuda:1")),
    "no tensors": lambda b: b.plan(3),
    "is updated in place": lambda b: b.plan(b.call(aten.copy_.default, b.input(), b.input())),
    "_local_scalar_dense.default cannot be recorded": lambda b: b.plan(
        b.graph.call_function(aten._local_scalar_dense.default, (b.input(),))
    ),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_cannot_be_recorded_is_refused_with_the_reason(reason: str) -> None:
    found = REFUSED[reason](Build())
    assert isinstance(found, str) and reason in found


def test_torchs_machinery_is_told_all_it_needs() -> None:
    recording = Recording((1,), (1,), (True, False), 0, ("facts",))

    def compiled(inputs: list[Any]) -> list[Any]:
        return [inputs[0] * 2, inputs[1]]

    with mock.patch("torch._inductor.compile_fx.cudagraphify", side_effect=lambda model, **told: model) as made:
        call = recording.around(compiled)
    assert made.call_args.args == (compiled,)
    assert made.call_args.kwargs == {
        "static_input_idxs": (1,), "device_index": 0, "stack_traces": [None, None], "is_backward": False,
        "is_inference": True, "constants": (), "placeholders": ("facts",), "mutated_input_idxs": (1,),
    }  # fmt: skip
    x, b = torch.ones(3), torch.ones(3)
    first, second = call([x, b])
    assert first.equal(x * 2) and second is b


def test_the_machinery_takes_these_arguments() -> None:
    """Of the torch that is installed: its function is made, and only a GPU is missing."""
    call = _compat.cuda_graphs(
        lambda inputs: inputs, static=(), updated=(), outputs=1, device_index=0, placeholders=()
    )
    if not torch.cuda.is_available():
        with pytest.raises((RuntimeError, AssertionError), match="(?i)cuda|nvidia"):
            call([torch.ones(3)])


def test_answers_are_copies_that_share_memory_as_before() -> None:
    pool = torch.arange(12.0)
    outputs = [pool[:4], pool.view(3, 4)[1:], torch.ones(2, 1).expand(2, 3), torch.arange(6.0).view(2, 3).t(), None, 7]
    got = copies(outputs, [True] * 4 + [False] * 2)
    kept = [value.clone() if isinstance(value, torch.Tensor) else value for value in outputs]
    for value in outputs[:4]:
        value.untyped_storage().fill_(0)
    for mine, want, given in zip(got, kept, outputs, strict=True):
        if isinstance(want, torch.Tensor):
            assert mine.equal(want) and mine.stride() == given.stride() and mine.data_ptr() != given.data_ptr()
        else:
            assert mine is want
    assert got[0].untyped_storage().data_ptr() == got[1].untyped_storage().data_ptr()


def test_an_artifact_replays_inside_of_its_prologue() -> None:
    artifact = Artifact(lambda inputs: [inputs[0] + 1])
    with mock.patch("torch._inductor.compile_fx.cudagraphify", side_effect=lambda model, **told: model):
        artifact.replay(Recording((), (), (True,), 0))
        assert artifact([torch.zeros(2)])[0].equal(torch.ones(2))
    assert artifact.recording is not None


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_on_the_cpu_the_report_says_why_nothing_is_recorded(mode: str) -> None:
    torch._dynamo.reset()
    options = {"target": "reference", "strict": True, "mode": mode}
    with collecting() as report, torch.no_grad():
        compiled = torch.compile(lambda x: x * 2 + 1, backend="graphopt", options=options)
        assert compiled(torch.ones(3)).equal(torch.full((3,), 3.0))
    assert report.graphs[0].notes == [
        f"mode {mode!r}: no CUDA graphs: they replay work of one GPU, and the graph works on cpu"
    ]
    assert "they replay work of one GPU" in str(report)
