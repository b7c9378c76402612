"""The beginnings that sequences of a pack have in common, so that each is computed once.

    segments = share_prompts(ids, first_trained)

Rows made by one template begin alike (a system prompt), and the two answers of a pair have their whole prompt in
common. A causal model computes the same for such tokens in each row. So a pack holds them once, as a segment that the
rows' own segments continue: a tree, cut wherever sequences part. Only tokens before a sequence's first trained position
are shared; what a row is trained on is always its own.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LEAST_SAVED = 8
"""Tokens that a shared segment must save; a segment has a price of its own."""


@dataclass(frozen=True)
class Segment:
    """Tokens `start:end` of a sequence. Its parent, an earlier segment or -1 for none, ends at `start`."""

    sequence: int
    start: int
    end: int
    parent: int


def share_prompts(ids: Sequence[np.ndarray], first_trained: Sequence[int]) -> list[Segment]:
    """The tree of segments: first the shared ones, then one for each sequence in order.

    Args:
        ids: token ids of each sequence, [T] each.
        first_trained: the first position of each at which a token is predicted; at least that one stays its own.
    """
    limits = [min(first, len(own) - 1) for own, first in zip(ids, first_trained, strict=True)]
    shared: list[Segment] = []
    own = dict.fromkeys(range(len(ids)), (0, -1))  # where the sequence's own segment begins, and its parent
    todo = [(list(range(len(ids))), 0, 0, -1)]
    while todo:
        members, known, start, parent = todo.pop()
        end = _common(ids, members, known, min(limits[i] for i in members))
        if (end - start) * (len(members) - 1) >= LEAST_SAVED:
            shared.append(Segment(members[0], start, end, parent))
            start, parent = end, len(shared) - 1
        groups: dict[int, list[int]] = defaultdict(list)
        for i in members:
            own[i] = (start, parent)
            if limits[i] > end:
                groups[int(ids[i][end])].append(i)
        todo += [(group, end, start, parent) for group in groups.values() if len(group) > 1]
    return shared + [Segment(i, start, len(ids[i]), parent) for i, (start, parent) in own.items()]


def common_prompt(ids: Sequence[np.ndarray], first_trained: Sequence[int]) -> int:
    """How many tokens at the beginning all sequences share."""
    limit = min(min(first, len(own) - 1) for own, first in zip(ids, first_trained, strict=True))
    return _common(ids, range(len(ids)), 0, limit)


def _common(ids: Sequence[np.ndarray], members: Sequence[int], known: int, limit: int) -> int:
    """Length of the members' common prefix, at most `limit`; `known` tokens are equal for sure."""
    first = ids[members[0]]
    for i in members[1:]:
        if limit <= known:
            break
        differs = first[known:limit] != ids[i][known:limit]
        if differs.any():
            limit = known + int(differs.argmax())
    return max(limit, known)
