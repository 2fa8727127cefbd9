"""torch's own operator samples through generated kernels: what lowers must agree with eager, and how much lowers."""

from __future__ import annotations

import collections
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.opinfo.core import (
    BinaryUfuncInfo,
    OpInfo,
    ReductionOpInfo,
    ShapeFuncInfo,
    UnaryUfuncInfo,
)
from torch.utils import _pytree as pytree

from graphopt import capture
from graphopt.backends.triton.compile import compile_graph
from graphopt.passes.fuse.expand_rows import expand_rows
from tests.backends.graphs import as_one_region

DTYPES = (torch.float32, torch.bfloat16, torch.int64, torch.bool)
MORE = frozenset(
    "where gather index_select take_along_dim softmax log_softmax nn.functional.silu nn.functional.gelu "
    "nn.functional.relu nn.functional.layer_norm nn.functional.embedding clamp lerp addcmul addcdiv cat stack expand "
    "permute transpose view reshape unsqueeze squeeze select slice flip roll tril triu masked_fill nn.functional.pad "
    "unfold diagonal split chunk full_like zeros_like nn.functional.softplus nn.functional.leaky_relu "
    "nn.functional.hardswish nn.functional.mish nn.functional.group_norm nn.functional.normalize var_mean std_mean "
    "logsumexp select_scatter slice_scatter repeat tile movedim outer unflatten flatten rot90 hstack vstack nan_to_num "
    "isclose heaviside logaddexp float_power rsub nn.functional.logsigmoid index_fill index_add scatter index_copy "
    "index_put scatter_add".split())
SCATTERS = ("index_copy", "index_fill", "index_add", "index_put", "scatter", "scatter_add", "gather", "isclose")
MAY_BE_REFUSED = ("a scatter of many indices, or of a symbolic number", "no kernel rule for aten.scatter.reduce")
SMOKE = ("add", "div", "remainder", "pow", "sum", "argmax", "cumsum", "where", "softmax", "gather", "cat", "tanh")

# Operators for which Inductor has no generated GPU kernel either, or which are no operators of one tensor program.
BEYOND = ("special.", "polygamma", "mvlgamma", "jiterator", "igamma", "digamma", "frexp", "gcd", "lcm", "hash_tensor",
          "bucketize", "searchsorted", "nn.functional.rrelu", "i0", "narrow", "unique", "masked.")


def decomposed(function: Any, tensors: list[torch.Tensor]) -> GraphModule:
    """The functional graph that capture would give for the function."""
    with torch.no_grad():
        first = make_fx(function, decomposition_table=capture.decompositions(), tracing_mode="fake")(*tensors)
        graph_module = make_fx(torch.func.functionalize(first, remove="mutations"), tracing_mode="fake")(*tensors)
    graph_module.graph.eliminate_dead_code()
    graph_module.recompile()
    expand_rows(graph_module)
    return graph_module


def outcome(op: OpInfo, sample: Any) -> str:
    """"ok", "skip", or why the sample did not lower; raises when a kernel's answer is wrong."""
    flat, spec = pytree.tree_flatten((sample.input, sample.args, sample.kwargs))
    tensors = [x.detach() for x in flat if isinstance(x, torch.Tensor)]
    if any(t.is_complex() or t.is_sparse or t.numel() > 3000 for t in tensors):
        return "skip"

    def function(*given: torch.Tensor) -> list[torch.Tensor]:
        remaining = iter(given)
        filled = [next(remaining) if isinstance(x, torch.Tensor) else x for x in flat]
        first, args, kwargs = pytree.tree_unflatten(filled, spec)
        return [x for x in pytree.tree_leaves(op(first, *args, **kwargs)) if isinstance(x, torch.Tensor)]

    want = function(*[t.clone() for t in tensors])
    if any(w.is_complex() for w in want):
        return "skip"
    try:
        graph_module = decomposed(function, tensors)
    except Exception:  # data-dependent samples do not trace: nothing to lower
        return "skip"
    if not [n for n in graph_module.graph.nodes if n.op == "call_function"]:
        return "skip"
    compiled = compile_graph(as_one_region(graph_module), interpret=True)
    got = compiled(*tensors)
    for mine, eager in zip(got, want, strict=True):
        low = eager.dtype == torch.bfloat16
        rtol, atol = (3e-2, 1e-2) if low else (2e-5, 2e-5)
        torch.testing.assert_close(mine, eager, equal_nan=True, rtol=rtol, atol=atol)
    return compiled.fallbacks[0].reason if compiled.fallbacks else "ok"


def samples(op: OpInfo, count: int) -> Iterator[Any]:
    for dtype in DTYPES:
        if op.supports_dtype(dtype, "cpu"):
            found = list(op.sample_inputs("cpu", dtype))
            yield from found[:: max(1, len(found) // count)][:count]


def chosen() -> list[OpInfo]:
    kinds = (UnaryUfuncInfo, BinaryUfuncInfo, ReductionOpInfo, ShapeFuncInfo)
    return [op for op in op_db
            if (isinstance(op, kinds) or op.name in MORE) and not op.name.startswith(BEYOND)]


@pytest.mark.parametrize("name", SMOKE)
def test_samples_lower_and_agree(name: str) -> None:
    torch.manual_seed(0)
    op = next(o for o in op_db if o.name == name)
    assert {outcome(op, sample) for sample in samples(op, 2)} <= {"ok", "skip"}


@pytest.mark.rotate(one_in=3)
@pytest.mark.parametrize("name", SCATTERS)
def test_writes_at_loaded_indices_agree_in_all_dtypes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    more = (*DTYPES, torch.float16, torch.float64, torch.int8, torch.uint8)
    monkeypatch.setattr(sys.modules[__name__], "DTYPES", more)
    op = next(o for o in op_db if o.name == name)
    refused = {outcome(op, sample) for sample in samples(op, 6)} - {"ok", "skip"}
    assert all(reason in MAY_BE_REFUSED for reason in refused), refused


@pytest.mark.slow
def test_share_of_operators_that_lower() -> None:
    torch.manual_seed(0)
    lowered: collections.Counter[bool] = collections.Counter()
    rest: dict[str, str] = {}
    for op in chosen():
        outcomes = [o for o in (outcome(op, sample) for sample in samples(op, 3)) if o != "skip"]
        if outcomes:
            whole = set(outcomes) == {"ok"}
            lowered[whole] += 1
            if not whole:
                rest[op.name] = next(o for o in outcomes if o != "ok")
    share = lowered[True] / sum(lowered.values())
    print(f"{lowered[True]} of {sum(lowered.values())} operators lower ({share:.1%}); the others:", rest)
    assert share >= 0.95
