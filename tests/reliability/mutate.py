"""Cheap broken inputs: edits of a valid sample drawn from a seeded generator, microseconds each.

rng = random.Random(7)
broken_bytes(sample, rng)              flips, cuts, repeats, lengths and offsets set to extreme values
broken_value({"r": 8}, rng)            a value somewhere in the tree replaced, removed, renamed or nested deeply

Hypothesis draws the seeds (and, a hundred times less often, inputs of its own), so a failure names its input.
"""

import random
import struct
from typing import Any

TOKENS = (
    *(bytes([byte]) for byte in b'{}[]",:\\\x00\n\r'),
    *b"null true NaN -Infinity 1e999 -1 ../ / \\ud800 ${HOME} __class__ !!python/name:os.system".split(),
    *(b"\xff\xfe", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\x1f\x8b", b"PK\x03\x04", b"&a [*a]"),
    *(b"9" * 30, b"9" * 5000, b"[" * 5000, b"[" * 3000 + b"]" * 3000, b'{"a":' * 3000),
)
NUMBERS = (0, 1, 2, 7, 8, 127, 128, 255, 256, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, 2**63)
LEAVES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63), 10**30, 0.0, -0.0, 0.5, 1e308, float("inf"), float("nan")),
    *("", " ", "a", "é", "\ud800", "\x00", "../../etc/passwd", "/", "1", "nan", "(a+)+$", "[", "{{ 7*7 }}", "x" * 3000),
    *([], {}, [[]], [None], [0], ["a", "a"], {"": None}, {"a": {"a": {}}}),
)


def broken_bytes(sample: bytes, rng: random.Random) -> bytes:
    """The sample after one to four edits; always other bytes than another seed's, hardly ever a valid file."""
    content = bytearray(sample)
    for _ in range(rng.choice((1, 1, 1, 2, 2, 3, 4))):
        size = len(content)
        # the beginning holds headers: half of the edits go there
        at = rng.randrange(min(size, rng.choice((64, 512, size))) + 1) if size else 0
        length = rng.choice((1, 1, 2, 4, 8, rng.randrange(1, 64)))
        match rng.randrange(9):
            case 0 if size:
                content[min(at, size - 1)] ^= 1 << rng.randrange(8)
            case 1:
                content[at : at + length] = rng.randbytes(length)
            case 2:
                content[at:at] = rng.choice(TOKENS)
            case 3:
                content[at : at + length] = rng.choice(TOKENS)
            case 4:
                del content[at : at + length]
            case 5:
                del content[at:]
            case 6:
                content[at:at] = content[at : at + length] * rng.choice((1, 2, 50))
            case 7:
                number = rng.choice(NUMBERS) + rng.choice((-1, 0, 0, 1))
                form = rng.choice(("<I", "<Q", ">I", "<H"))
                packed = struct.pack(form, number % 256 ** struct.calcsize(form))
                content[at : at + len(packed)] = packed
            case _:
                other = rng.randrange(size + 1)
                content[at : at + length] = content[other : other + length]
    return bytes(content)


def broken_value(value: Any, rng: random.Random) -> Any:
    """A copy of a tree of dictionaries and lists with one to three places changed."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        value = _edit(value, rng)
    return value


def _edit(value: Any, rng: random.Random) -> Any:
    if isinstance(value, dict) and value and rng.random() < 0.9:
        name = rng.choice(list(value))
        changed = dict(value)
        match rng.randrange(8):
            case 0:
                del changed[name]
            case 1:
                changed[rng.choice(("", "a", name + "x", "__proto__", name.upper()))] = changed.pop(name)
            case 2:
                changed[str(rng.choice(LEAVES))] = rng.choice(LEAVES)
            case _:
                changed[name] = _edit(changed[name], rng)
        return changed
    if isinstance(value, list) and value and rng.random() < 0.9:
        at = rng.randrange(len(value))
        match rng.randrange(5):
            case 0:
                return value[:at] + value[at + 1 :]
            case 1:
                return value[:at] + [value[at]] * rng.choice((2, 50)) + value[at + 1 :]
            case _:
                return [*value[:at], _edit(value[at], rng), *value[at + 1 :]]
    if rng.random() < 0.02:
        return _nested(rng.choice((50, 300)))
    return rng.choice(LEAVES)


def _nested(depth: int) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = [value]
    return value
