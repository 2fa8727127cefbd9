"""Zero lines of weights, line numbers as text, and the arrangement of kept heads."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.errors import StalePruningError
from graphopt.pruning import heads, lines, operations


@given(st.sets(st.integers(0, 60)))
def test_spelled_and_read_again(numbers: set[int]) -> None:
    assert lines.numbers(lines.spell(sorted(numbers))) == sorted(numbers)


def test_spelling() -> None:
    assert lines.spell([0, 1, 2, 5]) == "0:3,5:6" and lines.spell([]) == ""
    with pytest.raises(ValueError, match="must ascend"):
        lines.spell([3, 1])


@settings(deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=3), st.data())
def test_zero_lines(shape: list[int], data: st.DataObject) -> None:
    """Against the definition, on weights in which many elements and some lines are zero."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    weight[torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.5] = 0
    dim = data.draw(st.integers(0, len(shape) - 1))
    for index in data.draw(st.sets(st.integers(0, shape[dim] - 1))):
        weight.select(dim, index).zero_()
    expected = [index for index in range(shape[dim]) if not weight.select(dim, index).any()]
    assert list(lines.zero_lines(weight, dim)) == expected


def test_a_nan_is_not_zero() -> None:
    weight = torch.zeros(3, 9)
    weight[1, 8] = torch.nan
    assert lines.zero_lines(weight, 0) == (0, 2)
    assert lines.hold(weight, "zero 0 0:1,2:3") and not lines.hold(weight, "zero 0 0:2")


def test_minus_infinity_in_vectors() -> None:
    bias = torch.tensor([0.0, -torch.inf, torch.inf, torch.nan, -torch.inf])
    assert lines.excluding_lines(bias, 0) == (1, 4) and lines.excluding_lines(bias.expand(2, 5), 0) == ()
    assert lines.hold(bias, "minus_inf 0 1:2,4:5") and not lines.hold(bias, "minus_inf 0 0:2")
    assert lines.hold(bias, "not_minus_inf 0 0:1,2:4") and not lines.hold(bias, "not_minus_inf 0 0:2")
    assert lines.digest([bias]) not in ("", lines.digest([bias.roll(1)]))
    assert not lines.is_about_lines("with") and not lines.is_about_lines("bound {}")


def test_digest_tells_which_lines_are_zero() -> None:
    one, other = torch.ones(4, 4), torch.ones(4, 4)
    assert lines.digest([one, other]) == ""
    one[:, 2] = 0
    first = lines.digest([one, other])
    assert first and first != lines.digest([other, one])
    one[:, 3] = 0
    assert lines.digest([one, other]) != first


def test_prune_weight_is_dense_and_checks_its_conditions() -> None:
    weight = torch.arange(24.0).view(4, 6)
    weight[:, 1] = 0
    op = torch.ops.graphopt.prune_weight
    small = op(weight, "0:1,2:4", "0:1,2:6", False, [weight], ["zero 1 1:2"])
    assert torch.equal(small, weight[[0, 2, 3]][:, [0, 2, 3, 4, 5]]) and small.is_contiguous()
    assert torch.equal(op(weight, "1:3", "", True, [], []), weight.t()[1:3])
    with pytest.raises(StalePruningError):
        op(weight, "", "0:1,2:6", False, [weight], ["zero 1 1:3"])
    assert operations.prune_weight.name() == "graphopt::prune_weight"


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 4), st.integers(1, 16), st.booleans(), st.data())
def test_settled_heads(group: int, groups: int, whole_cache: bool, data: st.DataObject) -> None:
    """All living heads stay, in few pieces; each piece serves equally many query heads for each key/value head."""
    count = group * groups
    dead = data.draw(st.sets(st.integers(0, count - 1)))
    kept = heads.settle(dead, count, group, whole_cache)
    assert kept == sorted(set(kept)) and set(range(count)) - dead <= set(kept) and kept
    counts = [sum(head // group == number for head in kept) for number in range(groups)]
    pieces = heads.pieces(counts if whole_cache else [one for one in counts if one])
    assert len(pieces) <= heads.MOST_PIECES
    assert sum(piece.count * piece.group for piece in pieces) == len(kept)
    assert [piece.query for piece in pieces] == [
        sum(before.count * before.group for before in pieces[:number]) for number in range(len(pieces))
    ]
