"""The Mistral templates give the ids of Mistral's own package, recorded; where it is installed, they are made anew.

The texts have no runs of spaces: transformers' conversion of the tokenizer files cuts those otherwise, and the package
leaves out a space before an end token.
"""

import gzip
import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from finerank.data.settings import TemplateSettings
from finerank.data.templates import load_template
from finerank.data.types import Conversation, Message

GOLDEN = Path(__file__).parents[1] / "golden" / "mistral"
RECORDED: dict[str, list[int]] = json.loads((GOLDEN / "ids.json").read_text())
THOUGHT = "<think>\nLet me see:\n1 + 1\n</think>\n\n"

PLAIN = {
    "one": [("user", "What is 1 + 1?"), ("assistant", "It is 2.")],
    "two": [("user", "Hi"), ("assistant", "Hello!"), ("user", "And then?"), ("assistant", "Nothing.")],
    "letters": [("user", "\u00e9t\u00e9\n\n\u4f60\u597d \U0001f600"), ("assistant", "```\n\tx = [1, 2]\n```")],
    "tags": [("user", "a [b] /INST"), ("assistant", "<s")],
}
THOUGHTFUL = {
    "thought": [("system", "Be brief.\n"), ("user", "What is 1 + 1?"), ("assistant", THOUGHT + "It is 2.")],
    "thoughts": [
        ("system", "SYS"),
        ("user", "Hi"),
        ("assistant", THOUGHT + "Hello!"),
        ("user", "And\n"),
        ("assistant", THOUGHT + "\u4f60\u597d"),
    ],
}
CASES = [(f"v1 {key}", name, turns) for key, turns in PLAIN.items() for name in ("mistral", "mixtral")]
CASES += [(f"v7 {key}", "magistral", turns) for key, turns in THOUGHTFUL.items()]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory):
    loaded = {}
    for version in ("v1", "v7"):
        folder = tmp_path_factory.mktemp(version)
        (folder / "tokenizer.model").write_bytes(gzip.decompress((GOLDEN / f"{version}.model.gz").read_bytes()))
        config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        config |= {"legacy": True, "add_prefix_space": True}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        loaded[version] = AutoTokenizer.from_pretrained(folder)
    return loaded


@pytest.mark.parametrize(("key", "name", "turns"), CASES, ids=[f"{key}-{name}" for key, name, _ in CASES])
def test_ids_are_those_of_mistral(key: str, name: str, turns: list[tuple[str, str]], tokenizers):
    template = load_template(TemplateSettings(prompt_type=name), tokenizers[key.split()[0]])
    messages = tuple(Message(role=role, content=text, trained=role == "assistant") for role, text in turns)
    assert template.render(Conversation(messages=messages)).ids == RECORDED[key]


def made_by_mistral() -> dict[str, list[int]]:
    """The ids that `mistral-common` gives."""
    messages = pytest.importorskip("mistral_common.protocol.instruct.messages")
    request = pytest.importorskip("mistral_common.protocol.instruct.request")
    mistral = pytest.importorskip("mistral_common.tokens.tokenizers.mistral")
    classes = {
        "user": messages.UserMessage,
        "assistant": messages.AssistantMessage,
        "system": messages.SystemMessage,
    }
    made = {}
    for key, turns in {key: turns for key, _, turns in CASES}.items():
        tokenizer = getattr(mistral.MistralTokenizer, key.split()[0])().instruct_tokenizer
        asked = request.InstructRequest(messages=[classes[role](content=text) for role, text in turns])
        made[key] = tokenizer.encode_instruct(asked).tokens
    return made


def test_recorded_ids_are_those_of_the_package():
    assert made_by_mistral() == RECORDED
