"""Keep the KV caches that a graph returns in blocks that caches share, and let attention read the blocks.

    out = graphopt.attention(q, k, v, mask);  return k, v       # caches in reserved room
becomes
    k_first, k_table, k_room = graphopt.kv_paged_reserve(k_past, n)
    ...
    out = graphopt.attention_paged(q, k_first, k_table, k_tail, v_first, v_table, v_tail, mask, S + n)
    return graphopt.kv_paged_cache(k_first, k_table, k_tail, S + n), ...

(`forms.py` has the whole). Runs where the options say `kv_cache="paged"`; the layout and its source are those of
`runtime.kv_paged`.
"""

from __future__ import annotations

from torch import fx

from graphopt.passes.kv_cache.forms import Form, rewrite_caches
from graphopt.pipeline import graph_pass
from graphopt.runtime import kv_paged as layout

_PAGED = Form("kv_cache", layout.OPERATIONS, layout.unsupported_reason)


@graph_pass(exactness="rounding", stage="kv_cache", training=False, after="append_in_place")
def page_cache(graph_module: fx.GraphModule) -> int:
    """Rewrite each attention over growing caches to one over blocks of rows."""
    return rewrite_caches(graph_module, _PAGED)
