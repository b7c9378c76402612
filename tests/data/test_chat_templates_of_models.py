"""Chat templates of real models, as TRL ships them: each gives the ids of `apply_chat_template`, and the answers that
are found by proof are those that TRL's training variant of the same template marks.

Skipped where TRL is not installed (`pip install --no-deps trl` is enough: only its template files are read).
"""

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_hf_template import as_conversation, talk

from finerank.data.settings import TemplateSettings
from finerank.data.templates import Template, load_template
from finerank.errors import DataError
from tiny import tiny_tokenizer

CONTROL = re.compile(r"<\|[\w/]+\|>|<｜[^｜]+｜>|<(?:start|end)_of_turn>|\[gMASK\]|<sop>|<\|?turn\|?>")
PROVED = ("cohere", "cohere2", "gemma", "gemma3", "gptoss", "lfm2", "llama3", "phi3", "phi3_5", "qwen2_5", "qwen3")
PROVED += ("llama3_1", "llama3_2", "gemma4", "qwen3_instruct_2507", "muse_glimmer", "qwen3_8")
MARKED = (*(f"{name}_training" for name in PROVED[:11]), "deepseekv3_training", "glm4moe_training")
REFUSED = ("deepseek_r1_distill", "deepseekv3", "nemotron_3_nano")
"""Their prompt opens a thought that the answers of a conversation do not show."""
SAME_ANSWERS = ("cohere", "cohere2", "gemma", "gemma3", "lfm2", "llama3", "phi3", "phi3_5")


@pytest.fixture(scope="session")
def folder() -> Iterator[Path]:
    spec = importlib.util.find_spec("trl")
    for place in (spec.submodule_search_locations or []) if spec else []:
        if (Path(place) / "chat_templates").is_dir():
            yield Path(place) / "chat_templates"
            return
    pytest.skip("TRL, whose chat templates these are, is not installed")


def bound(folder: Path, name: str) -> Template:
    tokenizer = tiny_tokenizer()
    source = (folder / f"{name}.jinja").read_text(encoding="utf-8")
    tokenizer.add_special_tokens({"additional_special_tokens": sorted({*CONTROL.findall(source), "<|im_end|>"})})
    tokenizer.chat_template = source
    return load_template(TemplateSettings(), tokenizer)


def talks(name: str) -> list[list[dict[str, str]]]:
    without_system = name.startswith("gemma") and name[:6] not in ("gemma3", "gemma4")
    made = [talk(1 + seed % 3, seed) for seed in range(12)]
    return [[m for m in said if not (without_system and m["role"] == "system")] for said in made]


@pytest.mark.parametrize("name", [*PROVED, *MARKED])
def test_ids_equal_apply_chat_template(folder: Path, name: str):
    template = bound(folder, name)
    tokenizer = template.encoder.tokenizer
    for messages in talks(name):
        rendered = template.render(as_conversation(messages))
        assert rendered.ids == tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
        trained = tokenizer.decode([i for i in rendered.labels if i >= 0])
        at = 0
        for message in messages:
            if message["role"] == "assistant":
                at = trained.index(message["content"], at) + len(message["content"])
                assert re.match(rf"\s*({CONTROL.pattern})", trained[at:])


@pytest.mark.parametrize("name", SAME_ANSWERS)
def test_proved_answers_are_the_marked_ones(folder: Path, name: str):
    proved, marked = bound(folder, name), bound(folder, f"{name}_training")
    for messages in talks(name):
        assert proved.render(as_conversation(messages)) == marked.render(as_conversation(messages))


@pytest.mark.parametrize("name", REFUSED)
def test_a_prompt_that_opens_a_thought_is_refused(folder: Path, name: str):
    with pytest.raises(DataError, match=r"not a prefix.*--prompt-type"):
        bound(folder, name)
