"""Every template file against the recorded turns of the original program, and the contract that all owe."""

import hashlib
import json
from pathlib import Path

import pytest

from finerank import registry
from finerank.data.encode import TextEncoder
from finerank.data.rows import BadRow
from finerank.data.settings import TemplateSettings
from finerank.data.templates import Template, load_template
from finerank.data.types import Conversation, Message
from finerank.errors import DataError
from tiny import tiny_tokenizer

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


def bound(name: str, enable_thinking: str) -> tuple[Template, Letters]:
    spec = registry.load(PACKAGE, name, "template").TEMPLATE
    tokenizer = Letters(spec.stop_words[0] if spec.replace_eos else None)
    return spec.bind(TextEncoder(tokenizer), enable_thinking=enable_thinking), tokenizer


def shown(template: Template, tokenizer: Letters, conversation: Conversation) -> list[list[str]]:
    """[source, target] of each turn as text."""
    [turns] = template.encode([template.turns(conversation)])
    return [[tokenizer.text(t.source), tokenizer.text(t.target)] for t in turns]


@pytest.mark.parametrize("key", sorted(RECORDED))
def test_turns_equal_the_recorded_ones(key: str):
    name, thinking = key.split("|")
    template, tokenizer = bound(name, thinking.lower())
    recorded = RECORDED[key]
    assert registry.load(PACKAGE, name, "template").TEMPLATE.stop_words == tuple(recorded["stop_words"])
    for system in (True, False):
        for thought in (True, False):
            case = f"{'think' if thought else 'plain'}_{'sys' if system else 'nosys'}"
            assert shown(template, tokenizer, conversation(system, thought)) == recorded[case], case
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
        "deepseek4",
    ]
    assert len(expected) == 34
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
    with pytest.raises(DataError, match=r"<\|eot_id\|>.*--prompt-type"):
        load_template(TemplateSettings(prompt_type="llama3"), tiny_tokenizer())


# What `configs/finetune/templates.json` of MindSpeed-LLM says about the templates that no recorded file above holds
# (commits 09bd674 and 501538c of Ascend/MindSpeed-LLM; glm4_moe, qwen_lf and gpt_oss as in the copy of its master in
# lvhaojieming/MIndSpeed, commit 1d14808), written out by its `templates.py` and `formatter.py`: a system text, a
# question, a call, the tool's result and an answer; then two plain exchanges without a system text.
CALL = '{"name": "add", "arguments": {"a": 1}}'
ACTION = 'Action: add\nAction Input: {"a": 1}'
TAGGED = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
EMPTY = "<think>\n\n</think>\n\n"
GPT_EMPTY = "<|channel|>analysis<|message|><|end|><|start|>assistant<|channel|>final<|message|>"


def chatml(role: str, content: str) -> str:
    return f"<|im_start|>{role}\n{content}<|im_end|>\n"


