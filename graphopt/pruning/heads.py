"""Which query heads share a call of attention when only some are kept.

Attention wants as many query heads for each key/value head. Kept heads are therefore arranged in few pieces: runs of
neighbouring key/value heads that serve equally many query heads each, so that a cache is read in place, as a slice.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence

MOST_PIECES = 4


@dataclasses.dataclass(frozen=True)
class Piece:
    """`count` key/value heads from `first` on, and the query heads from `query` on, `group` for each of them."""

    first: int
    count: int
    query: int
    group: int


def settle(dead: Collection[int], heads: int, group: int, whole_cache: bool) -> list[int]:
    """The query heads to keep, ascending: all that are not dead, and dead ones where they make the pieces few.

    whole_cache: whether the key/value heads stay all there (a cache that the caller sees).
    """
    kept = [[head for head in range(first, first + group) if head not in dead] for first in range(0, heads, group)]
    if len(pieces(_counts(kept, whole_cache))) > MOST_PIECES:
        most = max(map(len, kept))
        kept = [_filled(part, number, group, most) if part else part for number, part in enumerate(kept)]
    while len(pieces(_counts(kept, whole_cache))) > MOST_PIECES:
        start, end = min(_gaps(kept), key=lambda gap: gap[1] - gap[0])
        for number in range(start, end):
            kept[number] = _filled([], number, group, most)
    return [head for part in kept for head in part] or list(range(group))


def pieces(counts: Sequence[int]) -> list[Piece]:
    """The pieces for key/value heads that serve `counts` query heads each."""
    found: list[Piece] = []
    query = 0
    for number, count in enumerate(counts):
        last = found[-1] if found else None
        if count and last is not None and last.group == count and last.first + last.count == number:
            found[-1] = dataclasses.replace(last, count=last.count + 1)
        elif count:
            found.append(Piece(number, 1, query, count))
        query += count
    return found


def _counts(kept: Sequence[Sequence[int]], whole_cache: bool) -> list[int]:
    return [len(part) for part in kept if part or whole_cache]


def _filled(part: Sequence[int], number: int, group: int, most: int) -> list[int]:
    """The kept heads of one group, filled up with dead ones to `most`."""
    others = [head for head in range(number * group, (number + 1) * group) if head not in part]
    return sorted([*part, *others[: most - len(part)]])


def _gaps(kept: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """Runs of groups without kept heads that lie between groups with some."""
    living = [number for number, part in enumerate(kept) if part]
    return [(low + 1, high) for low, high in zip(living, living[1:], strict=False) if high > low + 1]
