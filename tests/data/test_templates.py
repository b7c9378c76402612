"""Every template file against the recorded turns of the original program, and the contract that all owe."""

import json
from pathlib import Path

import pytest

from finerank import registry
from finerank.data.encode import TextEncoder
from finerank.data.settings import TemplateSettings
from finerank.data.templates import load_template
from finerank.data.templates._slots import SlotTemplate
from finerank.data.types import Conversation, Message

RECORDED = json.loads((Path(__file__).parents[1] / "golden" / "templates_rendered.json").read_text(encoding="utf-8"))
PACKAGE = "finerank.data.templates"
NAMES = registry.names(PACKAGE)


class Letters:
    """A tokenizer whose ids stand for whole texts, so that what was encoded can be read back exactly."""

    bos_token_id, eos_token_id = 0, 1
    all_special_tokens = ()
    backend_tokenizer = None
    chat_template = None

    def __init__(self, stop_word: str | None):
        self.stop_word = stop_word
        self.texts = ["{BOS}", "{EOS}"]

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        self.texts.append(text)
        return [len(self.texts) - 1]

    def convert_tokens_to_ids(self, token: str) -> int:
        if token == self.stop_word:
            return 1
        self.texts.append(f"{{T:{token}}}")
        return len(self.texts) - 1

    def convert_ids_to_tokens(self, i: int) -> str:
        return self.stop_word if i == 1 and self.stop_word else self.texts[i].removeprefix("{T:").removesuffix("}")

    def get_vocab(self) -> dict[str, int]:
        return {}

    def text(self, ids: list[int]) -> str:
        return "".join(self.texts[i] for i in ids)


def conversation(system: bool, thought: bool) -> Conversation:
    last = "<think>\nR2\n</think>\n\nA2" if thought else "A2"
    turns = [("system", "SYS")] if system else []
    turns += [("user", "U1"), ("assistant", "A1"), ("user", "U2"), ("assistant", last)]
    return Conversation(messages=tuple(Message(role=r, content=c, trained=r == "assistant") for r, c in turns))


def bound(name: str, enable_thinking: str) -> tuple[SlotTemplate, Letters]:
    spec = registry.load(PACKAGE, name, "template").TEMPLATE
    tokenizer = Letters(spec.stop_words[0] if spec.replace_eos else None)
    return SlotTemplate(spec, TextEncoder(tokenizer), enable_thinking=enable_thinking), tokenizer


@pytest.mark.parametrize("key", sorted(RECORDED))
def test_turns_equal_the_recorded_ones(key: str):
    name, thinking = key.split("|")
    template, tokenizer = bound(name, thinking.lower())
    recorded = RECORDED[key]
    assert template.spec.stop_words == tuple(recorded["stop_words"])
    for system in (True, False):
        for thought in (True, False):
            case = f"{'think' if thought else 'plain'}_{'sys' if system else 'nosys'}"
            [turns] = template.encode([template.turns(conversation(system, thought))])
            assert [[tokenizer.text(t.source), tokenizer.text(t.target)] for t in turns] == recorded[case], case
            messages = conversation(system, thought).messages
            [[turn]] = template.encode([[template.one_turn(messages[:-1], messages[-1].content)]])
            one = [tokenizer.text(turn.source), tokenizer.text(turn.target)]
            assert one == list(recorded[f"{case}_oneturn"]), case


def test_the_names_of_the_format_are_there():
    expected = [
        "chatglm2",
        "chatglm3",
        "chatglm3_system",
        "glm4",
        "glm4_moe",
        "chatml",
        "chatml_de",
        "cpm",
        "default",
        "empty",
        "trl",
        "qwen_lf",
        "qwen",
        "qwen_r1",
        "qwen_math_r1",
        "llama3",
        "mistral",
        "mixtral",
        "magistral",
        "gemma",
        "llama2",
        "alpaca",
        "deepseek2",
        "deepseek2_lite",
        "minicpm3",
        "baichuan2",
        "deepseek3",
        "intern2",
        "hunyuan",
        "qwen3",
        "bailing_mini",
        "plm",
        "gpt_oss",
    ]
    assert set(expected) <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("thinking", ["none", "true", "false"])
def test_a_prompt_is_a_prefix_of_the_training_text_and_answers_end_it(name: str, thinking: str):
    template, tokenizer = bound(name, thinking)
    for messages in (conversation(True, False).messages, conversation(False, False).messages[:2]):
        one = messages[: 1 + [m.role for m in messages].index("user")]
        prompt = tokenizer.text(template.prompt_ids(one))
        answered = Conversation(messages=(*one, Message(role="assistant", content="A1", trained=True)))
        rendered = template.render(answered)
        assert tokenizer.text(rendered.ids).startswith(prompt)
        trained = tokenizer.text([i for i, m in zip(rendered.ids, rendered.loss_mask, strict=True) if m])
        assert "A1" in trained and "U1" not in trained and "SYS" not in trained
        assert tokenizer.text(rendered.ids).endswith(trained)


def test_digest_changes_with_the_template_and_its_thinking():
    digests = {bound(name, "none")[0].digest for name in NAMES}
    assert len(digests) == len(NAMES)
    assert bound("qwen3", "true")[0].digest != bound("qwen3", "false")[0].digest


def test_a_missing_end_token_is_refused_by_name():
    from finerank.errors import DataError
    from tiny import tiny_tokenizer

    with pytest.raises(DataError, match=r"<\|eot_id\|>.*--prompt-type"):
        load_template(TemplateSettings(prompt_type="llama3"), tiny_tokenizer())
