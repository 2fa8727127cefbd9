"""Kernels of the user's take what they support on every target, refuse the rest, and are checked as passes are."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import graphopt
from graphopt import ops, standalone
from graphopt.errors import OptionError
from graphopt.html import render
from graphopt.lowering import CustomLowering, arguments, lowering
from graphopt.passes.recognize.recognize_attention import recognize_attention
from graphopt.passes.recognize.recognize_rms_norm import recognize_rms_norm
from graphopt.testing import assert_not_applied, check_kernel, check_pass

aten = torch.ops.aten


def float32_only(node: torch.fx.Node) -> str | None:
    return None if arguments(node)["x"].meta["val"].dtype == torch.float32 else "it computes in float32 only"


@lowering(ops.rms_norm, float32_only)
def mean_square_norm(x, weight, eps, weight_offset, cast_first):
    scale = x.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    return x * scale if weight is None else x * scale * (weight + weight_offset)


@lowering(ops.rms_norm, lambda node: None)
def norm_without_epsilon(x, weight, eps, weight_offset, cast_first):
    return weight * x * x.square().mean(-1, keepdim=True).rsqrt()


def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-3)).to(x.dtype) + 1


def operands(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [torch.randn(3, 8).to(dtype), torch.randn(8).to(dtype)]


@pytest.mark.parametrize("target", ["reference", "triton", pytest.param("cpu", marks=pytest.mark.rotate(one_in=4)),
                                    pytest.param("inductor", marks=pytest.mark.rotate(one_in=4))])  # fmt: skip
def test_runs_on_every_target_at_two_sizes(target: str) -> None:
    torch.compiler.reset()
    options = {"target": target, "passes": [mean_square_norm], "strict": True}
    compiled = torch.compile(norm, backend="graphopt", options=options)
    for rows in (3, 5):
        x, weight = torch.randn(rows, 8), torch.randn(8)
        torch.testing.assert_close(compiled(x, weight), norm(x, weight))
    (graph,) = graphopt.explain(norm, *operands(), options=options).graphs
    assert {done.name: done.rewrites for done in graph.passes}["mean_square_norm"] == 1


def test_keeps_the_contract_of_passes() -> None:
    traced = check_pass([recognize_rms_norm, mean_square_norm], norm, operands(), count=1)
    assert "graphopt_kernels.mean_square_norm" in str(traced.after.graph)
    check_kernel(ops.rms_norm, mean_square_norm.kernel, [*operands(), 1e-3, 0.5, False])


def test_refuses_with_the_reason_that_it_is_given() -> None:
    passes = [recognize_rms_norm, mean_square_norm]
    assert_not_applied(passes, norm, operands(torch.bfloat16), reason="float32 only")


def test_a_wrong_kernel_is_undone_by_verification_and_left_out_by_a_limit() -> None:
    options = {"target": "reference", "passes": [norm_without_epsilon]}
    (graph,) = graphopt.explain(norm, *operands(), options={**options, "verify": "sample"}).graphs
    (undone,) = [done for done in graph.passes if done.error]
    assert undone.name == "norm_without_epsilon" and "VerificationError" in undone.error
    (limited,) = graphopt.explain(norm, *operands(), options={**options, "limit": 1}).graphs
    assert {done.name: done.rewrites for done in limited.passes}["norm_without_epsilon"] == 0


def test_takes_arguments_that_are_given_by_name_only() -> None:
    @lowering(ops.attention, lambda node: None)
    def attend(q, k, v, mask=None, *, is_causal, scale, softcap, window, nan_rows):
        assert (softcap, window, nan_rows) == (0.0, 0, False)
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, mask, is_causal=is_causal, scale=scale, enable_gqa=True
        )
        return out.transpose(1, 2).contiguous().transpose(1, 2)

    def program(q, k, v):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True) + 1

    q, k, v = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 3, 8), torch.randn(2, 2, 3, 8)
    check_pass([recognize_attention, attend], program, [q, k, v], count=1)


def test_takes_plain_operators_too() -> None:
    @lowering(aten.relu.default, lambda node: None, exactness="bitwise")
    def positive_part(x):
        return torch.where(x > 0, x, torch.where(x.isnan(), x, 0.0))

    check_pass(positive_part, lambda x: x.relu() + 1, [torch.randn(3, 4)], count=1)


def test_a_kernel_defined_again_is_another_one() -> None:
    def make(number: float) -> CustomLowering:
        @lowering(aten.neg.default, lambda node: None)
        def opposite(x):
            return x * number

        return opposite

    first, second = make(-1.0), make(-2.0)
    assert first.kernel(torch.ones(1)).item() == -1.0 and second.kernel(torch.ones(1)).item() == -2.0


@pytest.mark.parametrize(
    ("op", "function", "message"),
    [
        (torch.relu, lambda x: x, "an operator overload is needed"),
        (aten.relu_.default, lambda x: x, "updates its arguments"),
        (aten.view.default, lambda x, size: x, "returns views"),
        (ops.rms_norm, lambda x, weight: x, "cannot take the arguments of graphopt::rms_norm"),
    ],
)
def test_what_cannot_be_lowered_is_an_error(op, function, message) -> None:
    with pytest.raises(OptionError, match=message):
        lowering(op, lambda node: None)(function)


# A file as a user writes it: a Triton kernel, a helper, a constant, the question, the decorator.
USERS_FILE = """
import torch
import triton
import triton.language as tl
from torch import empty_like as like
from graphopt import ops
from graphopt.backends.triton import interpret
from graphopt.lowering import arguments, lowering

