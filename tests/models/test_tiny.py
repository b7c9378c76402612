"""The tiny models that other tests stand on: right shapes, the same every time, text round trips."""

import pytest
import torch

from tiny import FAMILIES, VOCAB_SIZE, tiny_model, tiny_tokenizer


@pytest.mark.parametrize("family", FAMILIES)
def test_tiny_models_are_reproducible_and_attend(family):
    model, again = tiny_model(family), tiny_model(family)
    ids = torch.arange(8).view(1, -1)
    other = ids.clone()
    other[0, 0] = 9
    with torch.no_grad():
        logits = model(ids).logits
        assert torch.equal(logits, again(ids).logits)
        assert (logits - model(other).logits)[0, -1].abs().max() > 1e-3, "the first token does not reach the last one"
    assert logits.shape == (1, 8, VOCAB_SIZE) and not model.training


def test_tiny_tokenizer_round_trips_any_text():
    tokenizer = tiny_tokenizer()
    text = "Explain 1234 moons, 你好 \u00e9\U0001f600."
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], add_generation_prompt=True)["input_ids"]
    assert chat[0] == 1 and 2 in chat
    assert tiny_tokenizer(chat_template=False).chat_template is None
