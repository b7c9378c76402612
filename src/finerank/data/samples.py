"""Rows to samples: what a worker does with a piece of a file, and what it sends back.

`SampleMaker` is one object that holds what is the same for all rows (template, lengths, what is trained); it is sent to
each worker process once. A chunk of rows goes in, flat arrays of ids and labels come out with one outcome for each row,
so the caller can account for all of them in order.
"""

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from finerank.data.handlers import Handler
from finerank.data.handlers.pretrain import ROLE as TEXT
from finerank.data.pairs import EQUAL_ANSWERS, fit_pair
from finerank.data.rows import BadRow
from finerank.data.templates import Template, Turn
from finerank.data.truncate import EncodedTurn, fit, join, newer_rule, older_rule
from finerank.data.types import IGNORE_INDEX, Conversation, Rendered

TOO_LONG = "longer than --seq-length"
NOT_TRAINED = "no token of it would be trained"

MEGATRON_LONGEST = 100_000
"""What MindSpeed-LLM's preprocessing cuts at when no `--seq-length` is given."""


@dataclass(frozen=True)
class Outcome:
    """What became of one row."""

    row: int
    reason: str | None = None
    """Why it was dropped; None when it was kept."""
    num_samples: int = 0
    truncated: bool = False
    digest: bytes = b""
    """Hash of the conversation, by which exact copies are known."""


@dataclass
class ChunkResult:
    """The samples of a chunk, field by field, and the outcome of each row."""

    outcomes: list[Outcome]
    flat: dict[str, np.ndarray] = field(default_factory=dict)
    """Field name -> int32 values of all samples, one after the other."""
    lengths: dict[str, np.ndarray] = field(default_factory=dict)
    """Field name -> int64 length of each sample."""


@dataclass(frozen=True, kw_only=True)
class SampleRules:
    """What decides the ids and labels of a row, besides template and handler."""

    seq_length: int | None = 2048
    overlong: str = "truncate"
    train_on_prompt: bool = False
    append_eod: bool = False
    megatron: bool = False
    """Cut and drop long samples exactly as MindSpeed-LLM's preprocessing does."""
    neat_pack: bool = False
    """With `megatron`: cut the end of long samples instead of dropping them, as its `--neat-pack` does."""
    pairwise: bool = False
    """Rows have a better and a worse answer, each of which becomes a sample of its own."""


