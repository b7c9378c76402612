"""Named templates: strings with `{{content}}`, put together turn by turn.

    TEMPLATE = Slots(
        user=("<|im_start|>user\\n{{content}}<|im_end|>\\n<|im_start|>assistant\\n",),
        assistant=("{{content}}<|im_end|>\\n",),
        stop_words=("<|im_end|>",),
    )

A slot is a string, `BOS`, `EOS` or `Token("<|user|>")`. Each string slot is encoded by itself, as MindSpeed-LLM and
LLaMA-Factory do, so that the same template gives the same ids here. Thinking (templates with `reasoning=True`):

    --enable-thinking   answer with a thought               answer without
    true                kept and trained                    empty thought before the answer, trained
    false               thought removed, then as without    empty thought before the answer, not trained
    none                kept and trained                    empty thought before the answer, not trained
"""

import dataclasses
import functools
import hashlib
import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from finerank.data.encode import TextEncoder
from finerank.data.rows import BadRow
from finerank.data.templates import Piece, Template, Turn
from finerank.data.templates._tools import call_text, tools_text
from finerank.data.types import Conversation, Message
from finerank.errors import DataError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Token:
    """A slot that is one token of the vocabulary, looked up by its spelling."""

    text: str


BOS = Token("bos")
"""The tokenizer's begin-of-text token; nothing where it has none."""
EOS = Token("eos")
"""The tokenizer's end-of-text token, or the first stop word where the template replaces it."""

Slot = str | Token


@dataclass(frozen=True, kw_only=True)
class Slots:
    """What a template file defines; the defaults are those of MindSpeed-LLM's `templates.json`."""

    name: str
    user: tuple[Slot, ...] = ("{{content}}",)
    assistant: tuple[Slot, ...] = ("{{content}}", EOS)
    system: tuple[Slot, ...] = ("{{content}}",)
    function: tuple[Slot, ...] | None = None
    """A call made by the assistant, its text in `call_format`; default: the text and, unless `efficient_eos`, EOS."""
    observation: tuple[Slot, ...] | None = None
    """A tool's result; default: as a user's turn."""
    separator: tuple[Slot, ...] = ()
    """Before each user turn but the first."""
    prefix: tuple[Slot, ...] = ()
    default_system: str = ""
    stop_words: tuple[str, ...] = ()
    efficient_eos: bool = False
    """Answers have no end token; one stands after the last answer, and later turns' first token is trained as one."""
    replace_eos: bool = False
    """The first stop word is the end token."""
    system_inside_user: bool = False
    """The system text belongs inside the first user slot (Llama 2)."""
    prefix_with_system_only: bool = False
    tool_format: str | None = "default"
    """How `_tools` describes tools: default, qwen or ling; None where the template cannot."""
    call_format: str = "default"
    """How `_tools` writes a call: default, glm4 or qwen."""
    reasoning: bool = False
    thought_words: tuple[str, str] = ("<think>\n", "\n</think>\n\n")
    newer_truncation: bool = False
    """Whether MindSpeed-LLM cuts long samples of this template by its newer rule."""

    def bind(self, encoder: TextEncoder, *, enable_thinking: str = "none") -> Template:
        """The template with a tokenizer. Raises DataError where the tokenizer lacks one of its control tokens."""
        return SlotTemplate(self, encoder, enable_thinking=enable_thinking)


