"""Streamed text: pieces join to the decoded whole, never a half character, never past a stop text."""

from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from finerank.generate.text import TextStream
from tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def pieces_of(tokenizer, ids, stop=()):
    stream = TextStream(tokenizer, stop)
    return [*(stream.push(token) for token in ids), stream.finish()], stream


@given(st.lists(st.integers(0, len(TOKENIZER) - 1), max_size=40))
def test_pieces_of_any_tokens_join_to_the_whole(ids):
    pieces, stream = pieces_of(TOKENIZER, ids)
    assert "".join(pieces) == stream.text == TOKENIZER.decode(ids, skip_special_tokens=True)


@given(st.text(max_size=30))
def test_no_piece_holds_half_a_character(text):
    pieces, _ = pieces_of(TOKENIZER, TOKENIZER(text, add_special_tokens=False).input_ids)
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text


def test_many_byte_characters_come_whole():
    text = "你好，\U0001f600 é世界"
    pieces, _ = pieces_of(TOKENIZER, TOKENIZER(text).input_ids)
    assert "".join(pieces) == text and "\U0001f600" in "".join(pieces) and "" in pieces


@given(
    st.text(alphabet="abc你 ", max_size=30), st.lists(st.text(alphabet="abc你 ", min_size=1, max_size=4), max_size=3)
)
def test_stop_texts_cut_exactly_there(text, stops):
    pieces, stream = pieces_of(TOKENIZER, TOKENIZER(text).input_ids, stops)
    ends = [(text.index(stop) + len(stop), text.index(stop)) for stop in stops if stop in text]
    assert "".join(pieces) == (text[: min(ends)[1]] if ends else text), "the stop text that is complete first counts"
    assert stream.stopped == bool(ends)


def test_sentencepiece_style_byte_fallback_streams_too():
    vocabulary = {"<unk>": 0, "▁Hi": 1, "▁you": 2, **{f"<0x{i:02X}>": 3 + i for i in range(256)}}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    ids = [1, 2, *(3 + byte for byte in "你好".encode())]
    pieces, stream = pieces_of(tokenizer, ids)
    assert pieces[:2] == ["Hi", " you"] and "".join(pieces) == stream.text == "Hi you你好"
