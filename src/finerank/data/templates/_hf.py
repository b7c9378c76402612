"""The tokenizer's own chat template, and where the answers are in what it renders.

The template is a Jinja program; `transformers` runs it in a sandbox. Answers are found in one of two ways:

    {% generation %} markers     the template says itself what the assistant writes
    prefixes                     the conversation up to a trained answer, with the generation prompt, must be a prefix
                                 of the whole; what follows it up to the next turn is the answer with its end token

A template for which neither holds is refused: a mask that is guessed would train on the wrong tokens. What is trained
ends with the answer's end token; a line break after it belongs to the next turn.
"""

import hashlib
import itertools
import json
import re
from collections.abc import Sequence
from typing import Any

from finerank.data.encode import TextEncoder
from finerank.data.rows import BadRow
from finerank.data.templates import Piece, Template, Turn
from finerank.data.types import Conversation, Message
from finerank.errors import ConfigError, DataError

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
Span = tuple[int, int]


class HFTemplate(Template):
    """A tokenizer's chat template."""

    def __init__(self, encoder: TextEncoder, *, enable_thinking: str = "none"):
        self.encoder = encoder
        self.enable_thinking = enable_thinking
        template = encoder.tokenizer.chat_template
        self.source = template if isinstance(template, str) else template["default"]
        self.name = "hf"
        self.has_markers = bool(_GENERATION.search(self.source))
        if enable_thinking != "none" and "enable_thinking" not in self.source:
            raise ConfigError("--enable-thinking has no effect: the tokenizer's chat template has no thinking switch.")
        self.options: dict[str, Any] = (
            {} if enable_thinking == "none" else {"enable_thinking": enable_thinking == "true"}
        )
        self._ends = re.compile("(" + ("|".join(map(re.escape, encoder.special_tokens)) or "(?!)") + r")\s*\Z")
        told = f"hf 1 {self.source} {json.dumps(self.options)} {encoder.allow_special_tokens} {encoder.digest}"
        self.digest = hashlib.sha256(told.encode()).hexdigest()
        self.ends_answers = False
        self.stop_ids = self._probe()

    def __getstate__(self) -> dict[str, object]:
        return {"encoder": self.encoder, "enable_thinking": self.enable_thinking}

    def __setstate__(self, state: dict[str, Any]) -> None:
        HFTemplate.__init__(self, state["encoder"], enable_thinking=state["enable_thinking"])

    def turns(self, conversation: Conversation) -> list[Turn]:
        messages = self._as_dicts(conversation.messages)
        tools = json.loads(conversation.tools) if conversation.tools else None
        trained = [m.trained for m in conversation.messages if m.role in ("assistant", "function")]
        if not self.has_markers:
            text, spans = self._proved(messages, tools, trained)
            return self._cut(text, spans, [True] * len(spans))
        text, spans = self._marked(messages, tools)
        if len(spans) != len(trained):
            raise BadRow("the chat template does not show each answer once")
        return self._cut(text, spans, trained)

    def one_turn(self, messages: Sequence[Message], answer: str | None) -> Turn:
        asked = self._as_dicts(messages)
        if answer is None:
            return self._cut(self._render(asked, None, prompt=True), [], [])[0]
        said = [*messages, Message(role="assistant", content=answer, trained=True)]
        before = [m if m.role == "system" else Message(role=m.role, content=m.content) for m in said[:-1]]
        turns = self.turns(Conversation(messages=(*before, said[-1])))
        last = max(i for i, turn in enumerate(turns) if turn.target)
        source = [p for turn in turns[:last] for p in (*turn.source, *turn.target)] + turns[last].source
        return Turn(source, turns[last].target)

    def _render(self, messages: list[dict[str, Any]], tools: Any, *, prompt: bool = False) -> str:
        try:
            return self.encoder.tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=False, add_generation_prompt=prompt, **self.options
            )
        except Exception as error:  # the template is a program of the model's makers: it may fail in any way
            raise BadRow(f"the chat template refuses it ({' '.join(str(error).split())[:80]})") from error

    def _marked(self, messages: list[dict[str, Any]], tools: Any) -> tuple[str, list[Span]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        special = {k: v for k, v in self.encoder.tokenizer.special_tokens_map.items() if isinstance(v, str)}
        try:
            rendered: Any = render_jinja_template(
                conversations=[messages],
                tools=tools,
                chat_template=self.source,
                return_assistant_tokens_mask=True,
                add_generation_prompt=False,
                **{**special, **self.options},
            )
        except Exception as error:
            raise BadRow(f"the chat template refuses it ({' '.join(str(error).split())[:80]})") from error
        texts, spans = rendered
        joined: list[Span] = []
        for start, end in spans[0]:
            if joined and joined[-1][1] == start:  # an answer and its end token, marked each by itself
                start = joined.pop()[0]
            joined.append((int(start), int(end)))
        return texts[0], joined

    def _proved(self, messages: list[dict[str, Any]], tools: Any, trained: Sequence[bool]) -> tuple[str, list[Span]]:
        """The whole text, and where the trained answers are in it."""
        whole = self._render(messages, tools)
        spans: list[Span] = []
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        for i in itertools.compress(answers, trained):
            prompt = self._render(messages[:i], tools, prompt=True)
            if not whole.startswith(prompt):
                hint = "; --mask-history trains the last answer only" if len(spans) + 1 < sum(trained) else ""
                raise BadRow("the chat template's prompt is not a prefix of the whole conversation" + hint)
            end = len(whole) if i == len(messages) - 1 else self._end(whole, prompt, messages, i, tools)
            spans.append((len(prompt), end))
        return whole, spans

    def _end(self, whole: str, prompt: str, messages: list[dict[str, Any]], i: int, tools: Any) -> int:
        """Where an answer that is not the last ends in the whole text."""
        answered = self._render(messages[: i + 1], tools)
        if whole.startswith(answered) and len(answered) > len(prompt):
            return len(answered)
        # Some templates show the last answer otherwise than earlier ones (with its thought). Then the answer itself
        # and a control token right after it must follow the prompt.
        content = messages[i].get("content") or ""
        after = whole[len(prompt) :]
        for text in (content, content.strip()):
            match = self._special_at(after, len(text)) if text and after.startswith(text) else None
            if match is not None:
                return len(prompt) + match
        # Some end the last answer with another token than earlier ones.
        ended = self._ends.search(answered)
        body = answered[: ended.start(1)] if ended else ""
        if body.startswith(prompt) and whole.startswith(body) and not self._ends.search(body, len(prompt)):
            match = self._special_at(whole, len(body))
            if match is not None:
                return match
        raise BadRow("the chat template changes earlier answers, so the trained tokens cannot be found")

    def _special_at(self, text: str, at: int) -> int | None:
        for special in self.encoder.special_tokens:
            if text.startswith(special, at):
                return at + len(special)
        return None

    def _cut(self, text: str, spans: list[Span], trained: list[bool]) -> list[Turn]:
        spans = [(a, self._without_tail(text, a, b)) for a, b in spans]
        if not self.encoder.is_piecewise:
            return self._cut_by_token(text, spans, trained)
        turns: list[Turn] = []
        at = 0
        for (start, end), is_trained in zip(spans, trained, strict=True):
            turns.append(Turn([text[at:start]], [text[start:end]], is_trained))
            at = end
        if at < len(text) or not turns:
            turns.append(Turn([text[at:]], [], False))
        return turns

    def _without_tail(self, text: str, start: int, end: int) -> int:
        """The answer's end without the white space after its end token."""
        match = self._ends.search(text, start, end)
        return match.end(1) if match else end

    def _cut_by_token(self, text: str, spans: list[Span], trained: list[bool]) -> list[Turn]:
        """For tokenizers that encode a piece otherwise than within a text: whole text, cut where tokens start."""
        ids, starts = self.encoder.encode_with_starts(text)
        turns: list[Turn] = []
        at = 0
        for (start, end), is_trained in zip(spans, trained, strict=True):
            first = next((i for i in range(at, len(ids)) if starts[i] >= start), len(ids))
            last = next((i for i in range(first, len(ids)) if starts[i] >= end), len(ids))
            source: list[Piece] = [*ids[at:first]]
            target: list[Piece] = [*ids[first:last]]
            turns.append(Turn(source, target, is_trained))
            at = last
        if at < len(ids) or not turns:
            turns.append(Turn([*ids[at:]], [], False))
        return turns

    def _as_dicts(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        dicts: list[dict[str, Any]] = []
        for message in messages:
            if message.role == "function":
                try:
                    calls = json.loads(message.content)
                except (ValueError, RecursionError) as error:
                    raise BadRow("a function call is not JSON") from error
                calls = calls if isinstance(calls, list) else [calls]
                shown = [{"type": "function", "function": call} for call in calls]
                dicts.append({"role": "assistant", "content": "", "tool_calls": shown})
            else:
                dicts.append({"role": message.role, "content": self.encoder.protect(message.content)})
        return dicts

    def _probe(self) -> tuple[int, ...]:
        """Check on a plain conversation that answers can be found; returns the ids that end an answer."""
        user, answer = Message(role="user", content="One."), Message(role="assistant", content="Two.", trained=True)
        try:
            turns = self.turns(Conversation(messages=(user, answer)))
        except BadRow as error:
            raise DataError(
                f"The tokenizer's chat template cannot be trained on: {error.reason}; choose a named template with "
                "--prompt-type."
            ) from error
        [encoded] = self.encode([turns])
        eos = self.encoder.tokenizer.eos_token_id
        special = {self.encoder.tokenizer.convert_tokens_to_ids(t) for t in self.encoder.special_tokens}
        ends = [i for turn in encoded for i in turn.target[-1:] if i in special]
        self.ends_answers = bool(ends)
        return tuple(dict.fromkeys(int(i) for i in [eos, *ends] if i is not None))
