"""Answers from a model: streamed for one prompt, side by side for many.

    generator = Generator(model, tokenizer, template)
    answering = generator.stream([Message(role="user", content="Hi")], SamplingSettings())
    for piece in answering:
        print(piece, end="", flush=True)
    answering.answer.finish_reason           # "stop" or "length"

    answers = generator.answer_all([conversation, conversation], SamplingSettings(greedy=True))

The prompt and the stop tokens come from the template the model was trained with. Greedy answers equal those of
transformers' `generate`; sampled ones depend on seed and prompt alone, not on the prompts beside them (but in bf16 a
batch rounds differently from a single prompt, which can turn a close decision).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from finerank.data.types import Message
from finerank.errors import DataError
from finerank.generate.decoding import Decoding
from finerank.generate.sampling import Sampler
from finerank.generate.settings import SamplingSettings
from finerank.generate.text import TextStream

if TYPE_CHECKING:
    from finerank.data.templates import Template


@dataclass(frozen=True)
class Answer:
    """One finished answer."""

    text: str
    finish_reason: str
    """`stop`: a stop token or stop text; `length`: --max-new-tokens or the model's context was used up."""
    num_prompt_tokens: int
    num_new_tokens: int
    """Tokens the model made, the stop token included."""


class Generator:
    """A model with its tokenizer and prompt template, ready to answer."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, template: "Template") -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.template = template

    @property
    def context_length(self) -> int | None:
        """Most tokens of prompt and answer together, where the model's config says so."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Ids of a conversation up to where the answer begins. Raises DataError when no room is left for an answer."""
        ids = self.template.prompt_ids(messages)
        if not ids:
            raise DataError("The prompt is empty; give some text.")
        limit = self.context_length
        if limit is not None and len(ids) >= limit:
            raise DataError(f"The prompt has {len(ids)} tokens, but the model's context ends at {limit}; shorten it.")
        return ids

    def stream(self, messages: Sequence[Message], sampling: SamplingSettings) -> "AnswerStream":
        """The answer to a conversation that ends with a user's turn, as it is made. Raises DataError."""
        return AnswerStream(self, self.prompt_ids(messages), sampling)

    def answer_all(
        self,
        conversations: Sequence[Sequence[Message]],
        sampling: SamplingSettings,
        *,
        seeds: Sequence[int] | None = None,
    ) -> list[Answer]:
        """Answers to several conversations, computed side by side.

        Args:
            conversations: each ends with a user's turn.
            sampling: how tokens are chosen.
            seeds: one for each conversation; `sampling.seed` for all when not given.

        Raises:
            DataError: a conversation does not fit into the model's context.
        """
        if not conversations:
            return []
        prompts = [self.prompt_ids(messages) for messages in conversations]
        growing = [_Growing(self, prompt, sampling) for prompt in prompts]
        decoding = Decoding(self.model, prompts, Sampler(sampling, seeds or [sampling.seed] * len(prompts)))
        while decoding.rows:
            for row, token in zip(decoding.rows, decoding.step(), strict=True):
                growing[row].push(token)
            decoding.finish({row for row in decoding.rows if growing[row].finish_reason})
        return [answer.finished() for answer in growing]


class AnswerStream:
    """One answer as it is made: iterate for pieces of text; `answer` is there when they are used up.

    Leaving the loop early, or an exception in it such as Ctrl-C, keeps what was said so far in `text`.
    """

    def __init__(self, generator: Generator, prompt: list[int], sampling: SamplingSettings) -> None:
        self.answer: Answer | None = None
        self._growing = _Growing(generator, prompt, sampling)
        self._decoding = Decoding(generator.model, [prompt], Sampler(sampling, [sampling.seed]))

    @property
    def text(self) -> str:
        """The pieces given out so far, joined."""
        return self._growing.text.text

    def __iter__(self) -> Iterator[str]:
        while not self._growing.finish_reason:
            if piece := self._growing.push(*self._decoding.step()):
                yield piece
        if rest := self._growing.text.finish():
            yield rest
        self.answer = self._growing.finished()


class _Growing:
    """An answer under way: decides when it ends."""

    def __init__(self, generator: Generator, prompt: list[int], sampling: SamplingSettings) -> None:
        self.text = TextStream(generator.tokenizer, sampling.stop)
        self.finish_reason: str | None = None
        self._stop_ids = frozenset(generator.template.stop_ids)
        self._num_prompt_tokens = len(prompt)
        self._num_new_tokens = 0
        room = sampling.max_new_tokens
        if generator.context_length is not None:
            room = min(room, generator.context_length - len(prompt))
        self._room = room

    def push(self, token: int) -> str:
        self._num_new_tokens += 1
        if token in self._stop_ids:
            self.finish_reason = "stop"
            return ""
        piece = self.text.push(token)
        if self.text.stopped:
            self.finish_reason = "stop"
        elif self._num_new_tokens >= self._room:
            self.finish_reason = "length"
        return piece

    def finished(self) -> Answer:
        assert self.finish_reason is not None
        self.text.finish()
        return Answer(self.text.text, self.finish_reason, self._num_prompt_tokens, self._num_new_tokens)
