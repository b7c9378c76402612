"""Data sets from indexed prefixes, written by `finerank preprocess` or by MindSpeed-LLM's `preprocess_data.py`.

    PREFIX_packed_input_ids_document.{bin,idx}, ..._labels_..., ..._attention_mask_...     instruction rows
    PREFIX_text_document.{bin,idx}                                                        plain text, all trained
    PREFIX_packed_{chosen,rejected}_{input_ids,labels}_document.{bin,idx}                 pairs; see `pair_prefixes`
    PREFIX_finerank.json                                                                  template, tokenizer, receipt

Segments of neat-packed files (numbers in the attention mask) become samples of their own again; padding and whatever
follows the last trained token of a sample is left out, since no loss depends on it.
"""

import hashlib
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np

from finerank.data.indexed import IndexedFile, idx_path
from finerank.data.receipt import FileReceipt, Receipt
from finerank.data.samples import NOT_TRAINED
from finerank.data.settings import DataSettings
from finerank.data.stored import read_samples
from finerank.data.templates import Template
from finerank.data.tokens import Source, TokenDataset
from finerank.errors import ConfigError, DataError

SIDECAR = "_finerank.json"


def field_prefix(prefix: str | Path, name: str) -> Path:
    """Where a field's pair of files is, without `.bin` or `.idx`."""
    prefix = Path(prefix).expanduser()
    return prefix.with_name(f"{prefix.name}_packed_{name}_document")


def text_prefix(prefix: str | Path) -> Path:
    """The same for plain text; Megatron's commands give the whole name of such a file."""
    prefix = Path(prefix).expanduser()
    if prefix.name.endswith("_text_document") and idx_path(prefix).is_file():
        return prefix
    return prefix.with_name(f"{prefix.name}_text_document")


def kind_of(path: str | Path) -> str | None:
    """What lies under a prefix: "instruction", "pairwise" or "text"; None where no indexed files do."""
    for kind, prefix in (
        ("instruction", field_prefix(path, "input_ids")),
        ("pairwise", field_prefix(path, "chosen_input_ids")),
        ("text", text_prefix(path)),
    ):
        if idx_path(prefix).is_file():
            return kind
    return None


def prefix_dataset(settings: DataSettings, prefix: str, template: Template, receipt: Receipt) -> TokenDataset:
    """The samples under a prefix, cut to `settings.seq_length` when they are read. Raises DataError, ConfigError."""
    kind = kind_of(prefix)
    check_sidecar(settings, prefix, template, receipt)
    if kind == "text":
        ids = labels = IndexedFile(text_prefix(prefix))
        mask = None
    else:
        ids = IndexedFile(field_prefix(prefix, "input_ids"))
        labels = IndexedFile(field_prefix(prefix, "labels"))
        mask_prefix = field_prefix(prefix, "attention_mask")
        mask = IndexedFile(mask_prefix) if idx_path(mask_prefix).is_file() else None
        for name, other in (("labels", labels), ("attention_mask", mask)):
            if other is not None and not np.array_equal(other.lengths, ids.lengths):
                raise DataError(f"{prefix}: input_ids and {name} have different lengths; preprocess the rows again.")
    return _dataset(prefix, ids, labels, mask, settings.seq_length, receipt, vocab_size=_vocab_size(template))


def segments(prefix: str | Path, row: int) -> list[tuple[int, int]]:
    """Where the samples of a neat-packed row begin and end; for any other row, the whole of it. Raises DataError."""
    mask_prefix = field_prefix(prefix, "attention_mask")
    if not idx_path(mask_prefix).is_file():
        return [(0, int(IndexedFile(field_prefix(prefix, "input_ids")).lengths[row]))]
    numbers = IndexedFile(mask_prefix)[row]
    if not len(numbers) or int(numbers.max()) <= 1:
        return [(0, len(numbers))]
    edges = [0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist(), len(numbers)]
    return [(a, b) for a, b in itertools.pairwise(edges) if numbers[a] != 0]


