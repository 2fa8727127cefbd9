"""Write the rotation of queries and keys by their position as one `graphopt.rope`.

    r = cat([-x[..., half:], x[..., :half]], -1);  y = x * cos + r * sin
becomes
    y = graphopt.rope(x, cos, sin)

and with pairs of neighbours instead of halves (GPT-J) `graphopt.rope(x, cos, sin, True)`. Partial rotary embeddings
match on the part that is rotated.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from graphopt import match, ops
from graphopt.pipeline import graph_pass


@match.pattern(name="rope", x=(2, 4, 3, 8), cos=(2, 1, 3, 8), sin=(2, 1, 3, 8))
def _halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin


@match.pattern(name="interleaved rope", x=(2, 4, 3, 8), cos=(2, 1, 3, 8), sin=(2, 1, 3, 8))
def _pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos + torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2) * sin


RULES = (
    match.Rule(_halves, lambda x, cos, sin: ops.rope(x, cos, sin)),
    match.Rule(_pairs, lambda x, cos, sin: ops.rope(x, cos, sin, True)),
)


@graph_pass(exactness="rounding", stage="recognize", training=False)
def recognize_rope(graph_module: fx.GraphModule) -> int:
    """Replace the chains of operations that rotate queries or keys by `graphopt.rope`."""
    return match.apply(graph_module, RULES)
