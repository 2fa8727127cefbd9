"""Chains: the operator against its steps one by one, and which nodes of a graph become one."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

import graphopt
from graphopt import ops
from graphopt.backends.cpp import chain, lowerings
from graphopt.lowering import choose
from graphopt.quantization import schemes

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
pytestmark = pytest.mark.usefixtures("cpp_library")
kernels = torch.ops.graphopt_cpp
aten = torch.ops.aten


def check(got: Tensor, want: Tensor) -> None:
    """Within a few units in the last place of the dtype, at the size of the largest element of the row, or of 1."""
    assert got.dtype == want.dtype and got.shape == want.shape and got.is_contiguous()
    allowed = 4 * torch.finfo(want.dtype).eps * want.double().abs().amax(-1, keepdim=True).clamp(min=1)
    assert ((got.double() - want.double()).abs() <= allowed).all(), (got.double() - want.double()).abs().max()


# Each step with what it means; `row` is a weight of the row's size.
STEPS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "add v0 v1": lambda x, y, row: x + y,
    "add v0 w0": lambda x, y, row: x + row,
    "add v0 -0.75": lambda x, y, row: x - 0.75,
    "mul v0 v1": lambda x, y, row: x * y,
    "mul v0 w0": lambda x, y, row: x * row,
    "mul v0 1e-1": lambda x, y, row: x * 0.1,
    "cube v0": lambda x, y, row: x**3,
    "relu v0": lambda x, y, row: x.relu(),
    "tanh v0": lambda x, y, row: x.tanh(),
    "silu v0": lambda x, y, row: F.silu(x),
    "gelu v0": lambda x, y, row: F.gelu(x),
    "gelu_tanh v0": lambda x, y, row: F.gelu(x, approximate="tanh"),
    "rms_norm v0 w0 1e-06 0.0 1.0": lambda x, y, row: torch.ops.graphopt.rms_norm(x, row, 1e-6),
    "rms_norm v0 w0 0.01 1.0 1.0": lambda x, y, row: torch.ops.graphopt.rms_norm(x, row, 0.01, 1.0),
    "rms_norm v0 w0 1e-06 1.0 0.0": lambda x, y, row: torch.ops.graphopt.rms_norm(x, row, 1e-6, 1.0, False),
    "rms_norm v0 - 1e-06 0.0 1.0": lambda x, y, row: torch.ops.graphopt.rms_norm(x, None, 1e-6),
    "layer_norm v0 w0 w1 1e-05": lambda x, y, row: F.layer_norm(x, x.shape[-1:], row, row, 1e-5),
    "layer_norm v0 w0 - 1e-05": lambda x, y, row: F.layer_norm(x, x.shape[-1:], row, None, 1e-5),
    "layer_norm v0 - - 0.5": lambda x, y, row: F.layer_norm(x, x.shape[-1:], None, None, 0.5),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("step", STEPS)
def test_every_step_of_rows(isa: str, threads: int, step: str, dtype: torch.dtype) -> None:
    for m in (1, 3, 16):
        for n in (1, 7, 16, 33, 100, 576):
            x, y, row = (torch.randn(size).mul(3).to(dtype) for size in ((m, n), (m, n), (n,)))
            got = kernels.chain([x, y], [row, row], [], f"{step}; out v2")
            check(got[0], STEPS[step](x, y, row))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("step", ["silu v0", "tanh v0", "gelu v0", "gelu_tanh v0", "relu v0"])
def test_functions_far_out_and_near_zero(isa: str, step: str, dtype: torch.dtype) -> None:
    far = [0.0, -0.0, 1e-6, -1e-6, 1e-3, 0.24, 0.26, 5.0, -5.0, 30.0, -30.0, 88.5, -88.5, 1e4, -1e4, float("nan")]
    x = torch.tensor([far], dtype=dtype)
    (got,) = kernels.chain([x], [], [], f"{step}; out v1")
    want = STEPS[step](x, x, x)
    torch.testing.assert_close(got, want, rtol=4 * torch.finfo(dtype).eps, atol=4e-7, equal_nan=True)


def test_a_mean_far_from_zero_leaves_the_spread(isa: str) -> None:
    x = torch.randn(2, 37) * 1e-2 + 100
    (got,) = kernels.chain([x], [], [], "layer_norm v0 - - 1e-05; out v1")
    want = F.layer_norm(x.double(), (37,), None, None, 1e-5).float()
    assert (got - want).abs().max() < 2e-2  # one unit in the last place of 100 is 7.6e-6, which the spread makes 1e-3


def packed(scheme: str, weight: Tensor) -> list[Tensor]:
    return [weight] if scheme == "plain" else list(torch.ops.graphopt.quantize_weight(weight, scheme))


def multiplied(scheme: str, x: Tensor, parts: list[Tensor], bias: Tensor | None) -> Tensor:
    if scheme == "plain":
        return kernels.linear(x, parts[0], bias)  # type: ignore[no-any-return]
    return kernels.quantized_linear(x, parts, bias, scheme)  # type: ignore[no-any-return]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", ("plain", "int8", "int8-g64", "int4-g32", "q4_k", "mxfp4", "fp8", "int8-dynamic"))
@pytest.mark.parametrize("m", (1, 3, 16))
def test_a_block_equals_its_operators(isa: str, threads: int, scheme: str, dtype: torch.dtype, m: int) -> None:
    """Bit for bit: the linears are the same kernels, and rows are rounded where tensors would be."""
    hidden, wide = 96, 200
    torch.manual_seed(m)
    x, before = (torch.randn(1, m, hidden).to(dtype) for _ in range(2))
    norm = torch.rand(hidden).to(dtype)
    o, gate, up, q = (packed(scheme, torch.randn(n, hidden).div(8).to(dtype)) for n in (hidden, wide, wide, 64))
    down, bias = packed(scheme, torch.randn(hidden, wide).div(8).to(dtype)), torch.randn(hidden).to(dtype)
    count = len(o)
    places = [0, count, count + 1, 2 * count + 1, 3 * count + 1, 4 * count + 1, 4 * count + 2]
    text = (
        "linear S v0 w{} -; add v1 v2; rms_norm v3 w{} 1e-06 0.0 1.0; linear S v4 w{} - w{} -; silu v5; mul v7 v6;"
        " linear S v8 w{} w{}; add v3 v9; linear S v10 w{} -; out v3 v10 v11"
    ).format(*places)
    got = kernels.chain([x, before], [*o, norm, *gate, *up, *down, bias, *q], [], text.replace("S", scheme))
    middle = multiplied(scheme, x, o, None) + before
    (normed,) = kernels.chain([middle], [norm], [], "rms_norm v0 w0 1e-06 0.0 1.0; out v1")
    (act,) = kernels.chain([multiplied(scheme, normed, gate, None)], [], [], "silu v0; out v1")
    last = middle + multiplied(scheme, act * multiplied(scheme, normed, up, None), down, bias)
    for mine, theirs in zip(got, (middle, last, multiplied(scheme, last, q, None)), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("count", (2, 3))
def test_threads_wait_for_each_other_behind_linears(isa: str, count: int) -> None:
    """Rows that follow need all of a linear's: pieces that a late thread still works on, too."""
    before, size = torch.get_num_threads(), 512
    x, weights = torch.randn(1, size), [torch.randn(size, size) / size**0.5 for _ in range(8)]
    steps = [f"linear plain v{2 * i} w{i} -; silu v{2 * i + 1}" for i in range(len(weights))]
    text = "; ".join([*steps, f"out v{2 * len(weights)}"])
    try:
        torch.set_num_threads(1)
        (alone,) = kernels.chain([x], weights, [], text)
        torch.set_num_threads(count)
        for _ in range(600):
            assert torch.equal(kernels.chain([x], weights, [], text)[0], alone)
    finally:
        torch.set_num_threads(before)


