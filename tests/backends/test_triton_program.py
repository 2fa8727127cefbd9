"""The generated file: readable, deterministic, runnable alone, reusing buffers, and closed to what a graph is named."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.fx import GraphModule

import graphopt.ops  # noqa: F401  (registers the dialect)
from graphopt.backends.triton.compile import CompiledGraph, KernelFailed, compile_graph, load
from graphopt.backends.triton.expressions import literal
from graphopt.backends.triton.program import write
from graphopt.passes.fuse.form_regions import form_regions
from tests.backends.graphs import as_one_region, run

dialect = torch.ops.graphopt
GOLDEN = Path(__file__).parent.parent / "golden" / "triton"
HOSTILE = "x\n    import os; os.system('touch /tmp/owned')\n#"


def llama(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *w: torch.Tensor) -> torch.Tensor:
    """A decoder layer in the dialect: 8 tokens, 4 heads, 2 KV heads."""
    normed = dialect.rms_norm(x, w[0], 1e-6)
    q, k, v = dialect.parallel_linear(normed, w[1:4], [None] * 3)
    q, k, v = (t.view(1, 8, -1, 16).transpose(1, 2) for t in (q, k, v))
    seen = dialect.attention(dialect.rope(q, cos, sin), dialect.rope(k, cos, sin), v, is_causal=True, scale=0.25)
    x = x + dialect.linear(seen.transpose(1, 2).reshape(1, 8, 64), w[4])
    gate, up = dialect.parallel_linear(dialect.rms_norm(x, w[5], 1e-6), w[6:8], [None] * 2)
    result: torch.Tensor = x + dialect.linear(F.silu(gate) * up, w[8])
    return result


def encoder(x: torch.Tensor, first: bool, *w: torch.Tensor) -> torch.Tensor:
    """A GPT-2 (norms first, causal) or BERT (norms last) layer in the dialect: 8 tokens, 4 heads."""

    def norm(t: torch.Tensor, i: int) -> torch.Tensor:
        return F.layer_norm(t, (64,), w[i], w[i + 1])

    q, k, v = dialect.parallel_linear(norm(x, 0) if first else x, w[4:7], w[7:10])
    q, k, v = (t.view(1, 8, 4, 16).transpose(1, 2) for t in (q, k, v))
    seen = dialect.attention(q, k, v, is_causal=first, scale=0.25).transpose(1, 2).reshape(1, 8, 64)
    x = x + dialect.linear(seen, w[10], w[11])
    x = x if first else norm(x, 0)
    wide = F.gelu(dialect.linear(norm(x, 2) if first else x, w[12], w[13]), approximate="tanh" if first else "none")
    x = x + dialect.linear(wide, w[14], w[15])
    return x if first else norm(x, 2)


def block_source(name: str) -> str:
    """The generated file of one layer in bfloat16."""
    torch.manual_seed(0)
    llama_sizes = [(64,), (64, 64), (32, 64), (32, 64), (64, 64), (64,), (96, 64), (96, 64), (64, 96)]
    sizes = [(64,)] * 4 + [(64, 64)] * 3 + [(64,)] * 3 + [(64, 64), (64,), (96, 64), (96,), (64, 96), (64,)]
    x = torch.randn(1, 8, 64).bfloat16()
    if name == "llama":
        inputs = [x, *(torch.randn(s).bfloat16() / 8 for s in [(8, 16), (8, 16), *llama_sizes])]
        got, compiled = run(llama, *inputs, prepare=form_regions)
        want = llama(*inputs)
    else:
        weights = [torch.randn(s).bfloat16() / 8 for s in sizes]
        got, compiled = run(lambda x, *w: encoder(x, name == "gpt2", *w), x, *weights, prepare=form_regions)
        want = encoder(x, name == "gpt2", *weights)
    torch.testing.assert_close(got, want, rtol=5e-2, atol=5e-2)
    assert compiled[0].fallbacks == []
    assert compiled[0].launches <= (6 if name == "llama" else 7)
    lines = compiled[0].source.splitlines()
    return "\n".join(line for line in lines if not line.startswith("# from ")) + "\n"


@pytest.mark.parametrize("name", ["llama", "bert", "gpt2"])
def test_source_of_a_block(name: str, request: pytest.FixtureRequest) -> None:
    source = block_source(name)
    assert source == block_source(name), "generation is not deterministic"
    path = GOLDEN / f"{name}.py.txt"
    if request.config.getoption("--update-golden", default=False) or not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    assert source == path.read_text(), f"{path} differs: look at the change, then delete the file and run again"


def captured(*inputs: torch.Tensor) -> GraphModule:
    kept: list[GraphModule] = []

    def function(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return F.relu(x + w) * 2

    run(function, *inputs, prepare=lambda graph: kept.append(graph))
    return kept[0]


def test_names_of_a_graph_reach_the_source_only_as_harmless_comments() -> None:
    graph_module = as_one_region(captured(torch.randn(3, 4), torch.randn(4)))
    region = graph_module.get_submodule("region_0")
    assert isinstance(region, GraphModule)
    for node in [*graph_module.graph.nodes, *region.graph.nodes]:
        node.name = HOSTILE
        node.meta["stack_trace"] = 'File "x.py\x1b#; import os", line 1, in f\n    import os'
    program = write(graph_module)
    assert "\n    import os" not in program.source
    for line in program.source.splitlines():
        if "owned" in line:
            assert line.startswith("# ")
    calls = {n.func.attr for n in ast.walk(ast.parse(program.source))
             if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute)}
    assert "system" not in calls


@pytest.mark.parametrize("value", [HOSTILE, object(), None, [1]])
def test_only_numbers_become_literals(value: object) -> None:
    with pytest.raises(TypeError, match="not a number"):
        literal(value)


def test_a_subclass_of_a_number_prints_as_the_number() -> None:
    class Evil(float):
        def __repr__(self) -> str:
            return "__import__('os').system('true')"

    assert literal(Evil(2.5)) == "2.5"


def test_special_numbers_keep_their_value() -> None:
    x = torch.randn(5)
    got, _ = run(lambda a: (a + float("inf"), a * float("nan"), a * -0.0, a + 1e-45, a * 3), x)
    torch.testing.assert_close(got, (x + float("inf"), x * float("nan"), x * -0.0, x + 1e-45, x * 3), equal_nan=True)


def test_what_has_no_kernel_runs_as_aten_and_is_named() -> None:
    x = torch.randn(4, 5)
    got, compiled = run(lambda a: torch.sort(a + 1, -1)[0] * 2, x, prepare=form_regions)
    torch.testing.assert_close(got, torch.sort(x + 1, -1)[0] * 2)
    assert [f.target for f in compiled[0].fallbacks] == ["aten.sort.default"]
    assert compiled[0].launches == 2


def test_a_region_without_a_kernel_runs_by_its_own_graph() -> None:
    x = torch.randn(4, 5)
    got, compiled = run(lambda a: torch.digamma(a.abs() + 1) * 2, x)
    torch.testing.assert_close(got, torch.digamma(x.abs() + 1) * 2)
    assert "digamma" in compiled[0].fallbacks[0].reason and compiled[0].launches == 0


def test_memory_of_dead_buffers_is_taken_again() -> None:
    def function(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        for _ in range(4):
            x = torch.cumsum((x @ w).relu(), 0)
        return x

    x, w = torch.randn(8, 8), torch.randn(8, 8) / 8
    got, compiled = run(function, x, w, prepare=form_regions)
    torch.testing.assert_close(got, function(x, w), rtol=1e-4, atol=1e-4)
    call = compiled[0].source.split("def call", 1)[1]
    assert call.count("empty_strided") < call.count("launch(")


def test_outputs_that_alias_inputs_stay_views() -> None:
    x = torch.randn(4, 6)
    got, _ = run(lambda a: (a.view(24), a[1:], a + 1), x, prepare=form_regions)
    assert got[0].data_ptr() == x.data_ptr() and got[1].data_ptr() == x[1:].data_ptr()


def test_updates_of_inputs_happen_after_every_reader() -> None:
    def function(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        before = x.sum(-1)
        x.mul_(2)
        y.copy_(x + 1)
        return before + x.sum(-1)

    eager = [torch.randn(3, 4), torch.randn(3, 4)]
    mine = [t.clone() for t in eager]
    want = function(*eager)
    got, _ = run(function, *mine, prepare=form_regions)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(mine, eager)


def test_the_file_runs_alone(tmp_path: Path) -> None:
    x = torch.randn(4, 8)
    got, compiled = run(lambda a: F.relu(a) + 1, x)
    file = tmp_path / "kernels.py"
    file.write_text(compiled[0].source)
    script = (f"import runpy, torch; call = runpy.run_path({str(file)!r})['call'];"
              "x = torch.arange(32.).view(4, 8) - 9; assert call([x])[0].equal(torch.relu(x) + 1)")
    environment = {"TRITON_INTERPRET": "1", "PATH": "/usr/bin:/bin"}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment, timeout=120)
    torch.testing.assert_close(got, F.relu(x) + 1)


def test_an_empty_graph() -> None:
    graph_module = captured(torch.randn(3, 4), torch.randn(4))
    returned = graph_module.graph.output_node()
    placeholders = [n for n in graph_module.graph.nodes if n.op == "placeholder"]
    returned.args = ((placeholders[0],),)
    graph_module.graph.eliminate_dead_code()
    x = torch.randn(3, 4)
    assert compile_graph(graph_module, interpret=True)(x, torch.randn(4))[0] is x


def test_load_keeps_the_text_where_triton_looks_for_it() -> None:
    import inspect

    names = load("def answer():\n    return 42\n")
    assert names["answer"]() == 42 and "return 42" in inspect.getsource(names["answer"])




def failing(compiled: CompiledGraph) -> CompiledGraph:
    """Let the first kernel fail, as one that asks for too much shared memory would."""

    def launch(kernel: Any, grid: int, *arguments: Any, **constants: Any) -> None:
        raise RuntimeError("out of resource: shared memory")

    compiled.namespace["launch"] = compiled._guarded(launch)
    return compiled


def test_a_kernel_that_fails_is_left_out_and_named() -> None:
    graph_module = as_one_region(captured(torch.randn(3, 4), torch.randn(4)))
    compiled = failing(compile_graph(graph_module, interpret=True))
    x, w = torch.randn(3, 4), torch.randn(4)
    torch.testing.assert_close(compiled(x, w)[0], F.relu(x + w) * 2)
    assert compiled.launches == 0 and "shared memory" in compiled.fallbacks[0].reason


def test_strict_raises_when_a_kernel_fails() -> None:
    graph_module = as_one_region(captured(torch.randn(3, 4), torch.randn(4)))
    compiled = failing(compile_graph(graph_module, interpret=True, strict=True))
    with pytest.raises(KernelFailed, match="kernel_0_rows: RuntimeError: out of resource"):
        compiled(torch.randn(3, 4), torch.randn(4))