def open_fields(prefix: Path, part: str = "", *, longest: int) -> TokenDataset:
    """The samples of two indexed files that this program wrote, nothing left out; digest left empty.

    `part` is "chosen_" or "rejected_" for pairs.
    """
    ids, labels = (IndexedFile(field_prefix(prefix, part + name)) for name in ("input_ids", "labels"))
    numbers = np.zeros(len(ids), np.int64)
    return TokenDataset(
        [Source(ids.values, labels.values)], numbers, ids.starts, labels.starts, ids.lengths, longest=longest
    )


def _dataset(
    prefix: str,
    ids: IndexedFile,
    labels: IndexedFile,
    mask: IndexedFile | None,
    longest: int,
    receipt: Receipt,
    *,
    vocab_size: int,
) -> TokenDataset:
    file = FileReceipt(str(prefix), handler="indexed")
    receipt.files.append(file)
    digest = hashlib.sha256()
    blocks = []
    for block in read_samples(ids, labels, mask, vocab_size=vocab_size, digest=digest):
        if block.odd is not None:
            at, token = block.odd
            raise DataError(
                f"{prefix}: sample {at + 1} has token id {token}, and this tokenizer's end at {vocab_size - 1}: it "
                "was made with another tokenizer, or is damaged; preprocess the rows with this one."
            )
        blocks.append(block)
    sequence, offsets, lengths = (
        np.concatenate([np.zeros(0, np.int64), *(getattr(block, name) for block in blocks)])
        for name in ("sequence", "offsets", "lengths")
    )
    longest_of = np.zeros(len(ids), np.int64)
    np.maximum.at(longest_of, sequence, lengths)
    for i, length in enumerate(longest_of.tolist()):
        if length:
            file.keep(i + 1, truncated=length > longest)
        else:
            file.drop(i + 1, NOT_TRAINED)
    data = TokenDataset(
        [Source(ids.values, labels.values)],
        np.zeros(len(sequence), np.int64),
        ids.starts[sequence] + offsets,
        labels.starts[sequence] + offsets,
        lengths,
        longest=longest,
        digest=hashlib.sha256(f"{digest.hexdigest()} {longest}".encode()).hexdigest(),
    )
    file.add_samples(data.lengths, int(data.trained_lengths.sum()))
    return data


def _vocab_size(template: Template) -> int:
    """One more than the largest id that the tokenizer can give."""
    return 1 + max(template.encoder.tokenizer.get_vocab().values())


def check_sidecar(settings: DataSettings, prefix: str, template: Template, receipt: Receipt) -> None:
    """Raise ConfigError when the ids were made with another template than this run's; note when nothing is known."""
    stored = read_sidecar(prefix)
    if stored is None:
        receipt.notes.append(f"{prefix} says nothing about its template; make sure that it is '{template.name}'")
        return
    if stored.get("template_digest") in (None, template.digest) or settings.template_anyway:
        return
    made = stored.get("template_settings") or {}
    flag = f"--prompt-type {made['prompt_type']}" if made.get("prompt_type") else "--hf-chat-template"
    thinking = made.get("enable_thinking", "none")
    flag += f" --enable-thinking {thinking}" if thinking != "none" else ""
    raise ConfigError(
        f"The ids of {prefix} were made with template '{stored.get('template')}', and this run's template or tokenizer "
        f"is another one ('{template.name}'); give {flag} and the same tokenizer, or --template-anyway."
    )


def read_sidecar(prefix: str | Path) -> dict[str, Any] | None:
    """What `finerank preprocess` noted about a prefix; None for files of other programs. Raises DataError."""
    prefix = Path(prefix).expanduser()
    path = prefix.with_name(prefix.name + SIDECAR)
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read ({error}); preprocess the rows again.") from error
    if not isinstance(values, dict):
        raise DataError(f"{path} holds no JSON object; preprocess the rows again.")
    return values
