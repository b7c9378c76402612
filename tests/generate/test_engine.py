"""Generation held against transformers' own: greedy tokens, batches, seeds, stops, limits."""

import pytest
import torch

from finerank.data.types import Message
from finerank.errors import ConfigError, DataError
from finerank.generate.decoding import Decoding
from finerank.generate.engine import Generator
from finerank.generate.sampling import Sampler
from finerank.generate.settings import SamplingSettings
from tiny import FAMILIES, tiny_model, tiny_tokenizer

PROMPTS = ["Write a story", "Hi", "Explain the moon, and then the quick brown fox jumps over 12 dogs.", "你好"]


class PlainTemplate:
    """Prompts as ChatML, without the machinery of finerank.data.templates."""

    def __init__(self, tokenizer, stop_ids=(2,)):
        self.tokenizer = tokenizer
        self.stop_ids = stop_ids

    def prompt_ids(self, messages):
        rows = [{"role": m.role, "content": m.content} for m in messages]
        return self.tokenizer.apply_chat_template(rows, add_generation_prompt=True)["input_ids"]


def make(family="llama", stop_ids=(2,), **overrides):
    tokenizer = tiny_tokenizer()
    return Generator(tiny_model(family, **overrides), tokenizer, PlainTemplate(tokenizer, stop_ids))


def ask(text):
    return [Message(role="user", content=text)]


def tokens_of(model, prompts, settings, seeds, steps):
    """Raw tokens of each prompt for a fixed number of steps."""
    decoding = Decoding(model, prompts, Sampler(settings, seeds))
    return list(zip(*[decoding.step() for _ in range(steps)], strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_equal_transformers_generate_alone_and_batched(family):
    generator = make(family)
    prompts = [generator.prompt_ids(ask(text)) for text in PROMPTS]
    greedy = SamplingSettings(greedy=True)
    expected = []
    for prompt in prompts:
        ids = generator.model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            max_new_tokens=24,
            min_new_tokens=24,
            eos_token_id=None,
            pad_token_id=2,
        )
        expected.append(tuple(ids[0, len(prompt) :].tolist()))
    alone = [tokens_of(generator.model, [prompt], greedy, [0], 24)[0] for prompt in prompts]
    assert alone == expected
    assert tokens_of(generator.model, prompts, greedy, [0] * 4, 24) == expected
    assert len(set(expected)) == len(prompts), "the prompts matter"


@pytest.mark.parametrize("family", ["llama", "gemma3", "mixtral"])
def test_sampled_answers_depend_on_seed_and_prompt_only(family):
    generator = make(family)
    settings = SamplingSettings(temperature=1.5, top_k=0, top_p=1.0, max_new_tokens=20)
    conversations = [ask(text) for text in PROMPTS]
    seeds = [11, 12, 13, 14]
    together = generator.answer_all(conversations, settings, seeds=seeds)
    assert together == generator.answer_all(conversations, settings, seeds=seeds)
    alone = [
        generator.answer_all([one], settings, seeds=[seed])[0] for one, seed in zip(conversations, seeds, strict=True)
    ]
    assert together == alone
    assert together != generator.answer_all(conversations, settings, seeds=[5, 6, 7, 8])


def test_rows_that_end_early_leave_the_others_as_they_were():
    plain = make(stop_ids=())
    settings = SamplingSettings(greedy=True, max_new_tokens=30)
    prompts = [plain.prompt_ids(ask(text)) for text in PROMPTS]
    full = tokens_of(plain.model, prompts, settings, [0] * 4, 30)
    stops = {full[0][3], full[2][7]}
    expected = []
    for row in full:
        end = next((place for place, token in enumerate(row) if token in stops), None)
        expected.append((30, "length") if end is None else (end + 1, "stop"))
    answers = make(stop_ids=tuple(stops)).answer_all([ask(text) for text in PROMPTS], settings)
    assert [(a.num_new_tokens, a.finish_reason) for a in answers] == expected
    assert len(set(expected)) > 2, "rows end at different steps"
    for answer, row, (count, reason) in zip(answers, full, expected, strict=True):
        kept = row[: count - (reason == "stop")]
        assert answer.text == plain.tokenizer.decode(kept, skip_special_tokens=True)


def test_streamed_pieces_join_to_the_batch_answer():
    generator = make()
    for text in PROMPTS:
        settings = SamplingSettings(temperature=1.2, max_new_tokens=40, seed=3)
        stream = generator.stream(ask(text), settings)
        pieces = list(stream)
        (answer,) = generator.answer_all([ask(text)], settings)
        assert "".join(pieces) == stream.text == answer.text and stream.answer == answer
        assert len(pieces) > 5 and all(pieces)


def test_a_stop_text_ends_the_answer_before_it():
    generator = make(stop_ids=())
    full = "".join(generator.stream(ask("Hi"), SamplingSettings(greedy=True, max_new_tokens=40)))
    stop = full[10:13]
    stream = generator.stream(ask("Hi"), SamplingSettings(greedy=True, max_new_tokens=40, stop=[stop, "never there"]))
    assert "".join(stream) == full[: full.index(stop)] and stream.answer.finish_reason == "stop"


def test_an_answer_left_early_keeps_what_was_said():
    stream = make(stop_ids=()).stream(ask("Hi"), SamplingSettings(max_new_tokens=40))
    said = ""
    for piece in stream:
        said += piece
        if len(said) > 5:
            break
    assert stream.text == said and stream.answer is None


def test_the_context_bounds_prompt_and_answer():
    generator = make(max_position_embeddings=40, stop_ids=())
    prompt = len(generator.prompt_ids(ask("Hi")))
    (answer,) = generator.answer_all([ask("Hi")], SamplingSettings(max_new_tokens=100))
    assert answer.num_new_tokens == 40 - prompt and answer.finish_reason == "length"
    with pytest.raises(DataError, match="but the model's context ends at 40; shorten it"):
        generator.stream(ask("word " * 40), SamplingSettings())


def test_no_conversations_no_answers():
    assert make().answer_all([], SamplingSettings()) == []


@pytest.mark.parametrize(
    "wrong",
    [{"max_new_tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.1}, {"top_k": -1}, {"stop": [""]}],
)
def test_wrong_sampling_settings_name_the_flag(wrong):
    with pytest.raises(ConfigError, match="--" + next(iter(wrong)).replace("_", "-")):
        SamplingSettings(**wrong)