STRETCH = 1.5

@triton.jit
def doubled(value):
    return value + value

@triton.jit
def norm_rows(x, weight, out, eps, stretch, columns, BLOCK: tl.constexpr):
    row, column = tl.program_id(0), tl.arange(0, BLOCK)
    inside = column < columns
    value = tl.load(x + row * columns + column, mask=inside, other=0.0)
    scale = 1 / tl.sqrt(tl.sum(value * value, 0) / columns + eps)
    gain = tl.load(weight + column, mask=inside, other=0.0)
    tl.store(out + row * columns + column, gain * (doubled(value) * scale) / 2 * stretch, mask=inside)

def interpreted(programs):
    return lambda *args, **constants: interpret.launch(norm_rows, programs, *args, **constants)

@lowering(ops.rms_norm, lambda node: None)
def stretched_norm(x, weight, eps, weight_offset, cast_first):
    out, columns = like(x), x.shape[-1]
    interpreted(x.numel() // columns)(x, weight, out, eps, STRETCH, columns, BLOCK=triton.next_power_of_2(columns))
    return out
"""


def test_the_report_the_dump_and_the_reproducer_hold_the_users_kernel(tmp_path: Path) -> None:
    """The programs run in another directory, where the user's file cannot be imported."""
    (tmp_path / "users_kernels.py").write_text(USERS_FILE)
    spec = importlib.util.spec_from_file_location("users_kernels", tmp_path / "users_kernels.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["users_kernels"] = module
    spec.loader.exec_module(module)
    options = {"target": "reference", "passes": [module.stretched_norm]}
    report = graphopt.explain(norm, *operands(), options={**options, "dump": tmp_path / "right"})
    (kernel,) = [kernel for kernel in report.graphs[0].kernels if kernel.name == "stretched_norm"]
    assert "tl.store(out" in kernel.source and "STRETCH = 1.5" in kernel.source and kernel.calls
    assert "tl.store(out" in render(report, "a kernel of the user&#39;s")
    (written,) = (tmp_path / "right").glob("graph_*/kernels/stretched_norm.py")
    assert "def doubled(value)" in written.read_text()
    (program,) = (tmp_path / "right").glob("graph_*/*_stretched_norm.py")
    done = run_elsewhere(program)
    assert done.returncode == 0 and "tensor(" in done.stdout, done.stderr

    graphopt.explain(norm, *operands(), options={**options, "dump": tmp_path / "wrong", "verify": "sample"})
    (reproducer,) = (tmp_path / "wrong" / "repro").glob("repro_stretched_norm_*.py")
    done = run_elsewhere(reproducer)
    assert done.returncode == 1 and "elements differ" in done.stderr and "Traceback" not in done.stderr, done.stderr


def run_elsewhere(program: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", str(program)]
    return subprocess.run(command, cwd="/", capture_output=True, text=True, check=False)


def test_a_kernel_without_source_says_so() -> None:
    scope: dict[str, Any] = {}
    exec("def typed_in(x, weight, eps, weight_offset, cast_first):\n    return x.clone()", scope)
    made = lowering(ops.rms_norm, lambda node: None)(scope["typed_in"])
    report = graphopt.explain(norm, *operands(), options={"target": "reference", "passes": [made]})
    (kernel,) = [kernel for kernel in report.graphs[0].kernels if kernel.name == "typed_in"]
    assert kernel.source == "# There is no source of typed_in that stands alone: typed_in has no source.\n"


TABLE = torch.ones(2)


def needs_a_tensor(x: torch.Tensor) -> torch.Tensor:
    return x + TABLE


def test_what_no_program_can_hold_is_named() -> None:
    with pytest.raises(standalone.Unwritable, match="TABLE is a Tensor"):
        standalone.source(needs_a_tensor)
