"""The tokenizer's own template: ids equal `apply_chat_template`, answers are proved, thoughts and tools are shown."""

import copy
import pickle
import random

import pytest

from finerank.data.settings import TemplateSettings
from finerank.data.templates import Template, load_template
from finerank.data.types import Conversation, Message
from finerank.errors import ConfigError, DataError
from tiny import CHAT_TEMPLATE, tiny_tokenizer

MARKED = (
    "{% for message in messages %}<|im_start|>{{ message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{{ '\n' }}{% else %}{{ message['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
THINKING = (  # as Qwen 3: the thought of the last answer is shown, those of earlier ones are not
    "{% for m in messages %}{% if m.role == 'assistant' and loop.last %}{{ '<|im_start|>assistant\n<think>\n\n</think>"
    "\n\n' + m.content + '<|im_end|>\n' }}{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% if enable_thinking is "
    "defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)


def with_template(source: str, **settings: str) -> Template:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = source
    return load_template(TemplateSettings(**settings), tokenizer)  # type: ignore[arg-type]


def talk(num_turns: int, seed: int = 0) -> list[dict[str, str]]:
    draw = random.Random(seed)
    letters = "abc XYZ \n'!0189.,你好é_"
    said = [{"role": "system", "content": "Be kind."}] if seed % 2 else []
    for _ in range(num_turns):
        for role in ("user", "assistant"):
            text = "w" + "".join(draw.choice(letters) for _ in range(draw.randrange(30))) + "."
            said.append({"role": role, "content": text})
    return said


def as_conversation(messages: list[dict[str, str]]) -> Conversation:
    return Conversation(messages=tuple(Message(**m, trained=m["role"] == "assistant") for m in messages))


@pytest.mark.parametrize("source", [CHAT_TEMPLATE, MARKED])
def test_ids_equal_apply_chat_template_and_answers_are_trained(source: str):
    template = with_template(source)
    tokenizer = template.encoder.tokenizer
    for seed in range(40):
        messages = talk(1 + seed % 3, seed)
        rendered = template.render(as_conversation(messages))
        assert rendered.ids == tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
        trained = tokenizer.decode([i for i, m in zip(rendered.ids, rendered.loss_mask, strict=True) if m])
        assert trained == "".join(m["content"] + "<|im_end|>" for m in messages if m["role"] == "assistant")
        prompt = template.prompt_ids([Message(**m) for m in messages[:-1]])
        assert rendered.ids[: len(prompt)] == prompt
        assert prompt == tokenizer.apply_chat_template(
            messages[:-1], add_generation_prompt=True, tokenize=True, return_dict=False
        )
    assert template.stop_ids == (2,)


def test_a_thought_that_only_the_last_answer_shows():
    template = with_template(THINKING)
    rendered = template.render(as_conversation(talk(2)))
    trained = template.encoder.tokenizer.decode([i for i in rendered.labels if i >= 0])
    first, last = (m["content"] for m in talk(2) if m["role"] == "assistant")
    assert trained == f"{first}<|im_end|><think>\n\n</think>\n\n{last}<|im_end|>"
    without = with_template(THINKING, enable_thinking="false")
    assert without.digest != template.digest
    text = template.encoder.tokenizer.decode(without.prompt_ids([Message(role="user", content="Hi")]))
    assert text.endswith("assistant\n<think>\n\n</think>\n\n")


ENDS = (  # as GPT-OSS and Phi 3: the last answer ends otherwise than earlier ones
    "{% for m in messages %}<|im_start|>{{ m.role + '\n' }}{% if m.role == 'assistant' %}{{ '=' + m.content }}"
    "{{ '<|endoftext|>' if loop.last else '<|im_end|>\n' }}{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def trained_text(template: Template, messages: list[dict[str, str]]) -> str:
    rendered = template.render(as_conversation(messages))
    tokenizer = template.encoder.tokenizer
    assert rendered.ids == tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    return tokenizer.decode([i for i in rendered.labels if i >= 0])


def test_an_end_token_that_only_the_last_answer_has():
    first, last = (m["content"] for m in talk(2) if m["role"] == "assistant")
    assert trained_text(with_template(ENDS), talk(2)) == f"={first}<|im_end|>={last}<|endoftext|>"


def test_an_answer_marked_in_two_parts_is_one():
    parts = MARKED.replace("+ '<|im_end|>' }}{% endgen", "}}{% endgeneration %}{% generation %}<|im_end|>{% endgen", 1)
    assert parts != MARKED
    assert trained_text(with_template(parts), talk(2)) == trained_text(with_template(MARKED), talk(2))


def test_only_trained_answers_must_be_found():
    prompt = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n'"
    thoughtful = THINKING.replace(prompt, prompt + " + '<think>\n\n</think>\n\n'")
    assert thoughtful != THINKING
    template = with_template(thoughtful)
    with pytest.raises(DataError, match=r"not a prefix.*--mask-history"):
        template.render(as_conversation(talk(2)))
    *before, last = as_conversation(talk(2)).messages
    masked = tuple(Message(role=m.role, content=m.content) for m in before)
    rendered = template.render(Conversation(messages=(*masked, last)))
    trained = template.encoder.tokenizer.decode([i for i in rendered.labels if i >= 0])
    assert trained == f"{last.content}<|im_end|>"


def test_answers_without_an_end_token_are_warned_about(caplog: pytest.LogCaptureFixture):
    with_template(CHAT_TEMPLATE)
    assert not caplog.records
    with_template(
        "{% for m in messages %}{{ '<|im_start|>' + m.role + m.content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}"
    )
    assert "does not learn to stop" in caplog.text and "--append-eod" in caplog.text


def test_a_template_whose_answers_cannot_be_found_is_refused():
    reversed_order = CHAT_TEMPLATE.replace("in messages", "in messages[::-1]")
    with pytest.raises(DataError, match=r"not a prefix.*--prompt-type"):
        with_template(reversed_order)
    with pytest.raises(DataError, match=r"cannot be trained on"):
        with_template("{{ raise_exception('no') }}")
    with pytest.raises(DataError, match=r"cannot be trained on"):
        with_template("{% for m in messages %}{{ m.__class__.__mro__ }}{% endfor %}")  # the sandbox refuses


def test_two_templates_and_switches_without_effect_are_refused():
    with pytest.raises(ConfigError, match="exclude each other"):
        load_template(TemplateSettings(prompt_type="qwen", hf_chat_template=True), tiny_tokenizer())
    with pytest.raises(ConfigError, match="no thinking switch"):
        with_template(CHAT_TEMPLATE, enable_thinking="true")
    with pytest.raises(ConfigError, match="--prompt-type"):
        load_template(TemplateSettings(hf_chat_template=True), tiny_tokenizer(chat_template=False))
    with pytest.raises(ConfigError, match="Did you mean 'qwen3'"):
        load_template(TemplateSettings(prompt_type="qwen33"), tiny_tokenizer())
    nothing = load_template(TemplateSettings(), tiny_tokenizer(chat_template=False))
    with pytest.raises(DataError, match=r"--prompt-type with one of alpaca"):
        nothing.prompt_ids([Message(role="user", content="Hi")])


def test_templates_travel_to_workers():
    for settings in (TemplateSettings(), TemplateSettings(prompt_type="chatml")):
        template = load_template(settings, tiny_tokenizer())
        copied = pickle.loads(pickle.dumps(template))
        assert copied.digest == template.digest
        assert copied.render(as_conversation(talk(2))) == template.render(as_conversation(talk(2)))


def test_special_token_text_is_only_text_in_any_turn():
    template = with_template(CHAT_TEMPLATE)
    messages = [
        {"role": "user", "content": "x <|im_end|> y"},
        {"role": "assistant", "content": "<|im_start|>"},
        {"role": "user", "content": "again"},
        {"role": "assistant", "content": "ok"},
    ]
    rendered = template.render(as_conversation(messages))
    assert rendered.ids.count(1) == 4 and rendered.ids.count(2) == 4
    plain = template.encoder.tokenizer.apply_chat_template(messages, tokenize=False)
    assert template.encoder.tokenizer.decode(rendered.ids) == plain


def test_tools_and_calls_reach_the_template():
    source = CHAT_TEMPLATE.replace(
        "message['content']", "(message['content'] or message.tool_calls[0].function.name)"
    ).replace("{% for message", "{% if tools %}{{ tools[0].name }}{% endif %}{% for message", 1)
    messages = (
        Message(role="user", content="U"),
        Message(role="function", content='{"name": "look", "arguments": {}}', trained=True),
        Message(role="tool", content="seen"),
        Message(role="assistant", content="A", trained=True),
    )
    template = with_template(source)
    text = template.encoder.tokenizer.decode(
        template.render(Conversation(messages=messages, tools='[{"name": "look"}]')).ids
    )
    assert text.startswith("look<|im_start|>user") and "assistant\nlook<|im_end|>" in text
    named = load_template(TemplateSettings(prompt_type="chatml"), tiny_tokenizer())
    text = named.encoder.tokenizer.decode(named.render(Conversation(messages=messages, tools='[{"name": "look"}]')).ids)
    assert "> Tool Name: look" in text and "Action: look\nAction Input: {}" in text and "tool\nseen" in text
    broken = copy.copy(messages[1])
    object.__setattr__(broken, "content", "{")
    with pytest.raises(DataError, match="not JSON"):
        named.render(Conversation(messages=(messages[0], broken)))
