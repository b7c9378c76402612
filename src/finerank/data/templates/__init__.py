"""Prompt templates: each is the one source of training ids, loss mask, generation prompt and stop tokens.

    template = load_template(settings, tokenizer)
    rendered = template.render(conversation)              ids and labels of a training sample
    template.prompt_ids(messages)                         ids after which the model answers
    template.stop_ids                                     ids that end an answer

A named template (`--prompt-type qwen3`) is a file in this folder whose `TEMPLATE` has `bind(encoder)`; without a name
the tokenizer's own chat template is used. `template.digest` changes with anything that changes ids or labels.
"""

import abc
import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from finerank import registry
from finerank.data.encode import TextEncoder
from finerank.data.rows import BadRow
from finerank.data.settings import TemplateSettings
from finerank.data.truncate import EncodedTurn, join
from finerank.data.types import Conversation, Message, Rendered
from finerank.data.words import Ids
from finerank.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

Piece = str | int
"""Text to encode, in which user text is protected, or a token id."""


@dataclass(frozen=True)
class Turn:
    """What the model reads, and what it answers; `trained` says whether the loss counts the answer."""

    source: list[Piece]
    target: list[Piece]
    trained: bool = True


class Template(abc.ABC):
    """What every template owes."""

    name: str
    digest: str
    stop_ids: tuple[int, ...]
    efficient_eos: int | None = None
    """For templates whose answers have no end token of their own: the id that is trained after the last one."""
    older_truncation: bool = False
    """Whether MindSpeed-LLM's preprocessing cuts samples of this template by its older rule."""
    encoder: TextEncoder

    @abc.abstractmethod
    def turns(self, conversation: Conversation) -> list[Turn]:
        """The conversation's turns in order, trained as its messages say. Raises BadRow."""

    @abc.abstractmethod
    def one_turn(self, messages: Sequence[Message], answer: str | None) -> Turn:
        """All of `messages` as one source, and `answer` as the target, empty for generation. Raises BadRow."""

    def encode(self, samples: Sequence[Sequence[Turn]]) -> list[list[EncodedTurn]]:
        """Ids of the turns of many samples; one call of the tokenizer for all."""
        flat, lengths = self.encode_flat([part for turns in samples for t in turns for part in (t.source, t.target)])
        ids, ends = flat.tolist(), [0, *np.cumsum(lengths).tolist()]
        parts = iter([ids[start:end] for start, end in itertools.pairwise(ends)])
        return [[EncodedTurn(next(parts), next(parts), t.trained) for t in turns] for turns in samples]

    def encode_flat(self, parts: Sequence[Sequence[Piece]]) -> Ids:
        """All ids of sources and targets, one after the other, and how many each has."""
        pieces = list(itertools.chain.from_iterable(parts))
        is_text = np.array([type(piece) is str for piece in pieces], bool)
        ids, text_lengths = self.encoder.encode_flat([piece for piece in pieces if type(piece) is str])
        lengths = np.ones(len(pieces), np.int64)
        lengths[is_text] = text_lengths
        from_text = np.repeat(is_text, lengths)
        flat = np.empty(len(from_text), np.int32)
        flat[from_text] = ids
        flat[~from_text] = [piece for piece in pieces if type(piece) is not str]
        ends = np.concatenate([[0], np.cumsum(lengths)])[np.cumsum([0, *map(len, parts)])]
        return flat, np.diff(ends)

    def render(self, conversation: Conversation) -> Rendered:
        """Ids and labels of one conversation, nothing cut. Raises DataError for one that the template cannot take."""
        try:
            [turns] = self.encode([self.turns(conversation)])
        except BadRow as error:
            raise DataError(f"Template '{self.name}' cannot show this conversation: {error.reason}.") from error
        return join(turns, efficient_eos=self.efficient_eos)

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Ids up to where the model's answer begins. Raises DataError."""
        try:
            [[turn]] = self.encode([[self.one_turn(messages, None)]])
        except BadRow as error:
            raise DataError(f"Template '{self.name}' cannot show these messages: {error.reason}.") from error
        return turn.source


def load_template(settings: TemplateSettings, tokenizer: Any) -> Template:
    """The template that the settings name, bound to a tokenizer.

    Raises:
        ConfigError: an unknown name, two templates, or a setting without effect.
        DataError: the template's control tokens are not in the tokenizer, or its answers cannot be found.
    """
    from finerank.data.templates._hf import HFTemplate
    from finerank.data.templates._none import NoTemplate

    if settings.prompt_type is not None and settings.hf_chat_template:
        raise ConfigError("--prompt-type and --hf-chat-template exclude each other; give one of them.")
    encoder = TextEncoder(tokenizer, allow_special_tokens=settings.allow_special_tokens)
    if settings.prompt_type is not None:
        module = registry.load(__name__, settings.prompt_type, "prompt template")
        template: Template = module.TEMPLATE.bind(encoder, enable_thinking=settings.enable_thinking)
        return template
    has_own = bool(getattr(tokenizer, "chat_template", None))
    if settings.hf_chat_template and not has_own:
        raise ConfigError(
            "This tokenizer has no chat template; name one with --prompt-type, e.g. --prompt-type alpaca."
        )
    if has_own and settings.hf_chat_template is not False:
        own = HFTemplate(encoder, enable_thinking=settings.enable_thinking)
        if not own.ends_answers:
            logger.warning(
                "the tokenizer's chat template puts no end token after an answer, so a model trained with it does not "
                "learn to stop; give --prompt-type with the model's template, or --append-eod"
            )
        return own
    if settings.enable_thinking != "none":
        raise ConfigError("--enable-thinking needs a template that can think; give --prompt-type qwen3, for example.")
    return NoTemplate(encoder, registry.names(__name__))
