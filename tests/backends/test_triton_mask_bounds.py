"""Computed masks bound the walk over keys: which blocks of keys each tile of queries visits."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

import graphopt.ops  # noqa: F401  (registers the dialect)
from graphopt import backend, pipeline
from graphopt.backends.triton.attention import attention_of, describe
from graphopt.backends.triton.compile import CompiledGraph
from graphopt.backends.triton.mask_bounds import bounds_of
from graphopt.backends.triton.region import Region
from graphopt.options import Options
from graphopt.passes.fuse.form_regions import form_regions
from tests.backends.graphs import Prepare, run

attention = torch.ops.graphopt.attention

Mask = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From the places of queries [S, 1] and of keys [T], and a padding mask [B, T], to the mask."""
WINDOW = 100


def whole_pipeline(graph_module: GraphModule) -> None:
    options = Options(target="triton")
    pipeline.run(graph_module, backend.arranged(options, "triton"), options)


def attend(mask: Mask, past: int) -> Callable[..., Tensor]:
    def function(q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
        places = torch.arange(q.shape[2])[:, None] + past, torch.arange(k.shape[2])
        result: Tensor = attention(q, k, v, mask(*places, padding), scale=0.3)
        return result

    return function


def compiled(
    mask: Mask, queries: int, past: int, *, prepare: Prepare = form_regions, symbolic: bool = False
) -> tuple[CompiledGraph, list[Tensor]]:
    """Attention of queries behind `past` keys, checked against eager; and its inputs."""
    keys = queries + past
    rows = [torch.randn(2, 1, length, 16) for length in (queries, keys, keys)]
    given = [*rows, torch.arange(keys).expand(2, -1) >= 3]
    want = attend(mask, past)(*given)
    for tensor in rows if symbolic else ():
        torch._dynamo.mark_dynamic(tensor, 2)
    got, (made,) = run(attend(mask, past), *given, prepare=prepare)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    return made, given


def visited(made: CompiledGraph, given: list[Tensor]) -> list[list[int]]:
    """For each tile of queries the blocks of keys that it visits: a NaN among their values reaches its rows."""
    (kernel,) = (k for k in made.kernels.values() if k.kind == "attention")
    rows, block = kernel.constants["BLOCK_M_0"], kernel.constants["BLOCK_T_0"]
    q, k, v, padding = given
    found: list[list[int]] = [[] for _ in range(-(-q.shape[2] // rows))]
    wanted = [n.meta["val"] for n in made._graph_module.graph.find_nodes(op="placeholder")]
    for place in range(-(-k.shape[2] // block)):
        poisoned = v.clone()
        poisoned[:, :, place * block : (place + 1) * block] = torch.nan
        rows_given = iter((q, k, poisoned))
        result = made(*(x.node.hint if isinstance(x, torch.SymInt) else padding if x.dtype == torch.bool
                        else next(rows_given) for x in wanted))[0]
        for tile, seen in enumerate(result.split(rows, 2)):
            if seen.isnan().any():
                found[tile].append(place)
    return found


def tightest(made: CompiledGraph) -> tuple[int | None, int | None]:
    """How far behind and before a query the mask's bounds let it see; None: as far as there are keys."""
    (module,) = (m for m in made._graph_module.children() if m.meta["kind"] == "attention")  # type: ignore[index, operator]
    assert isinstance(module, GraphModule)
    region = Region(module)
    node = attention_of(region)
    assert node is not None
    mask = describe(node).mask
    assert mask is not None
    bounds = bounds_of(region, mask)
    assert all(bound.moves for bound in (*bounds.first, *bounds.last))
    last, first = ([int(bound.offset) for bound in each] for each in (bounds.last, bounds.first))
    return min(last, default=None), -max(first) if first else None


def expected(made: CompiledGraph, queries: int, past: int, behind: int | None, before: int | None) -> list[list[int]]:
    """The blocks that hold a key between `before` keys ahead of a query of the tile and `behind` after it."""
    (kernel,) = (k for k in made.kernels.values() if k.kind == "attention")
    rows, block = kernel.constants["BLOCK_M_0"], kernel.constants["BLOCK_T_0"]
    keys, found = queries + past, []
    for tile in range(0, queries, rows):
        last = keys - 1 if behind is None else min(keys - 1, tile + rows - 1 + past + behind)
        first = 0 if before is None else max(0, tile + past - before)
        found.append([j for j in range(-(-keys // block)) if j * block <= last and (j + 1) * block > first])
    return found


CASES: dict[str, tuple[Mask, int | None, int | None]] = {
    "causal": (lambda q, k, padding: (k <= q)[None, None], 0, None),
    "before the query": (lambda q, k, padding: (q > k)[None, None], -1, None),
    "negated": (lambda q, k, padding: (~(k > q))[None, None], 0, None),
    "some behind the query": (lambda q, k, padding: (k - 40 <= q)[None, None], 40, None),
    "window": (lambda q, k, padding: ((k <= q) & (k > q - WINDOW))[None, None], 0, WINDOW - 1),
    "window by distance": (lambda q, k, padding: ((q - k < WINDOW) & (q >= k))[None, None], 0, WINDOW - 1),
    "padded": (lambda q, k, padding: (k <= q) & padding[:, None, None], 0, None),
    "hidden by either": (lambda q, k, padding: ~((k > q) | ~padding[:, None, None]), 0, None),
    "the tighter of two": (lambda q, k, padding: ((k <= q + 50) & (k <= q))[None, None], 0, None),
    "both parts of a disjunction": (
        lambda q, k, padding: ((k <= q) & (k % 2 == 0)) | ((k <= q) & padding[:, None, None]), 0, None),
    "a prefix": (lambda q, k, padding: (k <= q) | padding[:, None, None], None, None),
    "every second key": (lambda q, k, padding: (2 * k <= q)[None, None], None, None),
    "padding alone": (lambda q, k, padding: padding[:, None, None] & (k % 8 >= 0), None, None),
}  # fmt: skip


@pytest.mark.rotate(one_in=8)
@pytest.mark.parametrize("past", [0, 60])
@pytest.mark.parametrize("name", CASES)
def test_blocks_that_are_visited(name: str, past: int) -> None:
    mask, behind, before = CASES[name]
    made, given = compiled(mask, 200, past)
    assert tightest(made) == (None if behind is None else past + behind, None if before is None else before - past)
    assert visited(made, given) == expected(made, 200, past, behind, before)
    if behind is None:
        assert len(visited(made, given)[0]) == -(-(200 + past) // 32)


def test_sizes_that_are_symbols() -> None:
    made, given = compiled(CASES["window"][0], 200, 60, symbolic=True)
    assert visited(made, given) == expected(made, 200, 60, 0, WINDOW - 1)


def test_positions_that_were_folded_into_constants() -> None:
    made, given = compiled(CASES["window"][0], 200, 60, prepare=whole_pipeline)
    assert visited(made, given) == expected(made, 200, 60, 0, WINDOW - 1)


def test_one_query_that_sees_a_window() -> None:
    """Few queries: nobody reads the blocks before the window, whether keys are shared out among programs or not."""
    for past in (150, 900):
        made, given = compiled(CASES["window"][0], 1, past)
        assert visited(made, given) == expected(made, 1, past, 0, WINDOW - 1)
        assert "first_0 = " in made.source


def test_an_additive_mask_bounds_nothing() -> None:
    """A NaN stays one when -inf is added to it."""

    def mask(q: Tensor, k: Tensor, padding: Tensor) -> Tensor:
        return torch.where(k <= q, 0.0 * k, float("-inf"))[None, None]

    made, given = compiled(mask, 200, 0)
    assert visited(made, given) == expected(made, 200, 0, None, None)


def test_an_absolute_bound() -> None:
    made, given = compiled(lambda q, k, padding: ((k >= 70) & (k < 130) & (q >= 0))[None, None], 200, 0)
    assert visited(made, given) == [[2, 3, 4]] * len(visited(made, given))
