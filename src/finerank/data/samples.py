"""Rows to samples: what a worker does with a piece of a file, and what it sends back.

`SampleMaker` is one object that holds what is the same for all rows (template, lengths, what is trained); it is sent to
each worker process once. A chunk of rows goes in; flat arrays of ids and labels come out, with what became of each row,
so the caller can account for all of them in order. The samples of a chunk are made at once, as arrays; only rows that
are to be cut are made one by one.

Shapes: N rows, K rows that became samples, S samples, P parts (two for each turn, and two for what ends a sample).
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from finerank.data.handlers import Handler
from finerank.data.handlers.pretrain import ROLE as TEXT
from finerank.data.pairs import EQUAL_ANSWERS, fit_pair
from finerank.data.rows import BadRow
from finerank.data.templates import Piece, Template, Turn
from finerank.data.truncate import EncodedTurn, fit, join, newer_rule, older_rule
from finerank.data.types import IGNORE_INDEX, Conversation, Rendered

TOO_LONG = "longer than --seq-length"
NOT_TRAINED = "no token of it would be trained"

MEGATRON_LONGEST = 100_000
"""What MindSpeed-LLM's preprocessing cuts at when no `--seq-length` is given."""


@dataclass
class ChunkResult:
    """The samples of a chunk, field by field, and what became of each row."""

    rows: np.ndarray
    """int64 [N], the rows' numbers in the file."""
    reasons: dict[int, str]
    """Place in the chunk -> why the row was dropped, for rows that were."""
    num_samples: np.ndarray
    """int64 [N], 0 for dropped rows."""
    truncated: np.ndarray
    """bool [N]"""
    digests: np.ndarray
    """uint64 [N, 2], hash of the conversation, by which exact copies are known; zeros where there is none."""
    flat: dict[str, np.ndarray] = field(default_factory=dict)
    """Field name -> int32 values of all samples, one after the other."""
    lengths: dict[str, np.ndarray] = field(default_factory=dict)
    """Field name -> int64 length of each sample."""

    @property
    def is_kept(self) -> np.ndarray:
        """bool [N]"""
        kept = np.ones(len(self.rows), bool)
        kept[list(self.reasons)] = False
        return kept

    def drop(self, reasons: Mapping[int, str]) -> None:
        """Leave out further rows, with their samples."""
        self.reasons = {**self.reasons, **reasons}
        is_kept = self.is_kept
        kept_S = np.repeat(is_kept, self.num_samples)
        for name, lengths in self.lengths.items():
            self.flat[name] = self.flat[name][np.repeat(kept_S, lengths)]
            self.lengths[name] = lengths[kept_S]
        self.num_samples = np.where(is_kept, self.num_samples, 0)
        self.truncated = self.truncated & is_kept


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
        """Samples of a chunk of rows in order, and what became of each row."""
        at: list[int] = []
        digests: list[bytes] = []
        samples: list[list[Turn]] = []
        result = _nothing(rows)
        for i, (_, row) in enumerate(rows):
            try:
                if isinstance(row, BadRow):
                    raise row
                conversation = handler.convert(row)
                samples += self._turns(conversation)
            except BadRow as error:
                result.reasons[i] = error.reason
                continue
            at.append(i)
            digests.append(_digest(conversation))
        result.digests[at] = np.frombuffer(b"".join(digests), np.uint64).reshape(-1, 2)
        made = self._whole(samples, is_text=handler.kind == "text")
        for k, (reason, truncated) in made.cut.items():
            result.truncated[at[k]] = truncated
            if reason is not None:
                result.reasons[at[k]] = reason
        result.num_samples[at] = made.counts // self._per_row
        for i, name in enumerate(self.fields):
            values, of_field = (made.ids, made.labels)[i % 2], np.arange(len(made.lengths)) % self._per_row == i // 2
            result.flat[name] = values if self._per_row == 1 else values[np.repeat(of_field, made.lengths)]
            result.lengths[name] = made.lengths[of_field]
        useless = {} if self.rules.megatron else self._useless(made)
        if dropped := {at[k]: why for k, why in useless.items() if at[k] not in result.reasons}:
            result.drop(dropped)
        return result

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields of a sample, in the order in which they are stored: ids and labels by turns."""
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

    @property
    def _per_row(self) -> int:
        return len(self.fields) // 2

    def _whole(self, samples: Sequence[Sequence[Turn]], *, is_text: bool) -> "_Made":
        """All samples at once; rows with a sample that is too long are made again, one by one."""
        parts, trained_P, after_answer = self._parts(samples, is_text=is_text)
        ids, lengths_P = self.template.encode_flat(parts)
        ends_P = np.cumsum(lengths_P)
        labels = np.where(np.repeat(np.array(trained_P, bool), lengths_P), ids, np.int32(IGNORE_INDEX))
        if after_answer:
            labels[[ends_P[p] - lengths_P[p] for p in after_answer if lengths_P[p]]] = self.template.efficient_eos
        num_turns_S = np.fromiter(map(len, samples), np.int64, len(samples))
        last_S = np.cumsum(2 * num_turns_S + 2) - 1  # the last part of each sample
        ends_S = ends_P[last_S]
        lengths_S = np.diff(ends_S, prepend=0)
        turns_S = lengths_S - lengths_P[last_S] - lengths_P[last_S - 1]
        made = _Made(ids, labels, lengths_S, np.full(len(samples) // self._per_row, self._per_row))
        again: dict[int, list[Rendered]] = {}
        for k in np.flatnonzero(~self._fits(turns_S, lengths_S, is_text=is_text)).tolist():
            encoded = []
            for i in range(k * self._per_row, (k + 1) * self._per_row):
                first = last_S[i] - 1 - 2 * num_turns_S[i]
                pieces = [ids[ends_P[p] - lengths_P[p] : ends_P[p]].tolist() for p in range(first, last_S[i] - 1)]
                turns = zip(pieces[::2], pieces[1::2], samples[i], strict=True)
                encoded.append([EncodedTurn(source, target, turn.trained) for source, target, turn in turns])
            again[k], reason, truncated = self._one_row(encoded, is_text=is_text)
            made.cut[k] = (reason, truncated)
        made.put(again)
        return made

    def _parts(
        self, samples: Sequence[Sequence[Turn]], *, is_text: bool
    ) -> tuple[list[Sequence[Piece]], list[bool], list[int]]:
        """Parts of all samples, whether each is trained, and which sources are trained to end the answer before."""
        on_prompt = self.rules.train_on_prompt
        eos = None if is_text else self.template.efficient_eos
        end, eod = ([] if token is None else [token] for token in (eos, self.eod))
        parts: list[Sequence[Piece]] = []
        trained: list[bool] = []
        after_answer: list[int] = []
        for turns in samples:
            before = False
            for turn in turns:
                if before and eos is not None and not on_prompt:
                    after_answer.append(len(parts))
                parts += (turn.source, turn.target)
                before = turn.trained
                trained += (on_prompt, before or on_prompt)
            parts += (end, eod)
            trained += (before or on_prompt, True)
        return parts, trained, after_answer

    def _fits(self, turns_S: np.ndarray, lengths_S: np.ndarray, *, is_text: bool) -> np.ndarray:
        """bool [K]: rows of which nothing is to be cut or left out for its length."""
        rules = self.rules
        if is_text:
            fits = (lengths_S > 0) & (rules.megatron or rules.seq_length is None or lengths_S <= rules.seq_length)
        else:
            fits = turns_S <= self._limit
            if rules.megatron and rules.seq_length:
                fits &= lengths_S < rules.seq_length
        return np.asarray(fits.reshape(-1, self._per_row).all(1))

    def _useless(self, made: "_Made") -> dict[int, str]:
        """Rows that would train nothing: no token of one of their samples, or no difference between two answers."""
        ends = np.cumsum(made.lengths)
        starts = ends - made.lengths
        before = np.concatenate([[0], np.cumsum(made.labels != IGNORE_INDEX)])
        trains_S = before[ends] > before[np.minimum(starts + 1, ends)]  # a first token is never predicted
        row_S = np.repeat(np.arange(len(made.counts)), made.counts)
        needed = self._per_row
        trains = np.bincount(row_S[trains_S], minlength=len(made.counts)) >= needed
        useless = dict.fromkeys(np.flatnonzero(~trains).tolist(), NOT_TRAINED)
        if self.rules.pairwise:
            first = np.cumsum(made.counts) - made.counts
            for k in np.flatnonzero(trains).tolist():
                one, other = (slice(starts[i], ends[i]) for i in (first[k], first[k] + 1))
                if all(np.array_equal(values[one], values[other]) for values in (made.ids, made.labels)):
                    useless[k] = EQUAL_ANSWERS
        return useless

    def _one_row(self, samples: list[list[EncodedTurn]], *, is_text: bool) -> tuple[list[Rendered], str | None, bool]:
        """The samples of one row, why there are none, and whether anything was cut."""
        if is_text:
            return self._pieces(samples[0][0].target), None, False
        rendered: list[Rendered] = []
        truncated = False
        if self.rules.pairwise and not self.rules.megatron and self.rules.overlong == "truncate":
            samples, truncated = fit_pair(samples, self._limit)
        for turns in samples:
            made, was_cut = self._sample(turns)
            truncated = truncated or was_cut
            if made is None:
                return [], TOO_LONG, False
            rendered.append(made)
        return rendered, None, truncated

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


@dataclass
class _Made:
    """The samples of the rows that became any."""

    ids: np.ndarray
    labels: np.ndarray
    lengths: np.ndarray
    """int64 [S]"""
    counts: np.ndarray
    """int64 [K], samples of each row."""
    cut: dict[int, tuple[str | None, bool]] = field(default_factory=dict)
    """Row that was made by itself -> why it is dropped, and whether something of it was cut."""

    def put(self, rows: Mapping[int, Sequence[Rendered]]) -> None:
        """Put other samples in place of those of some rows."""
        if not rows:
            return
        tokens = np.concatenate([[0], np.cumsum(self.lengths)])
        ends = np.cumsum(self.counts)
        starts = ends - self.counts
        spans = [(int(tokens[starts[k]]), int(tokens[ends[k]])) for k in rows]
        self.ids = _spliced(self.ids, spans, [[i for r in rs for i in r.ids] for rs in rows.values()])
        self.labels = _spliced(self.labels, spans, [[i for r in rs for i in r.labels] for rs in rows.values()])
        spans = [(int(starts[k]), int(ends[k])) for k in rows]
        self.lengths = _spliced(self.lengths, spans, [[len(r.ids) for r in rs] for rs in rows.values()])
        self.counts[list(rows)] = [len(rs) for rs in rows.values()]


def _spliced(values: np.ndarray, spans: Sequence[tuple[int, int]], others: Sequence[Sequence[int]]) -> np.ndarray:
    """Values with those of some spans, which are in order, replaced."""
    pieces, at = [], 0
    for (start, end), other in zip(spans, others, strict=True):
        pieces += [values[at:start], np.array(other, values.dtype)]
        at = end
    return np.concatenate([*pieces, values[at:]])


def _nothing(rows: Sequence[tuple[int, Any]]) -> ChunkResult:
    num = len(rows)
    numbers = np.fromiter((number for number, _ in rows), np.int64, num)
    return ChunkResult(numbers, {}, np.zeros(num, np.int64), np.zeros(num, bool), np.zeros((num, 2), np.uint64))


def _digest(conversation: Conversation) -> bytes:
    """A hash that only equal conversations share: each text is told with its length."""
    messages = (
        conversation.messages if conversation.rejected is None else (*conversation.messages, conversation.rejected)
    )
    texts = [f"{m.role} {m.trained} {len(m.content)} {m.content}" for m in messages]
    told = f"{len(messages)} {conversation.tools} " + "".join(texts)
    return hashlib.blake2b(told.encode("utf-8", "surrogatepass"), digest_size=16).digest()
