"""Keep the KV caches that a graph returns quantised, and let attention read the codes.

    out = graphopt.attention(q, k, v, mask);  return k, v       # caches in reserved room
becomes
    k_codes, k_params, k_room = graphopt.kv_quantized_reserve(k_past, n, "int8", True)
    ...
    out = graphopt.attention_quantized(q, k_codes, k_params, k_tail, v_codes, v_params, v_tail, mask, S + n, "int8")
    return graphopt.kv_quantized_cache(k_codes, k_params, k_tail, S + n, "int8", True), ...

(`forms.py` has the whole). Runs where the options say `kv_dtype`; the layout and its source are those of
`quantization.cache_operations`.
"""

from __future__ import annotations

import functools

from torch import fx

from graphopt.passes.kv_cache.forms import Form, rewrite_caches
from graphopt.pipeline import graph_pass
from graphopt.quantization import cache_operations as layout


@graph_pass(exactness="lossy", stage="kv_cache", training=False, after="append_in_place")
def quantize_cache(graph_module: fx.GraphModule, *, kind: str = "int8") -> int:
    """Rewrite each attention over growing caches to one over quantised rows."""
    unsupported_reason = functools.partial(layout.unsupported_reason, kind=kind)
    form = Form("kv_dtype", layout.OPERATIONS, unsupported_reason, (kind,), lambda keys: (kind, keys))
    return rewrite_caches(graph_module, form)