ASSISTANT = "<|im_start|>assistant\n"
RESULT = "<tool_response>\nR\n</tool_response>"
DEEPSEEK2 = [["{BOS}SYS\n\nUser: U1\n\nAssistant:", ACTION + "{EOS}"], ["User: R\n\nAssistant:", "A2{EOS}"]]
FROM_THE_SOURCE: dict[str, list[list[str]]] = {
    "chatglm2": [
        ["{T:[gMASK]}{T:sop}SYS[Round 0]\n\n问：U1\n\n答：", ACTION],
        ["\n\n[Round 1]\n\n问：R\n\n答：", "A2"],
    ],
    "chatglm3_system": [
        ["{T:[gMASK]}{T:sop}{T:<|system|>}\nSYS{T:<|user|>}\nU1{T:<|assistant|>}", 'add\n{"a": 1}'],
        ["{T:<|observation|>}\nR{T:<|assistant|>}", "\nA2"],
    ],
    "glm4_moe": [
        ["[gMASK]<sop><|system|>\nSYS<|user|>\nU1<|assistant|>" + EMPTY, 'add\n{"a": 1}'],
        ["<|observation|>\nR<|assistant|>" + EMPTY, "\nA2"],
    ],
    "chatml_de": [
        [chatml("system", "SYS") + chatml("user", "U1") + ASSISTANT, ACTION + "{EOS}"],
        ["\n" + chatml("tool", "R") + ASSISTANT, "A2{EOS}"],
    ],
    "cpm": [["{BOS}SYS<用户>U1<AI>", ACTION + "{EOS}"], ["<用户>R<AI>", "A2{EOS}"]],
    "qwen_lf": [
        [chatml("system", "SYS") + chatml("user", "U1") + ASSISTANT, ACTION + "{EOS}"],
        [chatml("user", RESULT) + ASSISTANT, "A2<|im_end|>\n"],
    ],
    "qwen_math_r1": [
        [chatml("system", "SYS") + chatml("user", "U1") + ASSISTANT, ACTION + "{EOS}"],
        ["\n" + chatml("tool", "R") + ASSISTANT, "A2{EOS}"],
    ],
    "mixtral": [["{BOS}SYS[INST] U1 [/INST]", ACTION + "{EOS}"], ["[INST] R [/INST]", "A2{EOS}"]],
    "magistral": [
        ["{BOS}[SYSTEM_PROMPT]SYS[/SYSTEM_PROMPT][INST]U1[/INST]" + EMPTY, ACTION + "{EOS}"],
        ["[INST]R[/INST]" + EMPTY, "A2{EOS}"],
    ],
    "deepseek2": DEEPSEEK2,
    "deepseek2-lite": DEEPSEEK2,
    "minicpm3": DEEPSEEK2,
    "intern2": [
        ["{BOS}" + chatml("system", "SYS") + chatml("user", "U1") + ASSISTANT, ACTION + "{EOS}"],
        [chatml("user", "R") + ASSISTANT, "A2<|im_end|>\n"],
    ],
    "hunyuan": [["SYSU1", ACTION + "{EOS}"], ["R", "A2"]],
    "qwen3": [
        [chatml("system", "SYS") + chatml("user", "U1") + ASSISTANT + EMPTY, TAGGED + "<|im_end|>\n"],
        [chatml("user", RESULT) + ASSISTANT + EMPTY, "A2<|im_end|>\n"],
    ],
    "bailing_mini": [
        [
            "<role>SYSTEM</role>SYS<|role_end|><role>HUMAN</role>U1<|role_end|><role>ASSISTANT</role>",
            TAGGED + "<|role_end|>",
        ],
        [f"<role>OBSERVATION</role>\n{RESULT}<|role_end|><role>ASSISTANT</role>", "A2<|role_end|>"],
    ],
    "plm": [
        [chatml("system", "SYS") + chatml("user", "U1") + ASSISTANT, ACTION + "{EOS}"],
        [chatml("user", "R") + ASSISTANT, "A2<|im_end|>\n"],
    ],
    "gpt_oss": [
        ["<|start|>system<|message|>SYS<|end|><|start|>user<|message|>U1<|end|><|start|>assistant" + GPT_EMPTY, ACTION],
        ["<|start|>user<|message|>R<|end|><|start|>assistant" + GPT_EMPTY, "A2<|end|>"],
    ],
    "deepseek4": [
        [
            "<｜begin▁of▁sentence｜>SYS<｜User｜>U1<｜Assistant｜></think>",
            '\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="add">\n<｜DSML｜parameter name="a" string="false">1'
            "</｜DSML｜parameter>\n</｜DSML｜invoke>\n</｜DSML｜tool_calls><｜end▁of▁sentence｜>",
        ],
        ["<｜User｜><tool_result>R</tool_result><｜Assistant｜></think>", "A2<｜end▁of▁sentence｜>"],
    ],
}
DEFAULT_SYSTEMS = {
    "chatglm3_system": "You are ChatGLM3, a large language model trained by Zhipu.AI. Follow the user's instructions "
    "carefully. Respond using markdown.",
    "chatml_de": "Du bist ein freundlicher und hilfsbereiter KI-Assistent.",
    "qwen": "You are a helpful assistant.",
    "qwen_lf": "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
    "qwen_r1": "You are a helpful assistant.",
    "qwen_math_r1": "Please reason step by step, and put your final answer within \\boxed{}.",
    "alpaca": "Below is an instruction that describes a task. Write a response that appropriately completes the "
    "request.\n\n",
    "hunyuan": "You are a helpful assistant.",
    "plm": "You are a helpful assistant.",
    "gpt_oss": "You are ChatGPT, a large language model trained by OpenAI.",
}
MAGISTRAL_SHA256 = "382a13c99c1242e77b3cb851cf3f8b304b65df87e6fe5b48b2014aa8b9b5a498"


