"""DeepSeek 4: `<｜User｜>` and `<｜Assistant｜>`, a thought that the prompt opens or closes, calls in DSML tags.

    chat       BOS SYS <｜User｜>U1<｜Assistant｜></think>A1 EOS <｜User｜>U2<｜Assistant｜></think>A2 EOS
    thinking   BOS SYS <｜User｜>U1<｜Assistant｜></think>A1 EOS <｜User｜>U2<｜Assistant｜><think>R2</think>A2 EOS

`--enable-thinking true` is the second form: thoughts of answers before the last are left out, unless the row has tools;
then each is kept. The others are the first form, without any thought. Not made of slots, since what a turn ends with
depends on the turns after it. Source: `DeepSeek4Template` of MindSpeed-LLM, after the encoder that comes with the
model. Two things differ: a call turn of ShareGPT rows is a call, not a tool's result, and generation drops thoughts by
the rule of training also where there are tools.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from finerank.data.encode import TextEncoder
from finerank.data.rows import BadRow
from finerank.data.templates import Template, Turn
from finerank.data.templates._tools import calls_of, functions_of
from finerank.data.types import Conversation, Message
from finerank.errors import DataError

_BOS, _EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
_USER, _ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
_OPEN, _CLOSE = "<think>", "</think>"
_DSML = "｜DSML｜"
_THOUGHT = re.compile(r"\s*<think>\s*(.*?)\s*</think>\s*", re.DOTALL)
_TOOLS = (
    "## Tools\n\nYou have access to a set of tools to help answer the user's question. "
    f'You can invoke tools by writing a "<{_DSML}tool_calls>" block like the following:\n\n'
    f'<{_DSML}tool_calls>\n<{_DSML}invoke name="$TOOL_NAME">\n'
    f'<{_DSML}parameter name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE</{_DSML}parameter>\n...\n'
    f'</{_DSML}invoke>\n<{_DSML}invoke name="$TOOL_NAME2">\n...\n</{_DSML}invoke>\n</{_DSML}tool_calls>\n\n'
    'String parameters should be specified as is and set `string="true"`. For all other types (numbers, booleans, '
    'arrays, objects), pass the value in JSON format and set `string="false"`.\n\n'
    f"If thinking_mode is enabled (triggered by {_OPEN}), you MUST output your complete reasoning inside "
    f"{_OPEN}...{_CLOSE} BEFORE any tool calls or final response.\n\n"
    f"Otherwise, output directly after {_CLOSE} with tool calls or final response.\n\n"
    "### Available Tool Schemas\n\n"
)
_TOOLS_END = "\n\nYou MUST strictly follow the above defined tool name and parameter schemas to invoke tool calls.\n"


@dataclass(frozen=True)
class DeepSeek4:
    """What the registry knows of this template."""

    name: str = "deepseek4"
    stop_words: tuple[str, ...] = (_EOS,)
    replace_eos: bool = True

    def bind(self, encoder: TextEncoder, *, enable_thinking: str = "none") -> Template:
        """The template with a tokenizer. Raises DataError where the tokenizer lacks one of its control tokens."""
        return DeepSeek4Template(encoder, enable_thinking=enable_thinking)


class DeepSeek4Template(Template):
    """The template bound to a tokenizer."""

    name = "deepseek4"

    def __init__(self, encoder: TextEncoder, *, enable_thinking: str = "none"):
        self.spec = TEMPLATE
        self.encoder = encoder
        self.enable_thinking = enable_thinking
        self.thinking = enable_thinking == "true"
        for token in (_BOS, _USER, _ASSISTANT, _EOS):
            if encoder.token_id(token) is None:
                raise DataError(
                    f"Template 'deepseek4' needs the token {token}, which this tokenizer does not have; choose the "
                    "template that the model was made for with --prompt-type, or --hf-chat-template."
                )
        eos = encoder.token_id(_EOS)
        assert eos is not None
        self.stop_ids = (eos,)
        told = f"deepseek4 1 {_TOOLS}{_TOOLS_END} {self.thinking} {encoder.allow_special_tokens} {encoder.digest}"
        self.digest = hashlib.sha256(told.encode()).hexdigest()

    def __getstate__(self) -> dict[str, Any]:
        return {"encoder": self.encoder, "enable_thinking": self.enable_thinking}

    def __setstate__(self, state: dict[str, Any]) -> None:
        DeepSeek4Template.__init__(self, state["encoder"], enable_thinking=state["enable_thinking"])

    def turns(self, conversation: Conversation) -> list[Turn]:
        texts = self._texts(conversation)
        answers = [m for m in conversation.messages if m.role in ("assistant", "function")]
        return [
            Turn([source], [target], message.trained) for (source, target), message in zip(texts, answers, strict=True)
        ]

    def one_turn(self, messages: Sequence[Message], answer: str | None) -> Turn:
        said = (*messages, Message(role="assistant", content=answer or ""))
        *before, (source, target) = self._texts(Conversation(messages=said))
        whole = "".join(a + b for a, b in before) + source
        return Turn([whole], [] if answer is None else [target])

    def _texts(self, conversation: Conversation) -> list[tuple[str, str]]:
        """What is read and what is answered in each exchange. Raises BadRow."""
        messages = list(conversation.messages)
        system = messages.pop(0).content if messages and messages[0].role == "system" else ""
        expected = (("user", "tool"), ("assistant", "function"))
        if not messages or len(messages) % 2 or any(m.role not in expected[i % 2] for i, m in enumerate(messages)):
            raise BadRow("turns do not alternate between user and assistant")
        functions = functions_of(conversation.tools) if conversation.tools else []
        head = self.encoder.protect(system)
        if functions:
            schemas = "\n".join(json.dumps(f, ensure_ascii=False) for f in functions)
            head += "\n\n" + _TOOLS + self.encoder.protect(schemas) + _TOOLS_END
        texts = []
        for i in range(0, len(messages), 2):
            asked = self.encoder.protect(messages[i].content)
            if messages[i].role == "tool":
                asked = f"<tool_result>{asked}</tool_result>"
            with_thought = self.thinking and (bool(functions) or i == len(messages) - 2)
            source = _USER + asked + _ASSISTANT + (_OPEN if with_thought else _CLOSE)
            texts.append((source, self._answer(messages[i + 1], with_thought=with_thought)))
        first, target = texts[0]
        texts[0] = (_BOS + head + first, target)
        return texts

    def _answer(self, message: Message, *, with_thought: bool) -> str:
        found = _THOUGHT.match(message.content)
        thought, content = (found[1], message.content[found.end() :]) if found else ("", message.content)
        calls = ""
        if message.role == "function":
            content, calls = "", self._calls(content)
        opening = self.encoder.protect(thought) + _CLOSE if with_thought else ""
        return opening + self.encoder.protect(content) + calls + _EOS

    def _calls(self, content: str) -> str:
        invoked = []
        for name, arguments in calls_of(content):
            values = arguments if isinstance(arguments, dict) else {"arguments": arguments}
            lines = [self._parameter(key, value) for key, value in values.items()]
            named = f'<{_DSML}invoke name="{self.encoder.protect(name)}">'
            invoked.append("\n".join([named, "\n".join(lines), f"</{_DSML}invoke>"]))
        return f"\n\n<{_DSML}tool_calls>\n" + "\n".join(invoked) + f"\n</{_DSML}tool_calls>"

    def _parameter(self, key: str, value: Any) -> str:
        is_text = isinstance(value, str)
        shown = value if is_text else json.dumps(value, ensure_ascii=False)
        key, shown = self.encoder.protect(key), self.encoder.protect(shown)
        return f'<{_DSML}parameter name="{key}" string="{str(is_text).lower()}">{shown}</{_DSML}parameter>'


TEMPLATE = DeepSeek4()
