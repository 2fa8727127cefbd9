"""Look for patterns written as plain PyTorch functions, and rewrite what matches.

    @match.pattern(x=(2, 8), scale=0.123)
    def scaled_softmax(x, scale):
        return torch.softmax(x * scale, -1)

    def replacement(x, scale):
        return torch.ops.mylib.scaled_softmax(x, scale)

    count = match.rewrite(graph_module, scaled_softmax, replacement)

A pattern matches whatever the rank, sizes (symbolic ones too) and dtype, the order of operands, and the spelling of
views, copies and casts; and it matches only what computes the very same. Where it nearly matches, the report says at
which node it stopped and why.
"""

from graphopt.match.pattern import Pattern, pattern
from graphopt.match.rules import Match, Rule, apply, find, rewrite

__all__ = ["Match", "Pattern", "Rule", "apply", "find", "pattern", "rewrite"]
