"""Autotuning without a GPU: an injected clock, what is kept on disk, and programs in other configurations."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.fx import GraphModule

import graphopt
from graphopt.backends.triton.compile import CompiledGraph
from graphopt.backends.triton.program import write
from graphopt.backends.triton.source import Kernel
from graphopt.passes.fuse.form_regions import form_regions
from graphopt.report import collecting
from graphopt.runtime.autotune import Config, Tuner
from tests.backends.graphs import run

CONFIGS = [Config((("XBLOCK", x),), warps, 2) for x in (64, 128) for warps in (2, 4)]


class Clock:
    """A timer that runs the call and answers from a list."""

    def __init__(self, *times: float) -> None:
        self.times, self.calls = list(times), 0

    def __call__(self, call: Callable[[], object]) -> float:
        call()
        self.calls += 1
        return self.times[(self.calls - 1) % len(self.times)]


def tuner(folder: Path, *times: float, device: str = "a GPU", triton: str = "3.9") -> Tuner:
    return Tuner(folder, device, triton, timer=Clock(*times))


def test_the_fastest_is_chosen_and_found_again(tmp_path: Path) -> None:
    ran: list[Config] = []
    first = tuner(tmp_path, 4.0, 2.0, 3.0, 5.0)
    assert first.best("digest", [[8, 8], 3], CONFIGS, ran.append) == CONFIGS[1]
    assert ran == CONFIGS and first.timed == 4
    second = tuner(tmp_path, 1.0)
    assert second.best("digest", [[8, 8], 3], CONFIGS, ran.append) == CONFIGS[1]
    assert second.timed == 0


OTHERS: dict[str, Callable[[Path], Config]] = {
    "kernel": lambda folder: tuner(folder, 1.0, 2.0).best("other", [8], CONFIGS, repr),
    "shapes": lambda folder: tuner(folder, 1.0, 2.0).best("digest", [9], CONFIGS, repr),
    "configurations": lambda folder: tuner(folder, 1.0, 2.0).best("digest", [8], CONFIGS[:2], repr),
    "device": lambda folder: tuner(folder, 1.0, 2.0, device="another").best("digest", [8], CONFIGS, repr),
    "triton": lambda folder: tuner(folder, 1.0, 2.0, triton="3.6").best("digest", [8], CONFIGS, repr),
}


@pytest.mark.parametrize("what", OTHERS)
def test_results_hold_for_one_kernel_shapes_device_and_triton(what: str, tmp_path: Path) -> None:
    tuner(tmp_path, 4.0, 3.0, 2.0, 1.0).best("digest", [8], CONFIGS, repr)
    assert OTHERS[what](tmp_path) == CONFIGS[0]
    assert len(list(tmp_path.iterdir())) == 2


def test_a_configuration_that_fails_is_out(tmp_path: Path) -> None:
    def launch(config: Config) -> None:
        if config.num_warps == 2:
            raise RuntimeError("out of resource")

    assert tuner(tmp_path, 2.0, 1.0).best("digest", [8], CONFIGS, launch) == CONFIGS[3]

    def failing(config: Config) -> None:
        raise RuntimeError("no GPU")

    assert tuner(tmp_path, 1.0).best("other", [8], CONFIGS, failing) == CONFIGS[0]


DAMAGE: dict[str, Callable[[dict[str, Any]], str]] = {
    "no JSON": lambda found: "{",
    "not a table": lambda found: "[1, 2]",
    "other format": lambda found: json.dumps(found | {"format": 99}),
    "other kernel": lambda found: json.dumps(found | {"kernel": "foreign"}),
    "no choice": lambda found: json.dumps({k: v for k, v in found.items() if k != "chosen"}),
    "unknown choice": lambda found: json.dumps(found | {"chosen": {"constants": {"XBLOCK": 7}, "num_warps": 4}}),
    "code": lambda found: json.dumps(found | {"chosen": "__import__('os')"}),
    "no text": lambda found: "\udcff",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_told_of_and_made_again(damage: str, tmp_path: Path) -> None:
    tuner(tmp_path, 4.0, 3.0, 2.0, 1.0).best("digest", [8], CONFIGS, repr)
    (path,) = tmp_path.iterdir()
    path.write_bytes(DAMAGE[damage](json.loads(path.read_text())).encode(errors="surrogateescape"))
    with pytest.warns(UserWarning, match="is ignored and made again"):
        assert tuner(tmp_path, 1.0, 2.0, 3.0, 4.0).best("digest", [8], CONFIGS, repr) == CONFIGS[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tuner(tmp_path, 9.0).best("digest", [8], CONFIGS, repr) == CONFIGS[0]


def test_a_directory_that_cannot_be_written_only_warns(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="cannot be kept"):
        assert tuner(tmp_path / "missing", 2.0, 1.0).best("digest", [8], CONFIGS, repr) == CONFIGS[1]


PROGRAMS: dict[str, tuple[Callable[..., Any], tuple[tuple[int, ...], ...]]] = {
    "elementwise": (lambda x, y: F.gelu(x) * y, ((70, 33), (33,))),
    "even": (lambda x: x * 2 + 1, ((64, 32),)),
    "rows": (lambda x: x.softmax(-1), ((70, 33),)),
    "long rows": (lambda x: x.softmax(-1), ((150, 9001),)),
    "columns": (lambda x: x.sum(0), ((70, 40),)),
    "linear": (lambda x, w: F.linear(x, w).relu(), ((33, 70), (40, 70))),
    "one row": (lambda x, w: F.linear(x, w).relu(), ((1, 70), (40, 70))),
    "attention": (
        lambda q, k: F.scaled_dot_product_attention(q, k, k, is_causal=True),
        ((1, 2, 37, 16), (1, 2, 37, 16)),
    ),
    "chain": (lambda x: x.sum(), ((1, 90_001),)),
}


def compiled_graph(name: str) -> tuple[GraphModule, list[torch.Tensor], Any]:
    function, shapes = PROGRAMS[name]
    kept: list[GraphModule] = []

    def prepare(graph_module: GraphModule) -> None:
        form_regions(graph_module)
        kept.append(graph_module)

    inputs = [torch.randn(shape) for shape in shapes]
    run(function, *inputs, prepare=prepare)
    return kept[0], inputs, function(*inputs)


@pytest.mark.rotate(one_in=6)
@pytest.mark.parametrize("name", PROGRAMS)
def test_every_configuration_gives_the_same_answer(name: str, tmp_path: Path) -> None:
    """The first call times them all, with the interpreter for a GPU; the last ones are taken and run again."""
    graph_module, inputs, want = compiled_graph(name)
    offered: dict[str, int] = {}

    class Last(Tuner):
        def best(self, digest: str, shapes: Any, configs: Any, run: Any) -> Config:
            offered[digest] = len(configs)
            picked = [configs[0], *configs[1 :: max(1, len(configs) // 3)]]
            return super().best(digest, shapes, picked, run)

    clock = Clock(*(1.0 / n for n in range(1, 99)))
    graph = CompiledGraph(graph_module, True, tuner=Last(tmp_path, "a GPU", "3.9", timer=clock))
    before = [kernel.digest for kernel in graph.kernels.values()]
    for _ in range(2):
        (got,) = graph(*inputs)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-3)
    assert min(offered.values()) >= 2 and len(offered) == len(before)
    assert not set(before) & {kernel.digest for kernel in graph.kernels.values()}, "no other configuration was taken"
    assert "_tuning" not in repr(graph.namespace["launch"])


def test_every_offered_configuration_is_valid_for_its_kernel() -> None:
    for name in PROGRAMS:
        graph_module, inputs, want = compiled_graph(name)
        for kernel in write(graph_module).kernels.values():
            assert kernel.configs[0] == Config(tuple(kernel.constants.items()), kernel.num_warps, kernel.num_stages)
            for config in kernel.configs:
                other: Kernel = kernel.configured(config)
                assert list(other.constants) == list(kernel.constants) and other.text("k") == kernel.text("k")
                assert other.programs([3] * len(kernel.sizes)) >= 0


@pytest.mark.parametrize("name", ["even", "linear", "one row"])
def test_blocks_without_a_mask_divide_their_axis(name: str) -> None:
    """One of the offered configurations after the other, where ends are not masked."""
    function = PROGRAMS[name][0]
    sizes = {"even": ((64, 32),), "linear": ((64, 128), (64, 128)), "one row": ((1, 512), (48, 512))}[name]
    kept: list[GraphModule] = []
    inputs = [torch.randn(size) for size in sizes]
    run(function, *inputs, prepare=lambda graph: (form_regions(graph), kept.append(graph)))
    (kernel,) = write(kept[0]).kernels.values()
    for config in kernel.configs:
        graph = CompiledGraph(kept[0], True)
        graph._chosen = {kernel.digest: config}
        graph._build()
        torch.testing.assert_close(graph(*inputs)[0], function(*inputs), rtol=1e-4, atol=1e-3)


def test_on_the_cpu_the_report_says_that_nothing_is_timed() -> None:
    torch._dynamo.reset()
    options = {"target": "triton", "mode": "max-autotune-no-cudagraphs"}
    with collecting() as report, torch.no_grad():
        compiled = torch.compile(lambda x: x * 2 + 1, backend=graphopt.__name__, options=options)
        assert compiled(torch.ones(3)).equal(torch.full((3,), 3.0))
    assert "kernels are timed on a GPU" in report.graphs[0].notes[0]
