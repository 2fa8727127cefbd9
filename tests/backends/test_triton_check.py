"""Generated kernels compile for GPUs that are not there, without spills."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.fx import GraphModule

from graphopt import backend, pipeline
from graphopt.backends.triton import check
from graphopt.backends.triton.check import TARGETS, Resources, resources
from graphopt.options import Options
from graphopt.passes.fuse.form_regions import form_regions
from tests.backends.graphs import run
from tests.backends.test_triton_matmul import fuse
from tests.backends.test_triton_models import DECODERS, bert, gpt2, logits, optimize
from tests.backends.test_triton_rows import rms_norm

bf16 = torch.bfloat16


def prepare(graph_module: GraphModule) -> None:
    options = Options(target="triton")
    pipeline.run(graph_module, backend.arranged(options, "triton"), options)


def kernels(function: Any, *inputs: Any, prepare: Any = form_regions) -> list[Any]:
    _, compiled = run(function, *inputs, prepare=prepare)
    return list(compiled[0].kernels.values())


def past_with_alibi(rows: int, size: int) -> list[Any]:
    """Of attention over padded keys, with a bias by distance."""

    def function(q: Any, k: Any, v: Any, slopes: Any, padding: Any) -> Any:
        keys = torch.arange(400)
        seen = (keys <= torch.arange(rows)[:, None] + 400 - rows) & padding.bool()[:, None, None]
        mask = torch.where(seen, slopes[:, None, None] * keys, float("-inf")).to(bf16)
        return torch.ops.graphopt.attention(q, k, v, mask, scale=0.3)

    tensors = (torch.randn(2, heads, n, size).to(bf16) for heads, n in ((8, rows), (2, 400), (2, 400)))
    return kernels(function, *tensors, torch.rand(8), torch.ones(2, 400, dtype=torch.long))


def rows_into_a_cache(rows: int) -> list[Any]:
    """Of a step of a decoder layer with 4 query heads and 2 of keys and values, behind 300 tokens."""

    def function(x: Any, past: Any, other: Any, cos: Any, sin: Any, *weights: Any) -> Any:
        q, k, v = (F.linear(x, w).view(2, rows, -1, 64).transpose(1, 2) for w in weights)
        q, k = (torch.ops.graphopt.rope(t, cos, sin) for t in (q, k))
        keys, values = torch.cat([past, k], 2), torch.cat([other, v], 2)
        return F.scaled_dot_product_attention(q, keys, values, enable_gqa=True), keys, values

    sizes = [(2, rows, 256), (2, 2, 300, 64), (2, 2, 300, 64), (rows, 64), (rows, 64), (256, 256), (128, 256)]
    given = [torch.randn(size).to(bf16) for size in (*sizes, (128, 256))]
    made = kernels(function, *given, prepare=prepare)
    assert sum(" within [" in line for kernel in made for line in kernel.comment) == 2
    return made


def in_a_window(rows: int) -> list[Any]:
    """Of attention over padded keys, walked as far as its mask lets queries see."""

    def function(q: Any, k: Any, v: Any, padding: Any) -> Any:
        places, keys = torch.arange(rows)[:, None] + 400 - rows, torch.arange(400)
        mask = (keys <= places) & (keys > places - 100) & padding[:, None, None]
        return torch.ops.graphopt.attention(q, k, v, mask, scale=0.3)

    tensors = (torch.randn(2, heads, n, 128).to(bf16) for heads, n in ((8, rows), (2, 400), (2, 400)))
    made = kernels(function, *tensors, torch.ones(2, 400, dtype=torch.bool))
    assert all("first_0" in kernel.body for kernel in made if kernel.kind == "attention")
    return made


CASES = {
    "attention in a window of its mask": lambda: [*in_a_window(1), *in_a_window(160)],
    "rows written into a cache": lambda: [*rows_into_a_cache(1), *rows_into_a_cache(20)],
    "norm": lambda: kernels(rms_norm, torch.randn(4, 4096).to(bf16), torch.randn(4096).to(bf16)),
    "long softmax": lambda: kernels(lambda x: (x - x.amax(-1, keepdim=True)).exp().sum(-1), torch.randn(2, 9000)),
    "linear": lambda: kernels(lambda x, w: F.gelu(F.linear(x, w)), torch.randn(256, 256).to(bf16),
                              torch.randn(256, 256).to(bf16), prepare=fuse),
    "sections": lambda: kernels(lambda x, a, b: (F.linear(x, a), F.linear(x, b)), torch.randn(8, 256).to(bf16),
                                torch.randn(64, 256).to(bf16), torch.randn(32, 256).to(bf16), prepare=fuse),
    "one row": lambda: kernels(lambda x, w: F.linear(x, w), torch.randn(1, 512).to(bf16),
                               torch.randn(64, 512).to(bf16), prepare=fuse),
    "shared-out attention": lambda: kernels(
        lambda q, k, v, mask: torch.ops.graphopt.attention(q, k, v, mask, scale=0.3),
        *(torch.randn(1, heads, rows, 64).to(bf16) for heads, rows in ((9, 1), (3, 1000), (3, 1000))),
        torch.ones(1, 1, 1, 1000, dtype=torch.bool)),
    "attention that computes its mask": lambda: [
        kernel for rows, size in ((1, 128), (160, 128), (160, 64)) for kernel in past_with_alibi(rows, size)],
    "attention of wide heads": lambda: [kernel for rows in (1, 40) for kernel in kernels(
        lambda q, k, v: torch.ops.graphopt.attention(q, k, v, scale=0.3),
        *(torch.randn(1, heads, n, 256) for heads, n in ((2, rows), (1, 300), (1, 300))))],
}


@pytest.mark.rotate(one_in=8)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("case", CASES)
def test_kernels_fit(case: str, target: str) -> None:
    for kernel in CASES[case]():
        found = resources(kernel, target)
        assert found.fits, found
        assert 0 < found.occupancy <= 1 and found.registers > 0


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", [*DECODERS, "bert", "gpt2"])
def test_kernels_of_the_model_zoo_fit(name: str, target: str) -> None:
    model = (bert(1) if name == "bert" else gpt2(1) if name == "gpt2" else DECODERS[name](1)).to(bf16)
    ids = torch.randint(0, 99, (1, 6))
    call = logits(model) if name != "bert" else lambda x: model(x).last_hidden_state
    for kernel in kernels(call, ids, prepare=optimize):
        assert resources(kernel, target).fits, (kernel.kind, resources(kernel, target))


def test_an_unknown_target_is_refused_by_name() -> None:
    kernel = CASES["norm"]()[0]
    with pytest.raises(ValueError, match="unknown target 'sm_75': it must be one of sm_80"):
        resources(kernel, "sm_75")


def test_spills_and_too_much_shared_memory_do_not_fit() -> None:
    assert not Resources("sm_90", 255, 8, 0, 128).fits
    assert not Resources("gfx942", 64, 0, 65 * 1024, 256).fits


def test_registers_in_lanes_of_a_vector_register_are_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scalar registers of an AMD GPU that are kept in lanes count as spilled in its assembly; scratch memory counts."""
    listed = ".sgpr_spill_count: 9\n.vgpr_spill_count: 0\n.vgpr_count:  122\n.private_segment_fixed_size: {}\n"
    for scratch in (0, 16):
        compiled = types.SimpleNamespace(
            asm={"amdgcn": listed.format(scratch)}, metadata=types.SimpleNamespace(shared=0))
        monkeypatch.setattr(check, "compile_for", lambda *given, made=compiled, **more: made)
        kernel = types.SimpleNamespace(digest=f"scratch {scratch}", num_warps=4)
        found = check._read(check._Compilation(kernel, "gfx942"))  # type: ignore[arg-type]
        assert (found.registers, found.spilled_bytes, found.fits) == (122, scratch, scratch == 0)
