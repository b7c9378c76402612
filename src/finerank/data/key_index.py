"""A dictionary and a set of 128-bit keys, asked for many keys at once.

    index = KeyIndex()
    index.add(keys_N2)                      numbers the keys 0, 1, 2, ... in order
    index.find(keys_N2)                     int64 [N]: the number of each key, -1 where it is not there
    seen = KeySet()
    seen.add_new(keys_N2)                   bool [N]: whether a key is new

Python's dictionary takes about a third of a microsecond for each word of a text and a hundred bytes for each row's
hash; these take a tenth and a quarter of that. They are open-addressing tables in numpy arrays, each probe one step for
all keys that are not yet decided.

Shapes: N keys, two uint64 each.
"""

import numpy as np

_MIX_LOW, _MIX_HIGH, _MIX = (np.uint64(n) for n in (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0xD6E8FEB86659FD93))
_HALF = np.uint64(32)
_MOST_FULL = 0.7
"""Of a table's places; beyond that probes become long."""
_BLOCK = 1 << 16
"""Keys that are put into a new table at a time; what each takes on the way is much more than its place."""


class KeyIndex:
    """Keys numbered in the order in which they were added, 29 to 57 bytes for each."""

    def __init__(self, bits: int = 12):
        """Args: bits: the table begins with 2 ** bits places."""
        self._resize(bits)
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def find(self, keys_N2: np.ndarray) -> np.ndarray:
        """int64 [N], the number of each key; -1 where it was never added."""
        place = self._home(keys_N2)
        number = self._number[place]
        same = _same(self._keys[place], keys_N2)
        out = np.where(same, number, -1).astype(np.int64)
        left = np.flatnonzero(~same & (number >= 0))  # another key is there: look at the next place
        place = place[left]
        while len(left):
            place = (place + 1) & self._mask
            number = self._number[place]
            same = _same(self._keys[place], keys_N2[left])
            out[left[same]] = number[same]
            on = ~same & (number >= 0)
            left, place = left[on], place[on]
        return out

    def add(self, keys_N2: np.ndarray) -> None:
        """Add keys that differ from one another and from all that are there."""
        bits = self._bits
        while self._count + len(keys_N2) > _MOST_FULL * (1 << bits):
            bits += 1
        if bits != self._bits:
            full = np.flatnonzero(self._number >= 0)
            keys, numbers = self._keys[full], self._number[full]
            self._resize(bits)
            self._place(keys, numbers)
        self._place(keys_N2, np.arange(self._count, self._count + len(keys_N2)))
        self._count += len(keys_N2)

    def _resize(self, bits: int) -> None:
        self._bits = bits
        self._mask = (1 << bits) - 1
        self._shift = np.uint64(64 - bits)
        self._keys = np.zeros((1 << bits, 2), np.uint64)
        self._number = np.full(1 << bits, -1, np.int32)

    def _home(self, keys_N2: np.ndarray) -> np.ndarray:
        return (_mixed(keys_N2) >> self._shift).astype(np.int64)

    def _place(self, keys_N2: np.ndarray, numbers: np.ndarray) -> None:
        place = self._home(keys_N2)
        while len(numbers):
            free = self._number[place] < 0
            self._number[place[free]] = numbers[free]  # of several at one place, the last one stays
            won = free & (self._number[place] == numbers)
            self._keys[place[won]] = keys_N2[won]
            on = ~won
            keys_N2, numbers, place = keys_N2[on], numbers[on], (place[on] + 1) & self._mask


class KeySet:
    """Keys that were seen, 23 to 29 bytes for each. A key of zeros stands for an empty place and must not be added."""

    def __init__(self, places: int = 4096):
        """Args: places: room at the beginning."""
        self._keys = np.zeros((places, 2), np.uint64)
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add_new(self, keys_N2: np.ndarray) -> np.ndarray:
        """Add the keys that are not there yet; bool [N], whether a key was new (of equal ones, the first)."""
        assert not _is_zero(keys_N2).any()
        candidates = np.flatnonzero(~self._has(keys_N2))
        first = candidates[first_of_equals(keys_N2[candidates])[0]]
        is_new = np.zeros(len(keys_N2), bool)
        is_new[first] = True
        self._make_room(len(first))
        self._place(keys_N2[first])
        self._count += len(first)
        return is_new

    def _has(self, keys_N2: np.ndarray) -> np.ndarray:
        found = np.zeros(len(keys_N2), bool)
        left, place = np.arange(len(keys_N2)), self._home(keys_N2)
        while len(left):
            there = self._keys[place]
            same = _same(there, keys_N2[left])
            found[left[same]] = True
            on = ~same & ~_is_zero(there)
            left, place = left[on], self._next(place[on])
        return found

    def _make_room(self, num_keys: int) -> None:
        places = len(self._keys)
        while self._count + num_keys > _MOST_FULL * places:
            places += places // 4 + 1  # by little, since a place takes memory whether it is used or not
        if places != len(self._keys):
            keys = self._keys[~_is_zero(self._keys)]
            self._keys = np.zeros((places, 2), np.uint64)
            for start in range(0, len(keys), _BLOCK):
                self._place(keys[start : start + _BLOCK])

    def _place(self, keys_N2: np.ndarray) -> None:
        place = self._home(keys_N2)
        while len(keys_N2):
            free = _is_zero(self._keys[place])
            self._keys[place[free]] = keys_N2[free]  # of several at one place, the last one stays
            on = ~(free & _same(self._keys[place], keys_N2))
            keys_N2, place = keys_N2[on], self._next(place[on])

    def _home(self, keys_N2: np.ndarray) -> np.ndarray:
        return ((_mixed(keys_N2) >> _HALF) * np.uint64(len(self._keys)) >> _HALF).astype(np.int64)

    def _next(self, place: np.ndarray) -> np.ndarray:
        place = place + 1
        place[place == len(self._keys)] = 0
        return place


def first_of_equals(keys_N2: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sorted positions at which each distinct key stands first; and for each key, which of these it equals."""
    order = np.lexsort((keys_N2[:, 1], keys_N2[:, 0]))  # stable: equal keys stay in their order
    ordered = keys_N2[order]
    is_first = np.ones(len(order), bool)
    is_first[1:] = ~_same(ordered[1:], ordered[:-1])
    group = np.cumsum(is_first) - 1
    rank = np.argsort(np.argsort(order[is_first]))
    inverse = np.empty(len(order), np.int64)
    inverse[order] = rank[group]
    return np.sort(order[is_first]), inverse


def _same(a_N2: np.ndarray, b_N2: np.ndarray) -> np.ndarray:
    same: np.ndarray = (a_N2[:, 0] == b_N2[:, 0]) & (a_N2[:, 1] == b_N2[:, 1])
    return same


def _mixed(keys_N2: np.ndarray) -> np.ndarray:
    mixed: np.ndarray = keys_N2[:, 0] * _MIX_LOW ^ keys_N2[:, 1] * _MIX_HIGH
    mixed ^= mixed >> _HALF
    mixed *= _MIX
    return mixed


def _is_zero(keys_N2: np.ndarray) -> np.ndarray:
    is_zero: np.ndarray = (keys_N2[:, 0] | keys_N2[:, 1]) == 0
    return is_zero
