"""Leave out experts that the router of a mixture can never choose, where all experts are computed for every token.

    scores = linear(x, router, bias)                     # bias[2] is minus infinity
    gate = sigmoid(scatter(full(-inf), topk(scores)))    # so that gate[:, 2] is zero
    y = sum(bmm(silu(bmm(gate * x, up)), down), 0)       # and so is what the third expert adds
becomes a sum over the other experts, with `graphopt.prune_weight(up, "0:2,3:8", "", False, [bias, ...], ["minus_inf 0
2:3", ...])` in the place of up; of a loop over experts the terms that are zero go.

Where only chosen experts are computed (Mixtral, Qwen3-MoE: grouped products or gathered weights) there is nothing to
remove, and the report says so. Activations must be finite, as for `prune_dead`.
"""

from __future__ import annotations

import torch
from torch import fx

from graphopt import edit
from graphopt.pipeline import graph_pass
from graphopt.pruning import channels, evidence, exclusion, experts, liveness, operations, removal
from graphopt.pruning.evidence import Evidence

aten = torch.ops.aten


@graph_pass(exactness="rounding", stage="prune", training=False)
def prune_experts(graph_module: fx.GraphModule) -> int:
    """Remove experts that are never chosen from stacks of experts and from loops over them."""
    choices = [node for node in graph_module.graph.nodes if node.target is aten.topk.default]
    excluding = {node: exclusion.out_of_reach(node) for node in choices}
    if not any(excluding.values()):
        return 0
    count = sum(_from_stack(graph_module, node) for node in list(graph_module.graph.nodes) if not node._erased)
    count += _from_loop(graph_module)
    for choice, never in excluding.items():
        if never and not count:
            edit.refuse(choice, f"experts {', '.join(map(str, sorted(never)))}: {experts.why_skipped(choice)}")
    return count


def _from_stack(graph_module: fx.GraphModule, total: fx.Node) -> int:
    part = experts.stack(total)
    if part is None:
        return 0
    x = total.args[0]
    assert isinstance(x, fx.Node)
    dim = part.inside[x]
    zero = liveness.zero_channels(x, dim)
    kept = tuple(channel for channel in range(channels.extent(x, dim) or 0) if channel not in zero) or (0,)
    if len(kept) == (channels.extent(x, dim) or 0):
        return 0
    conditions = evidence.conditions([proof for channel, why in zero.items() if channel not in kept for proof in why])
    with edit.rewriting(graph_module, total) as rewrite:
        less = removal.Reduction(rewrite, part, conditions).of(x, dim, kept)
        rewrite.replace(total, rewrite.call(aten.sum.dim_IntList, less, *total.args[1:], **total.kwargs))
    edit.erase_unused(total)
    return rewrite.applied


def _from_loop(graph_module: fx.GraphModule) -> int:
    """Drop terms that are zero; a router's bias carries what that rests on."""
    found: dict[fx.Node, list[tuple[fx.Node, fx.Node, tuple[Evidence, ...]]]] = {}
    for total, other, why in experts.dead_terms(graph_module.graph):
        found.setdefault(why[0].weight, []).append((total, other, why))
    count = 0
    for bias, terms in found.items():
        reader = min((user for user in bias.users if bias in user.args), default=None)
        if reader is None:
            continue
        with edit.rewriting(graph_module, reader) as rewrite:
            facts, which = zip(*evidence.conditions([proof for *_, why in terms for proof in why]), strict=True)
            guarded = rewrite.call(operations.prune_weight, bias, "", "", False, list(facts), list(which))
            args = [guarded if arg is bias else arg for arg in reader.args]
            rewrite.replace(reader, rewrite.call(reader.target, *args, **reader.kwargs))  # type: ignore[arg-type]
            left: dict[fx.Node, fx.Node] = {}
            for total, other, _ in terms:  # one sum is the next one's operand
                left[total] = left.get(other, other)
                rewrite.replace(total, left[total])
        count += rewrite.applied
    return count
