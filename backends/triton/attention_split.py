"""Few queries against many keys: the keys of one head shared out among programs, and the kernel that merges them.

With few queries there are fewer heads than a GPU has processors, so each program takes a run of keys and leaves what it
summed, unnormalised, in scratch memory; a second kernel adds the runs up (flash-decoding, Dao et al. 2023).

The scratch memory is float32 [batch * heads * queries, runs, width + 2]: the weighted sum of the values, the largest
score, and the sum of the weights under it.
"""

from __future__ import annotations

import sympy
from torch.fx import Node

from graphopt.backends.triton import expressions
from graphopt.backends.triton.printer import text_of
from graphopt.backends.triton.region import Region
from graphopt.backends.triton.source import Kernel, pointer_type, power_of_two, provenance, prune, signature, widened

SPLIT_KEYS = 256
"""Keys of a run: their bytes are fifty times those of the sums that a run leaves for one row."""
_RUNS_AT_ONCE = 16


def runs(keys: sympy.Expr) -> str:
    """How many runs the keys make."""
    return f"cdiv({text_of(keys)}, {SPLIT_KEYS})"


def scratch_elements(rows: sympy.Expr, keys: sympy.Expr, width: int) -> str:
    """The number of elements of the scratch memory, in the sizes of the kernel."""
    return f"{text_of(rows, True)} * {runs(keys)} * {width + 2}"


def merge_kernel(region: Region, result: Node, keys: sympy.Expr, nan_rows: bool) -> Kernel:
    """The kernel that adds runs up into `result` [B, H, S, D]; a program for each of its rows."""
    batch, heads, queries, width = region.sizes(result)
    dtype = result.meta["val"].dtype
    count = int(width)
    strides = [text_of(stride, True) for stride in region.strides(result)]
    constants = {"BLOCK_R": _RUNS_AT_ONCE, "BLOCK_E": max(16, power_of_two(count))}
    kept = f"(e < {count})"
    empty = "float('nan')" if nan_rows else "0"
    body = [
        *widened(list(region.parameters)),
        "row = tl.program_id(0).to(INDEX)",
        f"runs = tl.cdiv({text_of(keys)}, {SPLIT_KEYS})",
        f"b = row // {text_of(heads * queries, True)}",
        f"h = row // {text_of(queries, True)} % {text_of(heads, True)}",
        f"s = row % {text_of(queries, True)}",
        "e = tl.arange(0, BLOCK_E)[None, :]",
        "top = tl.full([1, 1], float('-inf'), tl.float32)",
        "total = tl.full([1, 1], 0, tl.float32)",
        "acc = tl.full([1, BLOCK_E], 0, tl.float32)",
        "for start in range(0, runs, BLOCK_R):",
        "    r = start + tl.arange(0, BLOCK_R)[:, None]",
        "    there = r < runs",
        f"    place = (row * runs + r) * {count + 2}",
        f"    sums = tl.load(parts + place + e, mask=there & {kept}, other=0.0)",
        f"    tops = tl.load(parts + place + {count}, mask=there, other=float('-inf'))",
        f"    totals = tl.load(parts + place + {count + 1}, mask=there, other=0.0)",
        "    new = tl.maximum(top, tl.max(tops, 0, keep_dims=True))",
        "    safe = tl.where(new == float('-inf'), 0.0, new)",
        "    fade = tl.exp(top - safe)",
        "    weights = tl.exp(tops - safe)",
        "    total = total * fade + tl.sum(totals * weights, 0, keep_dims=True)",
        "    acc = acc * fade + tl.sum(sums * weights, 0, keep_dims=True)",
        "    top = new",
        f"value = tl.where(total == 0, {empty}, tl.div_rn(acc, tl.where(total == 0, 1, total)))",
        f"address = b * {strides[0]} + h * {strides[1]} + s * {strides[2]} + e * {strides[3]}",
        f"tl.store(out0 + address, value.to({expressions.STORED[dtype]}), mask={kept})",
    ]
    sizes = tuple(region.parameters.items())
    pointers = ("parts", "out0")
    first = signature(pointers, list(region.parameters), constants)
    text = "\n".join([first, *(f"    {line}" for line in prune(body))]) + "\n"
    return Kernel(
        kind="attention_merge",
        body=text,
        parameters=pointers,
        types=("*fp32", pointer_type(result)),
        sizes=sizes,
        constants=constants,
        grid=text_of(batch * heads * queries),
        num_warps=4,
        num_stages=1,
        helpers=frozenset(),
        comment=("merges the runs of the kernel before it", *provenance(region)),
    )