class SlotTemplate(Template):
    """A template file bound to a tokenizer."""

    def __init__(self, spec: Slots, encoder: TextEncoder, *, enable_thinking: str = "none"):
        self.spec = spec
        self.name = spec.name
        self.encoder = encoder
        self.enable_thinking = enable_thinking
        if enable_thinking != "none" and not spec.reasoning:
            logger.warning("--enable-thinking has no effect: template '%s' has no thinking rule", spec.name)
        self.older_truncation = not (spec.newer_truncation or spec.reasoning)
        self.eos = self._eos()
        self.efficient_eos = self._needed(self.eos) if spec.efficient_eos else None
        words = [encoder.token_id(word) for word in spec.stop_words]
        self.stop_ids = tuple(dict.fromkeys(i for i in [self.eos, *words] if i is not None))
        self._open, self._close = spec.thought_words
        self._thought = re.compile(re.escape(self._open) + ".*?" + re.escape(self._close), re.DOTALL)
        content = json.dumps(dataclasses.asdict(spec), ensure_ascii=False, sort_keys=True)
        thinking = enable_thinking if spec.reasoning else "none"
        told = f"slots 1 {content} {thinking} {encoder.allow_special_tokens} {encoder.digest}"
        self.digest = hashlib.sha256(told.encode()).hexdigest()

    def __getstate__(self) -> dict[str, Any]:
        return {"spec": self.spec, "encoder": self.encoder, "enable_thinking": self.enable_thinking}

    def __setstate__(self, state: dict[str, Any]) -> None:
        SlotTemplate.__init__(self, state["spec"], state["encoder"], enable_thinking=state["enable_thinking"])

    def turns(self, conversation: Conversation) -> list[Turn]:
        messages = self._with_system(conversation)
        turns: list[Turn] = []
        system, rest = messages[0].content, messages[1:]
        for i in range(0, len(rest), 2):
            asked, answer = rest[i], rest[i + 1]
            source = self._source(asked, i // 2, system if i == 0 else "")
            unthought, thought, text = self._think(self._answer_text(answer))
            target = thought + self._fill(self._answer_slots(answer), text, i // 2)
            turns.append(Turn(source + unthought, target, answer.trained))
        return turns

    def one_turn(self, messages: Sequence[Message], answer: str | None) -> Turn:
        closed = [*messages, Message(role="assistant", content="")]
        conversation = self._with_system(Conversation(messages=tuple(closed)))
        system, rest = conversation[0].content, conversation[1:]
        source: list[Piece] = []
        for i in range(0, len(rest), 2):
            source += self._source(rest[i], i // 2, system if i == 0 else "")
            if i + 2 < len(rest):
                text = self._answer_text(rest[i + 1])
                text = self._without_thought(text) if self.spec.reasoning else text
                source += self._fill(self._answer_slots(rest[i + 1]), text, i // 2)
        if answer is None:
            empty = self.spec.reasoning and self.enable_thinking != "true"
            return Turn([*source, self._open + self._close] if empty else source, [])
        unthought, thought, text = self._think(answer)
        return Turn(source + unthought, thought + self._fill(self.spec.assistant, text, (len(rest) - 1) // 2))

    def _with_system(self, conversation: Conversation) -> list[Message]:
        """[system, user, answer, user, answer, ...]; the system text with the tools' description, perhaps empty."""
        messages = list(conversation.messages)
        system = messages.pop(0).content if messages and messages[0].role == "system" else ""
        system = system or self.spec.default_system
        if not messages or len(messages) % 2:
            raise BadRow("turns do not alternate between user and assistant")
        for i, message in enumerate(messages):
            expected = ("user", "tool") if i % 2 == 0 else ("assistant", "function")
            if message.role not in expected:
                raise BadRow("turns do not alternate between user and assistant")
        if conversation.tools:
            system += tools_text(self.spec.tool_format, conversation.tools, self.name)
        return [Message(role="system", content=system), *messages]

    def _source(self, message: Message, index: int, system: str) -> list[Piece]:
        pieces: list[Piece] = []
        content = self.encoder.protect(message.content)
        if index == 0:
            if not self.spec.prefix_with_system_only or system:
                pieces += self._fill(self.spec.prefix, "", index)
            if system and self.spec.system_inside_user:
                [slot] = self.spec.system
                content = str(slot).replace("{{content}}", self.encoder.protect(system)) + content
            elif system == self.spec.default_system and system:  # the same for most rows, so encoded once
                pieces += self._default_system()
            elif system:
                pieces += self._fill(self.spec.system, self.encoder.protect(system), index)
        else:
            pieces += self._fill(self.spec.separator, "", index)
        slots = self.spec.observation if message.role == "tool" and self.spec.observation else self.spec.user
        return pieces + self._fill(slots, content, index)

    def _answer_text(self, message: Message) -> str:
        if message.role == "function":
            return call_text(self.spec.call_format, message.content)
        return message.content

    def _answer_slots(self, message: Message) -> tuple[Slot, ...]:
        if message.role != "function":
            return self.spec.assistant
        return self.spec.function or (("{{content}}",) if self.spec.efficient_eos else ("{{content}}", EOS))

    def _think(self, text: str) -> tuple[list[Piece], list[Piece], str]:
        """The thinking rule: an empty thought for the end of the source or the start of the target, and the answer.

        An empty thought is a piece of its own, as MindSpeed-LLM encodes it.
        """
        if not self.spec.reasoning:
            return [], [], self.encoder.protect(text)
        if self.enable_thinking == "false":
            text = self._without_thought(text)
        if self._open in text or self._close in text:
            return [], [], self.encoder.protect(text)
        empty: list[Piece] = [self._open + self._close]
        if self.enable_thinking == "true":
            return [], empty, self.encoder.protect(text)
        return empty, [], self.encoder.protect(text)

    def _without_thought(self, text: str) -> str:
        return self._thought.sub("", text).lstrip("\n")

    def _fill(self, slots: tuple[Slot, ...], content: str, index: int) -> list[Piece]:
        pieces: list[Piece] = []
        for slot in slots:
            if isinstance(slot, Token):
                pieces += self._token(slot)
            elif "{{content}}" in slot:
                text = slot.replace("{{idx}}", str(index)).replace("{{content}}", content)
                pieces += [text] if text else []
            else:
                pieces += self._constant(slot.replace("{{idx}}", str(index)))
        return pieces

    @functools.lru_cache(maxsize=1)  # noqa: B019
    def _default_system(self) -> tuple[int, ...]:
        pieces = self._fill(self.spec.system, self.encoder.protect(self.spec.default_system), 0)
        [[turn]] = self.encode([[Turn(pieces, [])]])
        return tuple(turn.source)

    @functools.lru_cache(maxsize=1024)  # noqa: B019  templates live as long as the process
    def _constant(self, text: str) -> tuple[int, ...]:
        return tuple(self.encoder.encode([text])[0])

    @functools.lru_cache(maxsize=64)  # noqa: B019
    def _token(self, slot: Token) -> tuple[int, ...]:
        if slot == EOS:
            return (self._needed(self.eos),)
        if slot == BOS:
            bos = self.encoder.tokenizer.bos_token_id
            return () if bos is None else (int(bos),)
        found = self.encoder.token_id(slot.text)
        if found is None:
            raise DataError(self._misfit(slot.text))
        return (found,)

    def _eos(self) -> int | None:
        if not self.spec.replace_eos:
            eos = self.encoder.tokenizer.eos_token_id
            return None if eos is None else int(eos)
        found = self.encoder.token_id(self.spec.stop_words[0])
        if found is None:  # adding it to the vocabulary, as others do, would make ids that the model has no row for
            raise DataError(self._misfit(self.spec.stop_words[0]))
        return found

    def _needed(self, eos: int | None) -> int:
        if eos is None:
            raise DataError(f"Template '{self.name}' needs an end-of-text token, and this tokenizer has none.")
        return eos

    def _misfit(self, token: str) -> str:
        return (
            f"Template '{self.name}' needs the token {token}, which this tokenizer does not have; choose the template "
            "that the model was made for with --prompt-type, or --hf-chat-template."
        )