def turns_of(*turns: tuple[str, str], tools: str | None = None) -> Conversation:
    trained = ("assistant", "function")
    return Conversation(messages=tuple(Message(role=r, content=c, trained=r in trained) for r, c in turns), tools=tools)


@pytest.mark.parametrize("name", sorted(FROM_THE_SOURCE))
def test_calls_and_results_are_written_as_in_the_source(name: str):
    template, tokenizer = bound(name, "none")
    row = turns_of(("system", "SYS"), ("user", "U1"), ("function", CALL), ("tool", "R"), ("assistant", "A2"))
    assert shown(template, tokenizer, row) == FROM_THE_SOURCE[name]


def test_each_template_is_held_against_a_recorded_file_or_the_source():
    recorded = {key.split("|")[0] for key in RECORDED} | {"qwen_r1"}
    assert recorded | {name.replace("-", "_") for name in FROM_THE_SOURCE} == set(NAMES)


def test_qwen_r1_asks_for_thoughts_in_each_user_turn():
    template, tokenizer = bound("qwen_r1", "none")
    asked = (
        "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. The "
        "assistant first thinks about the reasoning process in the mind and then provides the user with the answer. "
        "The reasoning process and answer are enclosed within <think> </think> and <answer> </answer> tags, "
        "respectively, i.e., <think> reasoning process here </think><answer> answer here </answer>Put your final "
        "answer within \\\\boxed{}. "
    )
    row = turns_of(("system", "SYS"), ("user", "U1"), ("assistant", "A1"), ("user", "U2"), ("assistant", "A2"))
    assert shown(template, tokenizer, row) == [
        [chatml("system", "SYS") + chatml("user", asked + "U1") + ASSISTANT, "A1{EOS}"],
        ["\n" + chatml("user", asked + "U2") + ASSISTANT, "A2{EOS}"],
    ]


@pytest.mark.parametrize("name", NAMES)
def test_default_system_texts_are_those_of_the_source(name: str):
    text = getattr(registry.load(PACKAGE, name, "template").TEMPLATE, "default_system", "")
    if name == "magistral":
        assert hashlib.sha256(text.encode()).hexdigest() == MAGISTRAL_SHA256
    else:
        assert text == DEFAULT_SYSTEMS.get(name, "")


TOOLS = json.dumps(
    [
        {
            "name": "add",
            "description": "Adds.",
            "parameters": {
                "properties": {
                    "a": {"type": "integer", "description": "First."},
                    "b": {"type": "string", "enum": ["x", "y"], "items": {"type": "number"}},
                },
                "required": ["a"],
            },
        }
    ]
)
SIGNATURE = '{"type": "function", "function": ' + TOOLS[1:-1] + "}"
DESCRIBED = (
    "You have access to the following tools:\n> Tool Name: add\nTool Description: Adds.\nTool Args:\n"
    "  - a (integer, required): First.\n  - b (string): , should be one of [x, y], where each item should be number\n\n"
    "Use the following format if using a tool:\n```\nAction: tool name (one of [add]).\nAction Input: the input to the "
    'tool, in a JSON format representing the kwargs (e.g. ```{"input": "hello world", "num_beams": 5}```).\n```\n'
)
SIGNATURES = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are provided with function "
    f"signatures within <tools></tools> XML tags:\n<tools>\n{SIGNATURE}\n</tools>\n\nFor each function call, return a "
    "json object with function name and arguments within <tool_call></tool_call> XML tags:\n<tool_call>\n"
    '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
)


