"""The word cache gives exactly the tokenizer's ids, for every kind of tokenizer that it takes."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

from finerank.data.words import WordCache
from tiny import tiny_tokenizer

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def backend(kind: str) -> Tokenizer:
    made = Tokenizer.from_str(tiny_tokenizer().backend_tokenizer.to_str())
    if kind == "gpt2":
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    elif kind == "llama3":
        split = pre_tokenizers.Split(Regex(LLAMA3), "isolated")
        made.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
        made.normalizer = normalizers.NFC()
    return made


CACHES = {kind: (backend(kind), WordCache.for_backend(backend(kind))) for kind in ("digits", "gpt2", "llama3")}


@pytest.mark.parametrize("kind", CACHES)
@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.text(max_size=40)
        | st.text(st.characters(max_codepoint=0x17F), max_size=60)
        | st.text(st.sampled_from("aZ9 '\n\r\tst.,!é“…½²"), max_size=60)
        | st.sampled_from(["<|im_start|>user\nHi<|im_end|>\n", "I'LL 'S it's", "x" * 200, "  a  1  \n\n b "]),
        max_size=5,
    )
)
def test_ids_equal_the_tokenizers(kind: str, texts: list[str]):
    tokenizer, cache = CACHES[kind]
    assert cache is not None
    assert cache.encode(texts) == [e.ids for e in tokenizer.encode_batch(texts, add_special_tokens=False)]


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
    assert cache is not None
    for n in range(30):
        texts = [f"word{n} other{'x' * n} {n}" for _ in range(3)]
        assert cache.encode(texts) == [e.ids for e in tokenizer.encode_batch(texts)]
