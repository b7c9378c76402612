"""Packing: which samples share a row of fixed capacity.

`best_fit` fills rows for training: longest first, each sample into the fullest row that still takes it. `even_fit`
needs no more rows, and fills them alike: a step's matrix products are then all of a good size. `knapsack` is
MindSpeed-LLM's `--pack`, kept so that its files can be made again byte for byte.
"""

import bisect
import collections
import heapq
import math
from collections.abc import Sequence


def best_fit(lengths: Sequence[int], capacity: int, *, most: int | None = None) -> list[list[int]]:
    """Positions of the samples of each row, best-fit decreasing; deterministic.

    Args:
        lengths: of the samples, in tokens. A sample longer than `capacity` gets a row of its own.
        capacity: of a row, in tokens.
        most: most samples in a row.

    Returns:
        The rows in order of their first sample; within a row, samples in the order given.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, row), sorted
    for i in order:
        at = bisect.bisect_left(room, (lengths[i], -1))
        if at == len(room):
            left, row = capacity - lengths[i], len(rows)
            rows.append([i])
        else:
            left, row = room.pop(at)
            rows[row].append(i)
            left -= lengths[i]
        if left > 0 and (most is None or len(rows[row]) < most):
            bisect.insort(room, (left, row))
    return sorted((sorted(row) for row in rows), key=lambda row: row[0])


def even_fit(
    lengths: Sequence[int], capacity: int, *, most: int | None = None, multiple_of: int = 1
) -> list[list[int]]:
    """As `best_fit`, but the rows are filled alike: the fullest of them is no fuller, and mostly less full.

    Longest first, each into the emptiest row (Graham, "Bounds on multiprocessing timing anomalies", 1969); where that
    does not end better, the rows of `best_fit`.

    Args:
        lengths, capacity, most: as for `best_fit`.
        multiple_of: the number of rows is a multiple of this one, if there are samples enough.
    """
    tight = best_fit(lengths, capacity, most=most)
    num_rows = min(math.ceil(len(tight) / multiple_of) * multiple_of, len(lengths))
    rows: list[list[int]] = [[] for _ in range(num_rows)]
    heap = [(0, row) for row in range(num_rows)]  # (tokens, row) of the rows that take more
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        tokens, row = heapq.heappop(heap)
        rows[row].append(i)
        if most is None or len(rows[row]) < most:
            heapq.heappush(heap, (tokens + lengths[i], row))
    even = sorted((sorted(row) for row in rows), key=lambda row: row[0])

    def fullest(rows: list[list[int]]) -> int:
        return max((sum(lengths[i] for i in row) for row in rows), default=0)

    return even if fullest(even) <= fullest(tight) else tight


def knapsack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Positions of the samples of each row: the largest that fits again and again; of equal ones, the last first."""
    by_length: dict[int, list[int]] = collections.defaultdict(list)
    for i, length in enumerate(lengths):
        assert length <= capacity, (length, capacity)
        by_length[length].append(i)
    left = sorted(by_length)
    rows: list[list[int]] = []
    while left:
        row: list[int] = []
        room = capacity
        while at := bisect.bisect(left, room):
            length = left[at - 1]
            room -= length
            row.append(by_length[length].pop())
            if not by_length[length]:
                left.pop(at - 1)
        rows.append(row)
    return rows
