"""Pairs from indexed prefixes: `PREFIX_packed_{chosen,rejected}_{input_ids,labels}_document.{bin,idx}`.

Written by `finerank preprocess`, or by MindSpeed-LLM's `preprocess_data.py` with a pairwise handler. Pairs that cannot
teach anything (equal answers, nothing trained) are left out and counted; longer ones than `--seq-length` are cut as
those of rows are.
"""

import hashlib

import numpy as np

from finerank.data.indexed import IndexedFile
from finerank.data.pairs import EQUAL_ANSWERS, PairDataset, fit_pair
from finerank.data.prefixes import check_sidecar, field_prefix
from finerank.data.receipt import FileReceipt, Receipt
from finerank.data.samples import NOT_TRAINED
from finerank.data.settings import DataSettings
from finerank.data.templates import Template
from finerank.data.tokens import Source, TokenDataset
from finerank.data.truncate import EncodedTurn, join
from finerank.data.types import IGNORE_INDEX
from finerank.errors import DataError

_PARTS = ("chosen", "rejected")

Sequence = tuple[np.ndarray, np.ndarray]


def pair_dataset(settings: DataSettings, prefix: str, template: Template, receipt: Receipt) -> PairDataset:
    """The pairs under a prefix, cut to `settings.seq_length`. Raises DataError, ConfigError."""
    check_sidecar(settings, prefix, template, receipt)
    files = [_open(prefix, part) for part in _PARTS]
    if len(files[0][0]) != len(files[1][0]):
        raise DataError(f"{prefix}: there are more chosen than rejected answers, or fewer; preprocess the rows again.")
    file = FileReceipt(str(prefix), handler="indexed")
    receipt.files.append(file)
    kept: list[list[Sequence]] = []
    for i in range(len(files[0][0])):
        pair = [(ids[i], labels[i]) for ids, labels in files]
        if any(len(ids) and int(ids.min()) < 0 for ids, _ in pair):
            raise DataError(f"{prefix}: pair {i + 1} has a negative token id; preprocess the rows again.")
        pair, was_cut = _cut(pair, settings.seq_length)
        if any(not (labels[1:] != IGNORE_INDEX).any() for _, labels in pair):
            file.drop(i + 1, NOT_TRAINED)
        elif np.array_equal(pair[0][0], pair[1][0]):
            file.drop(i + 1, EQUAL_ANSWERS)
        else:
            file.keep(i + 1, truncated=was_cut)
            kept.append(pair)
            continue
        if settings.strict:
            (reason,) = (reason for reason, counted in file.dropped.items() if counted.count)
            raise DataError(f"{prefix} pair {i + 1}: {reason}; correct the row or leave it out.")
    chosen, rejected = (_in_memory([pair[n] for pair in kept], settings.seq_length) for n in range(2))
    for data in (chosen, rejected):
        file.add_samples(data.lengths, int(data.trained_lengths.sum()))
    return PairDataset(chosen, rejected)


def _open(prefix: str, part: str) -> tuple[IndexedFile, IndexedFile]:
    ids, labels = (IndexedFile(field_prefix(prefix, f"{part}_{name}")) for name in ("input_ids", "labels"))
    if not np.array_equal(ids.lengths, labels.lengths):
        raise DataError(f"{prefix}: {part} input_ids and labels have different lengths; preprocess the rows again.")
    return ids, labels


def _cut(pair: list[Sequence], limit: int) -> tuple[list[Sequence], bool]:
    if max(len(ids) for ids, _ in pair) <= limit:
        return pair, False
    turns = []
    for ids, labels in pair:
        trained = np.flatnonzero(labels != IGNORE_INDEX)
        start = int(trained[0]) if len(trained) else len(ids)
        turns.append([EncodedTurn(ids[:start].tolist(), ids[start:].tolist())])
    joined = [join(turn) for turn in fit_pair(turns, limit)[0]]
    return [(np.array(r.ids, np.int32), np.array(r.labels, np.int32)) for r in joined], True


def _in_memory(sequences: list[Sequence], longest: int) -> TokenDataset:
    """Pairs are few beside instruction rows: copying them is simpler than keeping track of which were cut."""
    lengths = np.array([len(ids) for ids, _ in sequences], np.int64)
    empty = np.zeros(0, np.int32)
    ids, labels = (np.concatenate([empty, *(s[n] for s in sequences)]).astype(np.int32) for n in range(2))
    starts = np.cumsum(np.concatenate([[0], lengths[:-1]])).astype(np.int64)[: len(lengths)]
    digest = hashlib.sha256(lengths.tobytes() + ids.tobytes() + labels.tobytes()).hexdigest()
    source = np.zeros(len(lengths), np.int64)
    return TokenDataset([Source(ids, labels)], source, starts, starts, lengths, longest=longest, digest=digest)