class SampleMaker:
    """Makes the samples of rows. Pickled once for each worker."""

    def __init__(self, template: Template, rules: SampleRules):
        self.template = template
        self.rules = rules
        eos = template.encoder.tokenizer.eos_token_id
        self.eod = eos if rules.append_eod else None

    def __call__(self, handler: Handler, rows: Sequence[tuple[int, dict[str, Any] | BadRow]]) -> ChunkResult:
        """Samples and outcomes of a chunk of rows, in order."""
        kept: list[tuple[int, Conversation, list[list[Turn]]]] = []
        reasons: dict[int, str] = {}
        for number, row in rows:
            try:
                if isinstance(row, BadRow):
                    raise row
                conversation = handler.convert(row)
                kept.append((number, conversation, self._turns(conversation)))
            except BadRow as error:
                reasons[number] = error.reason
        encoded = iter(self.template.encode([turns for _, _, samples in kept for turns in samples]))
        made: dict[int, Outcome] = {}
        fields: dict[str, list[list[int]]] = {name: [] for name in self.fields}
        for number, conversation, samples in kept:
            turns = [next(encoded) for _ in samples]
            made[number] = self._outcome(number, conversation, turns, fields)
        outcomes = [made[n] if n in made else Outcome(n, reasons[n]) for n, _ in rows]
        result = ChunkResult(outcomes)
        for name, values in fields.items():
            result.lengths[name] = np.fromiter(map(len, values), np.int64, len(values))
            total = int(result.lengths[name].sum())
            result.flat[name] = np.fromiter(itertools.chain.from_iterable(values), np.int32, total)
        return result

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields of a sample, in the order in which `_outcome` fills them."""
        if self.rules.pairwise:
            return ("chosen_input_ids", "chosen_labels", "rejected_input_ids", "rejected_labels")
        return ("input_ids", "labels")

    def _turns(self, conversation: Conversation) -> list[list[Turn]]:
        """The turns of each sample that the row becomes: one, or two for a pair."""
        messages = conversation.messages
        if messages[0].role == TEXT:
            return [[Turn([], [self.template.encoder.protect(messages[0].content)], True)]]
        if not self.rules.pairwise:
            return [self.template.turns(conversation)]
        assert conversation.rejected is not None
        answers = (messages[-1].content, conversation.rejected.content)
        return [[self.template.one_turn(messages[:-1], answer)] for answer in answers]

    def _outcome(
        self,
        number: int,
        conversation: Conversation,
        samples: list[list[EncodedTurn]],
        fields: dict[str, list[list[int]]],
    ) -> Outcome:
        digest = _digest(conversation)
        rendered: list[Rendered] = []
        truncated = False
        if conversation.messages[0].role == TEXT:
            rendered = self._pieces(samples[0][0].target)
        else:
            if self.rules.pairwise and not self.rules.megatron and self.rules.overlong == "truncate":
                samples, truncated = fit_pair(samples, self._limit)
            for turns in samples:
                made, was_cut = self._sample(turns)
                truncated = truncated or was_cut
                if made is None:
                    return Outcome(number, TOO_LONG)
                rendered.append(made)
        if not self.rules.megatron:
            trained = [r.labels[1:].count(IGNORE_INDEX) < len(r.labels) - 1 for r in rendered]
            if not any(trained) or (self.rules.pairwise and not all(trained)):
                return Outcome(number, NOT_TRAINED)
            if self.rules.pairwise and rendered[0] == rendered[1]:
                return Outcome(number, EQUAL_ANSWERS)
        values = [part for r in rendered for part in (r.ids, r.labels)]
        for i, value in enumerate(values):
            fields[self.fields[i % len(self.fields)]].append(value)
        return Outcome(number, None, len(values) // len(self.fields), truncated, digest)

    def _sample(self, turns: list[EncodedTurn]) -> tuple[Rendered | None, bool]:
        """One sample within the limit, and whether it was cut; None when it is too long and is not to be cut."""
        rules, template = self.rules, self.template
        older = rules.megatron and template.older_truncation
        fitted, was_cut = fit(turns, self._limit, older_rule if older else newer_rule)
        if was_cut and rules.overlong != "truncate":
            return None, False
        rendered = join(
            fitted,
            train_on_prompt=rules.train_on_prompt,
            efficient_eos=template.efficient_eos,
            append_eod=self.eod,
        )
        if rules.megatron and rules.seq_length and len(rendered.ids) >= rules.seq_length:
            if not rules.neat_pack:
                return None, False
            end = rules.seq_length - 1
            return Rendered(rendered.ids[:end], rendered.labels[:end]), True
        return rendered, was_cut

    @property
    def _limit(self) -> int:
        """Tokens that the turns of a sample may have."""
        rules, template = self.rules, self.template
        length = rules.seq_length or MEGATRON_LONGEST
        if rules.megatron:
            return length if template.older_truncation else length - 1
        return length - (self.eod is not None) - (template.efficient_eos is not None)

    def _pieces(self, ids: list[int]) -> list[Rendered]:
        """Plain text in pieces of at most the longest length, all of it trained.

        A piece begins with the last token of the piece before it, so that each token but the text's first is
        predicted exactly once.
        """
        ids = [*ids, *([] if self.eod is None else [self.eod])]
        length = self.rules.seq_length
        if self.rules.megatron or length is None or len(ids) <= length:
            return [Rendered(ids, list(ids))] if ids else []
        return [Rendered(ids[i : i + length], ids[i : i + length]) for i in range(0, len(ids) - 1, length - 1)]


def _digest(conversation: Conversation) -> bytes:
    """A hash that only equal conversations share: each text is told with its length."""
    messages = (
        conversation.messages if conversation.rejected is None else (*conversation.messages, conversation.rejected)
    )
    texts = [f"{m.role} {m.trained} {len(m.content)} {m.content}" for m in messages]
    told = f"{len(messages)} {conversation.tools} " + "".join(texts)
    return hashlib.blake2b(told.encode("utf-8", "surrogatepass"), digest_size=16).digest()