RANDOM = (
    "linear plain v{a} w0 w1",
    "add v{a} v{b}",
    "mul v{a} v{b}",
    "silu v{a}",
    "rms_norm v{a} w1 0.1 0.0 1.0",
)


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_any_steps_in_any_order(data: st.DataObject) -> None:
    """Random chains, also on more threads than there are processors, against calls of one step: bit for bit."""
    n, m = data.draw(st.sampled_from([8, 33, 250])), data.draw(st.integers(1, 16))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    values, weights, lines = [torch.randn(m, n)], [torch.randn(n, n) / n**0.5, torch.randn(n)], []
    for number in range(data.draw(st.integers(1, 9))):
        a, b = (data.draw(st.integers(0, number)) for _ in range(2))
        step = data.draw(st.sampled_from(RANDOM))
        lines.append(step.format(a=a, b=b))
        values += kernels.chain([values[a], values[b]], weights, [], f"{step.format(a=0, b=1)}; out v2")
    shown = " ".join(f"v{number}" for number in range(1, len(values)))
    before = torch.get_num_threads()
    torch.set_num_threads(data.draw(st.integers(1, 5)))
    try:
        got = kernels.chain(values[:1], weights, [], "; ".join([*lines, f"out {shown}"]))
    finally:
        torch.set_num_threads(before)
    for mine, want in zip(got, values[1:], strict=True):
        torch.testing.assert_close(mine, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("values", "weights", "text", "message"),
    [
        ([(17, 8)], [], "silu v0; out v1", "at most 16 rows, got 17"),
        ([(2, 8)], [], "sine v0; out v1", "no step 'sine'"),
        ([(2, 8)], [], "silu 3; out v1", "'silu' begins with a value"),
        ([(2, 8)], [], "silu vx; out v1", "no operand 'vx'"),
        ([(2, 8)], [], "silu v-1; out v1", "no operand 'v-1'"),
        ([(2, 8)], [], "silu v4; out v1", "no value 4"),
        ([(2, 8)], [], "silu v0; out v0", "v0 is no result"),
        ([(2, 8), (2, 9)], [], "add v0 v1; out v2", "rows of 8 and of 9 elements"),
        ([(2, 8)], [(9,)], "mul v0 w0; out v1", r"\[9\] of float is no row of 8 elements"),
        ([(2, 8)], [(5, 9)], "linear plain v0 w0 -; out v1", r"a weight \[5, 9\] of float is not for 8 columns"),
        ([(2, 8)], [], "linear plain v0 w0 -; out v1", "no weight 0"),
        ([(2, 8)], [(5, 8)], "linear int9 v0 w0 -; out v1", "no quantisation scheme 'int9'"),
        ([(2, 8), (3, 8)], [], "add v0 v1; out v2", "values must be 2 rows"),
    ],
)
def test_what_is_wrong_is_said(values: Any, weights: Any, text: str, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        kernels.chain([torch.ones(size) for size in values], [torch.ones(size) for size in weights], [], text)


def test_fake_results_are_like_real_ones() -> None:
    text = "rms_norm v0 - 1e-06 0.0 1.0; linear int4-g32 v1 w0 - w3 -; out v1 v3 v2"
    x, parts = torch.randn(2, 1, 64), packed("int4-g32", torch.randn(5, 64)) + packed("int4-g32", torch.randn(7, 64))
    real = kernels.chain([x], parts, [], text)
    with FakeTensorMode() as mode:
        fake = kernels.chain([mode.from_tensor(x)], [mode.from_tensor(part) for part in parts], [], text)
    assert [(t.shape, t.stride(), t.dtype) for t in fake] == [(t.shape, t.stride(), t.dtype) for t in real]


# What becomes a chain. ------------------------------------------------------------------------------------------------


def formed(function: Callable[..., Any], *inputs: Any) -> tuple[fx.GraphModule, list[str]]:
    """The graph of a function with its chains, and their steps; checks that it still answers as before."""
    lowered = {op: lowering for lowering in lowerings() for op in [lowering.op]}
    graph_module = make_fx(function, tracing_mode="fake")(*inputs)
    want = function(*inputs)
    choose(graph_module, list(lowered.values()))
    choices = chain.form(graph_module)
    steps = texts(graph_module)
    assert len(choices) == len(steps)
    graph_module.graph.lint()
    graph_module.recompile()
    got = graph_module(*inputs)
    for mine, theirs in zip(tree_leaves(got), tree_leaves(want), strict=True):
        torch.testing.assert_close(mine, theirs)
        assert mine.stride() == theirs.stride()
    return graph_module, steps


def texts(graph_module: fx.GraphModule) -> list[str]:
    """The steps of the chains in a graph."""
    targets = (kernels.chain.default, kernels.chain_into.default)
    return [node.args[-1] for node in graph_module.graph.nodes if node.target in targets]


def weight(*size: int) -> Tensor:
    return torch.randn(size) / size[-1] ** 0.5


def test_a_gated_mlp_is_one_chain() -> None:
    def mlp(x: Tensor, norm: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        normed = ops.rms_norm(x, norm, 1e-6)
        left, right = ops.parallel_linear(normed, [gate, up], [None, None])
        return x + ops.linear(F.silu(left) * right, down)

    _, (steps,) = formed(mlp, torch.randn(1, 1, 8), torch.rand(8), weight(12, 8), weight(12, 8), weight(8, 12))
    assert steps == (
        "rms_norm v0 w0 1e-06 0.0 1.0; linear plain v1 w1 - w2 -; silu v2; mul v4 v3; linear plain v5 w3 -; add v0 v6;"
        " out v7"
    )


def test_biases_layer_norm_and_numbers() -> None:
    def mlp(x: Tensor, scale: Tensor, shift: Tensor, up: Tensor, bias: Tensor, down: Tensor) -> Tensor:
        normed = F.layer_norm(x, (8,), scale, shift)
        wide = ops.linear(normed, up, bias)
        return x * 2.5 + ops.linear(F.gelu(wide, approximate="tanh"), down)

    inputs = torch.randn(3, 8), torch.rand(8), torch.rand(8), weight(12, 8), torch.rand(12), weight(8, 12)
    graph_module, (steps,) = formed(mlp, *inputs)
    assert steps == (
        "layer_norm v0 w0 w1 1e-05; linear plain v2 w2 w3; gelu_tanh v3; linear plain v4 w4 -; add v1 v5; out v6"
    )
    left = {node.target for node in graph_module.graph.nodes if node.op == "call_function"}
    assert aten.mul.Tensor in left  # it waits for no linear and can be fused with what made x


def test_quantised_weights() -> None:
    parts = list(torch.ops.graphopt.quantize_weight(torch.randn(8, 64), "int8"))
    name = schemes.named("int8").name

    def function(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
        return F.relu(torch.ops.graphopt.quantized_linear(x, [codes, scales], None, name))

    _, (steps,) = formed(function, torch.randn(1, 64), *parts)
    assert steps == f"linear {name} v0 w0 -; relu v1; out v2"


def two(x: Tensor, a: Tensor, b: Tensor) -> Any:
    return ops.linear(F.silu(ops.linear(x, a)), b)


X, A, B = torch.randn(2, 8), weight(12, 8), weight(8, 12)


def test_a_reader_in_the_middle_ends_a_chain() -> None:
    def function(x: Tensor, a: Tensor, b: Tensor) -> Any:
        middle = F.silu(ops.linear(x, a))
        return middle.sort(-1).values, F.relu(ops.linear(middle, b))

    _, steps = formed(function, torch.randn(2, 8), A, B)
    assert steps == ["linear plain v0 w0 -; silu v1; out v2", "linear plain v0 w0 -; relu v1; out v2"]


def test_a_result_that_is_picked_behind_the_end_of_a_chain() -> None:
    def function(x: Tensor, a: Tensor, b: Tensor) -> Any:
        both = ops.parallel_linear(F.silu(ops.linear(x, a)), [b, b], [None, None])
        first = both[0].sort(-1).values
        return first, both[1].sort(-1).values

    inputs = torch.randn(2, 8), A, B
    graph_module = make_fx(function, tracing_mode="fake")(*inputs)
    late = [node for node in graph_module.graph.nodes if node.target is operator.getitem and node.args[1] == 1][0]
    next(node for node in graph_module.graph.nodes if node.target is aten.sort.default).append(late)
    choose(graph_module, lowerings())
    assert len(chain.form(graph_module)) == 1
    graph_module.graph.lint()
    graph_module.recompile()
    torch.testing.assert_close(graph_module(*inputs), function(*inputs))


def test_a_write_ends_a_chain() -> None:
    def function(x: Tensor, a: Tensor, b: Tensor, cache: Tensor) -> Tensor:
        middle = F.silu(ops.linear(x, a))
        aten.add_.Tensor(cache, 1)
        return F.relu(ops.linear(middle, b))

    graph_module = make_fx(function, tracing_mode="fake")(torch.randn(2, 8), A, B, torch.zeros(3))
    choose(graph_module, lowerings())
    assert len(chain.form(graph_module)) == 2
    assert texts(graph_module) == [
        "linear plain v0 w0 -; silu v1; out v2",
        "linear plain v0 w0 -; relu v1; out v2",
    ]


def test_what_is_read_outside_is_given_out_once() -> None:
    def function(x: Tensor, a: Tensor, b: Tensor) -> Any:
        middle = ops.linear(x, a)
        active = F.silu(middle)
        return ops.linear(active, b), middle, active, middle

    _, (steps,) = formed(function, torch.randn(2, 8), A, B)
    assert steps.endswith("out v1 v2 v3")


@pytest.mark.parametrize(
    ("function", "inputs"),
    [
        pytest.param(two, (torch.randn(17, 8), A, B), id="more than sixteen rows"),
        pytest.param(two, (torch.randn(0, 8), A, B), id="no rows"),
        pytest.param(two, (torch.randn(8), A, B), id="a vector"),
        pytest.param(two, (torch.randn(2, 8).double(), A.double(), B.double()), id="float64"),
        pytest.param(lambda x, a: ops.linear(x, a), (X, A), id="one step"),
        pytest.param(lambda x: F.silu(x) * x, (X,), id="no linear"),
        pytest.param(lambda x, a, y: torch.add(ops.linear(x, a), y, alpha=2), (X, A, torch.rand(2, 12)), id="alpha"),
        pytest.param(lambda x, a: F.silu(ops.linear(x, a)), (X, weight(8).expand(12, 8)), id="expanded weight"),
        pytest.param(lambda x, a, b: F.silu(ops.linear(x, a, b)), (X, A, torch.rand(24)[::2]), id="strided bias"),
        pytest.param(lambda x, a, y: ops.linear(x, a) + y, (X, A, torch.rand(2, 1)), id="broadcast"),
        pytest.param(
            lambda x, a, y: ops.linear(x, a) * y, (X.bfloat16(), A.bfloat16(), torch.rand(12)), id="two dtypes"
        ),
        pytest.param(
            lambda x, a: torch.ops.aten.native_layer_norm(ops.linear(x, a), [2, 12], None, None, 1e-5)[0],
            (X, A), id="a norm over two dimensions",
        ),
        pytest.param(
            lambda x, a: torch.ops.aten.native_layer_norm(ops.linear(x, a), [12], None, None, 1e-5)[:2],
            (X, A), id="statistics of a norm are read",
        ),
        pytest.param(lambda x, a: ops.linear(x, a) ** 2, (X, A), id="another power"),
    ],
)  # fmt: skip
def test_left_alone(function: Callable[..., Any], inputs: tuple[Tensor, ...]) -> None:
    assert formed(function, *inputs)[1] == []


def test_sizes_that_are_not_known_are_left_alone() -> None:
    graph_module = make_fx(two, tracing_mode="symbolic")(torch.randn(3, 8), A, B)
    choose(graph_module, lowerings())
    assert chain.form(graph_module) == []


@pytest.mark.rotate(one_in=2)
def test_training_has_no_chains() -> None:
    model = nn.Sequential(nn.Linear(8, 12), nn.SiLU(), nn.Linear(12, 8))
    compiled = torch.compile(model, backend="graphopt", options={"strict": True})
    x = torch.randn(2, 8)
    compiled(x).sum().backward()
    grads = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    model(x).sum().backward()
    for mine, parameter in zip(grads, model.parameters(), strict=True):
        torch.testing.assert_close(mine, parameter.grad)


def test_the_report_shows_chains() -> None:
    model = nn.Sequential(nn.Linear(8, 12), nn.SiLU(), nn.Linear(12, 8)).eval()
    with torch.no_grad():
        found = graphopt.explain(model, torch.randn(2, 8))
    assert re.search(r"a chain of 2 linear, 1 silu +│ cpp\.chain", str(found))
