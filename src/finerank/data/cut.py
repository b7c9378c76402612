r"""Texts to words as byte-level tokenizers cut them, a whole batch of texts at once.

    begins = word_begins(LLAMA3, points, classes)       bool [C]: whether a word begins at each character

A tokenizer file spells the cut as a regular expression; the common ones (`PATTERNS`) are written here as rules about
neighbouring characters, each rule one numpy step over all texts. The texts lie one after the other, with a character of
class `EDGE` before the first, between any two and after the last; added tokens are of class `EDGE` as well. Each rule
quotes what it stands for; tests hold them against the regular expressions themselves.

Shapes: C characters.
"""

import unicodedata

import numpy as np

EDGE = 0
LETTER, NUMBER, OTHER, SPACE = 1, 2, 4, 8
BLANK, NEWLINE, QUOTE = SPACE | 16, SPACE | 32, OTHER | 64
"""Of the spaces: U+0020, and line feed and carriage return; of the others: the apostrophe."""
_KIND = LETTER | NUMBER | OTHER | SPACE

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
GPT2_DIGITS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
"""Digits are cut off first, so a word ends before one as it does at the end of the text."""
_NEWER = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2, LLAMA3 = _NEWER % r"\p{N}", _NEWER % r"\p{N}{1,3}"
PATTERNS = (GPT2, GPT2_DIGITS, QWEN2, LLAMA3)

KNOWN = "\x01-\x7f\xa1-\xac\xae-\u017e\u2010-\u2015\u2018-\u201f\u2020-\u2022\u2026\u2030\u20ac\u2122"
"""Characters that every Unicode version classes the same and that NFC leaves alone, as a regular expression's set.

U+017F is left out: it is an "s" where case does not count.
"""


def _class_of(character: str) -> int:
    if character in "\t\n\v\f\r ":
        return {" ": BLANK, "\n": NEWLINE, "\r": NEWLINE}.get(character, SPACE)
    category = unicodedata.category(character)[0]
    if category in "LN":
        return LETTER if category == "L" else NUMBER
    return QUOTE if character == "'" else OTHER


_CLASSES = np.array([EDGE] + [_class_of(chr(i)) for i in range(1, 0x2200)], np.uint8)


def classes_of(points_C: np.ndarray) -> np.ndarray:
    """uint8 [C], the class of each known character; NUL is the edge."""
    classes_C: np.ndarray = _CLASSES[points_C]
    return classes_C


def word_begins(pattern: str, points_C: np.ndarray, classes_C: np.ndarray) -> np.ndarray:
    """bool [C]: whether a word begins at each character, by one of `PATTERNS`. Of edges it says nothing."""
    if pattern in (GPT2, GPT2_DIGITS):
        begins_C = _older(classes_C, single_digits=pattern == GPT2_DIGITS)
        _contractions(begins_C, points_C, classes_C)
    else:
        begins_C = _newer(classes_C, digits=1 if pattern == QWEN2 else 3)
        _contractions(begins_C, points_C | 32, classes_C)  # in lower case, as far as these letters go
    return begins_C


def _older(classes_C: np.ndarray, *, single_digits: bool) -> np.ndarray:
    r"""``| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+``, or the same after digits were cut off."""
    kind = classes_C & _KIND
    is_blank = classes_C == BLANK
    joins = (kind & (LETTER | OTHER | (0 if single_digits else NUMBER))) != 0
    begins = _changes(kind)
    begins[1:] &= ~(is_blank[:-1] & joins[1:])  # a blank belongs to the word after it
    begins[1:-1] |= (kind[1:-1] == SPACE) & joins[2:]  # the last of several spaces is cut from those before it
    if single_digits:
        begins |= kind == NUMBER
    return begins


def _newer(classes_C: np.ndarray, *, digits: int) -> np.ndarray:
    r"""``|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+``."""
    kind = classes_C & _KIND
    is_blank, is_newline = classes_C == BLANK, classes_C == NEWLINE
    is_space, is_letter, is_other = kind == SPACE, kind == LETTER, kind == OTHER
    begins = _changes(kind)
    begins[1:] &= ~(is_blank[:-1] & is_other[1:])
    # Letters take one character before them: a space that is no line break, or a sign that stands alone.
    taken = is_space & ~is_newline
    taken[1:] |= is_other[1:] & ~is_other[:-1] & ~is_blank[:-1]
    begins[1:] &= ~(taken[:-1] & is_letter[1:])
    goes_on = (kind[2:] & (LETTER | NUMBER | OTHER)) != 0
    begins[1:-1] |= is_space[1:-1] & ~is_newline[1:-1] & goes_on  # the last of several spaces
    _line_breaks(begins, is_newline, is_space, is_other)
    _numbers(begins, kind == NUMBER, digits)
    return begins


def _changes(kind: np.ndarray) -> np.ndarray:
    begins = np.ones(len(kind), bool)
    np.not_equal(kind[1:], kind[:-1], out=begins[1:])
    return begins


def _line_breaks(begins: np.ndarray, is_newline: np.ndarray, is_space: np.ndarray, is_other: np.ndarray) -> None:
    r"""``[^\s\p{L}\p{N}]+[\r\n]*`` and ``\s*[\r\n]+``: a word ends after the last line break of some spaces."""
    change = np.flatnonzero(is_newline[1:] != is_newline[:-1]) + 1
    first, after = change[::2], change[1::2]  # in pairs, since the first and the last character of all are edges
    after_sign = is_other[first - 1]
    begins[first[after_sign]] = False
    begins[after[after_sign]] = True
    spaces = np.flatnonzero(is_space[1:] & ~is_space[:-1]) + 1
    run = np.searchsorted(spaces, first, side="right")
    last = np.ones(len(first), bool)
    last[:-1] = run[1:] != run[:-1]
    begins[after[last]] = True


def _numbers(begins: np.ndarray, is_number: np.ndarray, digits: int) -> None:
    r"""``\p{N}{1,3}``: a word of numbers has at most `digits` characters."""
    at = np.flatnonzero(is_number)
    is_first = np.ones(len(at), bool)
    is_first[1:] = at[1:] != at[:-1] + 1
    order = np.arange(len(at))
    since_first = order - np.maximum.accumulate(np.where(is_first, order, 0))
    begins[at] = since_first % digits == 0


_SHORT = np.array([ord(c) for c in "stmd"])
_LONG = np.array([ord(a) << 8 | ord(b) for a, b in ("re", "ve", "ll")])


def _contractions(begins: np.ndarray, letters: np.ndarray, classes_C: np.ndarray) -> None:
    """``'s|'t|'re|'ve|'m|'ll|'d`` where a word begins with the apostrophe; what follows begins anew."""
    at = np.flatnonzero((classes_C == QUOTE) & begins)
    at = at[classes_C[at + 1] == LETTER]
    short = at[np.isin(letters[at + 1], _SHORT)]
    begins[short + 1] = False
    begins[short + 2] = True
    at = at[classes_C[at + 2] == LETTER]
    long = at[np.isin(letters[at + 1].astype(np.int64) << 8 | letters[at + 2], _LONG)]
    begins[long + 1] = False
    begins[long + 3] = True
