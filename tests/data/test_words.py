"""The word cache gives exactly the tokenizer's ids, for every kind of tokenizer that it takes."""

import itertools

import numpy as np
import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

from finerank.data import cut
from finerank.data.words import WordCache
from tiny import tiny_tokenizer

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


QWEN2 = LLAMA3.replace("{1,3}", "")


def assert_equal(cache: WordCache | None, tokenizer: Tokenizer, texts: list[str]) -> None:
    assert cache is not None
    ids, lengths = cache.encode(texts)
    expected = [e.ids for e in tokenizer.encode_batch(texts, add_special_tokens=False)]
    assert lengths.tolist() == list(map(len, expected))
    assert ids.tolist() == list(itertools.chain.from_iterable(expected))
    assert ids.dtype == np.int32 and lengths.dtype == np.int64


def backend(kind: str) -> Tokenizer:
    made = Tokenizer.from_str(tiny_tokenizer().backend_tokenizer.to_str())
    if kind == "gpt2":
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    elif kind in ("llama3", "qwen2"):
        split = pre_tokenizers.Split(Regex(LLAMA3 if kind == "llama3" else QWEN2), "isolated")
        made.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
        made.normalizer = normalizers.NFC()
    return made


KINDS = ("digits", "gpt2", "llama3", "qwen2")
CACHES = {kind: (backend(kind), WordCache.for_backend(backend(kind))) for kind in KINDS}
TEXTS = (
    st.text(max_size=40)
    | st.text(st.characters(max_codepoint=0x17F), max_size=60)
    | st.text(st.sampled_from("aZ9 '\n\r\tst.,!é“…½²"), max_size=60)
    | st.text(st.sampled_from(" '\n\rsStTrReEvVlLmMdD1.“"), max_size=30)
    | st.lists(
        st.sampled_from(["<|im_start|>", "<|im_end|>", "<|im_", " ", "'s", "\n", "don't", "x" * 17, "7" * 5, "\0", "é"])
    ).map("".join)
    | st.sampled_from(["<|im_start|>user\nHi<|im_end|>\n", "I'LL 'S it's", "x" * 200, "  a  1  \n\n b "])
)


@pytest.mark.parametrize("kind", CACHES)
@settings(max_examples=300, deadline=None)
@given(st.lists(TEXTS, max_size=5))
def test_ids_equal_the_tokenizers(kind: str, texts: list[str]):
    tokenizer, cache = CACHES[kind]
    assert_equal(cache, tokenizer, texts)


@pytest.mark.parametrize("pattern", cut.PATTERNS)
@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.text(st.characters(max_codepoint=0x7F, min_codepoint=1) | st.sampled_from(" '\n\rsé“½")), max_size=4)
)
def test_words_begin_where_the_regular_expression_says(pattern: str, texts: list[str]):
    joined = "\0".join(["", *texts, ""])
    points = np.array([ord(c) for c in joined], np.uint16)
    begins = cut.word_begins(pattern, points, cut.classes_of(points))
    begins[points == 0] = begins[1:][points[:-1] == 0] = False
    expected = np.zeros(len(points), bool)
    at = 1
    for text in texts:
        pieces = regex.split(r"(\p{N})", text) if pattern == cut.GPT2_DIGITS else [text]
        for piece in pieces:
            for match in regex.finditer(cut.GPT2 if len(pieces) > 1 else pattern, piece):
                expected[at + match.start()] = True
            at += len(piece)
        at += 1
    inner = (points != 0) & np.concatenate([[False], points[:-1] != 0])  # the first of each text is a word's anyway
    assert begins[inner].tolist() == expected[inner].tolist()


def test_long_lists_and_long_texts_are_cut_into_batches(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("finerank.data.words._BATCH", 50)
    monkeypatch.setattr("finerank.data.words._LONGEST_TEXT", 100)
    tokenizer, cache = backend("digits"), WordCache.for_backend(backend("digits"))
    texts = ["", "a short one", "é" * 60, "word " * 30, "", "it's 5", "日本語", "x" * 49, "yz", ""]
    assert_equal(cache, tokenizer, texts)
    assert_equal(cache, tokenizer, [])
    assert_equal(cache, tokenizer, [""])


def test_other_kinds_are_left_to_the_tokenizer():
    spaces = backend("digits")
    spaces.pre_tokenizer = pre_tokenizers.Metaspace()
    prefixed = backend("digits")
    prefixed.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    lowered = backend("digits")
    lowered.normalizer = normalizers.Lowercase()
    for other in (spaces, prefixed, lowered, Tokenizer(models.WordLevel({"a": 0, "?": 1}, "?"))):
        assert WordCache.for_backend(other) is None


def test_a_full_cache_starts_again(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("finerank.data.words._MOST_WORDS", 10)
    tokenizer, cache = backend("digits"), WordCache.for_backend(backend("digits"))
    for n in range(30):
        assert_equal(cache, tokenizer, [f"word{n} other{'x' * n} {n}" for _ in range(3)])