@pytest.mark.parametrize(
    ("name", "system"),
    [
        ("qwen", f"SYS{DESCRIBED}"),
        ("qwen3", f"SYS\n\n{SIGNATURES}"),
        ("bailing_mini", f"SYS{SIGNATURES}\ndetailed thinking off"),
    ],
)
def test_tools_are_described_in_the_system_text(name: str, system: str):
    template, tokenizer = bound(name, "none")
    for tools in (TOOLS, f"[{SIGNATURE}]"):
        row = turns_of(("system", "SYS"), ("user", "U1"), ("assistant", "A1"), tools=tools)
        assert system in shown(template, tokenizer, row)[0][0]


def test_templates_that_cannot_describe_tools_say_so():
    for name in ("glm4", "glm4_moe", "chatglm3"):
        template, _ = bound(name, "none")
        with pytest.raises(BadRow, match="cannot describe tools"):
            template.turns(turns_of(("user", "U1"), ("assistant", "A1"), tools=TOOLS))


def test_a_call_keeps_its_thought_and_several_calls_are_all_shown():
    template, tokenizer = bound("qwen3", "true")
    two = f'[{CALL}, {{"name": "b\\"", "arguments": {{}}}}]'
    row = turns_of(("user", "U1"), ("function", f"<think>\nR1\n</think>\n\n{two}"))
    said = '<tool_call>\n{"name": "b\\"", "arguments": {}}\n</tool_call>'
    assert shown(template, tokenizer, row)[0][1] == f"<think>\nR1\n</think>{TAGGED}\n{said}<|im_end|>\n"


def test_deepseek4_keeps_the_last_thought_or_with_tools_each():
    """Cases of the encoder that comes with the model: chat and thinking, history without thoughts, tools."""
    row = turns_of(
        ("system", "SYS"),
        ("user", "U1"),
        ("assistant", "<think>\nR1\n</think>\n\nA1"),
        ("user", "U2"),
        ("assistant", "<think>R2</think>A2"),
    )
    bos, eos = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
    for thinking in ("none", "false"):
        assert shown(*bound("deepseek4", thinking), row) == [
            [f"{bos}SYS<｜User｜>U1<｜Assistant｜></think>", f"A1{eos}"],
            ["<｜User｜>U2<｜Assistant｜></think>", f"A2{eos}"],
        ]
    template, tokenizer = bound("deepseek4", "true")
    assert shown(template, tokenizer, row) == [
        [f"{bos}SYS<｜User｜>U1<｜Assistant｜></think>", f"A1{eos}"],
        ["<｜User｜>U2<｜Assistant｜><think>", f"R2</think>A2{eos}"],
    ]
    with_tools = Conversation(messages=row.messages, tools=TOOLS)
    first, second = shown(template, tokenizer, with_tools)
    assert first[0].startswith(f"{bos}SYS\n\n## Tools\n\nYou have access to a set of tools")
    assert f"### Available Tool Schemas\n\n{TOOLS[1:-1]}\n\nYou MUST strictly follow" in first[0]
    assert first[0].endswith("to invoke tool calls.\n<｜User｜>U1<｜Assistant｜><think>")
    assert (first[1], second[1]) == (f"R1</think>A1{eos}", f"R2</think>A2{eos}")
    prompt = template.prompt_ids(row.messages[:4])
    assert (
        tokenizer.text(prompt)
        == f"{bos}SYS<｜User｜>U1<｜Assistant｜></think>A1{eos}<｜User｜>U2<｜Assistant｜><think>"
    )


def test_deepseek4_needs_its_own_tokens():
    with pytest.raises(DataError, match=r"begin▁of▁sentence.*--prompt-type"):
        load_template(TemplateSettings(prompt_type="deepseek4"), tiny_tokenizer())
