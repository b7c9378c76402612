"""Rows to Megatron indexed files, byte for byte as MindSpeed-LLM's `preprocess_data.py` writes them.

    receipt = write_indexed(files, maker, choose, IndexedOptions(output_prefix=Path("data/alpaca"), ...))

Each field of a sample has its own pair of files (see `prefixes` for the names). A row that is left out for its length
still adds a document boundary, as there. With `pack`, samples are put into rows of exactly `seq_length` tokens. All
files are written aside and renamed when every row is done; an interrupted run leaves nothing under the prefix.
"""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from finerank.data.handlers import Handler
from finerank.data.indexed import CODE_INT32, CODE_UINT16, IndexedFile, IndexedWriter
from finerank.data.packing import knapsack
from finerank.data.pipeline import Rows, make_samples
from finerank.data.prefixes import SIDECAR, field_prefix, kind_of, text_prefix
from finerank.data.receipt import Receipt
from finerank.data.samples import TOO_LONG, ChunkResult, SampleMaker
from finerank.data.types import IGNORE_INDEX
from finerank.errors import ConfigError, DataError
from finerank.files import fsync_path, storage_errors

Choose = Callable[[Path, Rows], Handler]


@dataclass(frozen=True, kw_only=True)
class IndexedOptions:
    """Where the files go, and how samples are laid out in them."""

    output_prefix: Path
    kind: str = "instruction"
    """instruction, pairwise or text; the form of the rows decides."""
    pack: bool = False
    neat_pack: bool = False
    pad_token_id: int = 0
    vocab_size: int = 0
    workers: int = 1
    strict: bool = False
    deduplicate: bool = False
    sample_by: str = "line"
    note: Mapping[str, Any] = field(default_factory=dict)
    """What the sidecar says about template, tokenizer and settings."""
    on_rows: Callable[[int], None] | None = None
    """Called with the number of rows done so far."""


def write_indexed(files: Sequence[Path], maker: SampleMaker, choose: Choose, options: IndexedOptions) -> Receipt:
    """Write all files of the prefix; returns the receipt. Raises ConfigError, DataError, StorageError."""
    length = maker.rules.seq_length
    if options.neat_pack and not options.pack:
        raise ConfigError("--neat-pack needs --pack.")
    if options.pack and not length:
        raise ConfigError("--pack needs --seq-length, the length of a packed row.")
    if options.pack and options.kind != "instruction":
        raise ConfigError(f"--pack is for rows with one answer; these are {options.kind} rows.")
    there = kind_of(options.output_prefix)
    if there not in (None, options.kind):
        raise ConfigError(
            f"{options.output_prefix} holds {there} rows already, and these are {options.kind} rows; choose another "
            "--output-prefix, or remove its files."
        )
    receipt = Receipt()
    results = make_samples(
        files,
        maker,
        choose,
        receipt,
        workers=options.workers,
        strict=options.strict,
        deduplicate=options.deduplicate,
        sample_by=options.sample_by,
    )
    with _aside_then_under(options.output_prefix) as prefix:
        if options.kind == "text":
            _write_text(prefix, _counted(results, options), options)
        elif options.pack:
            assert length is not None
            _write_packed(prefix, _counted(results, options), length, options)
        else:
            _write_samples(prefix, _counted(results, options), maker.fields)
        if not any(file.samples for file in receipt.files):
            raise DataError("No row of the input can be used:\n" + receipt.table())
        _write_json(prefix.with_name(prefix.name + "_receipt.json"), receipt.to_dict())
        _write_json(prefix.with_name(prefix.name + SIDECAR), {"format": 1, "kind": options.kind, **options.note})
    return receipt


def _counted(results: Iterator[ChunkResult], options: IndexedOptions) -> Iterator[ChunkResult]:
    done = 0
    for result in results:
        yield result
        done += len(result.rows)
        if options.on_rows is not None:
            options.on_rows(done)


def _write_samples(prefix: Path, results: Iterator[ChunkResult], fields: Sequence[str]) -> None:
    with contextlib.ExitStack() as stack:
        writers = {name: stack.enter_context(IndexedWriter(field_prefix(prefix, name))) for name in fields}
        masks = None
        if "input_ids" in writers:
            masks = stack.enter_context(IndexedWriter(field_prefix(prefix, "attention_mask")))
        for result in results:
            boundaries = _boundaries(result)
            for name, writer in writers.items():
                writer.add(result.flat[name], result.lengths[name], boundaries=boundaries)
            if masks is not None:
                lengths = result.lengths["input_ids"]
                masks.add(np.ones(int(lengths.sum()), np.int32), lengths, boundaries=boundaries)


def _boundaries(result: ChunkResult) -> np.ndarray:
    """How many of the chunk's samples lie before each document boundary: one after each row, kept or too long."""
    ends_document = result.is_kept
    ends_document[[i for i, reason in result.reasons.items() if reason == TOO_LONG]] = True
    return np.cumsum(result.num_samples)[ends_document]


def _write_text(prefix: Path, results: Iterator[ChunkResult], options: IndexedOptions) -> None:
    code = CODE_UINT16 if options.vocab_size < 65500 else CODE_INT32  # Megatron's choice for pretraining
    with IndexedWriter(text_prefix(prefix), code=code) as writer:
        for result in results:
            writer.add(result.flat["input_ids"], result.lengths["input_ids"])


def _write_packed(prefix: Path, results: Iterator[ChunkResult], length: int, options: IndexedOptions) -> None:
    """Samples go to files of their own first, so that packing needs only their lengths in memory."""
    single = prefix.with_name("single")
    _write_samples(single, results, ("input_ids", "labels"))
    ids, labels = (IndexedFile(field_prefix(single, name)) for name in ("input_ids", "labels"))
    rows = knapsack(ids.lengths.tolist(), length - 1)
    with contextlib.ExitStack() as stack:
        ids_out, labels_out, masks_out = (
            stack.enter_context(IndexedWriter(field_prefix(prefix, name)))
            for name in ("input_ids", "labels", "attention_mask")
        )
        one = np.array([length], np.int64)
        for row in rows:
            packed = np.full((3, length), options.pad_token_id, np.int32)
            packed[1], packed[2] = IGNORE_INDEX, 0 if options.neat_pack else 1
            at = 0
            for number, i in enumerate(row, start=1):
                end = at + int(ids.lengths[i])
                packed[0, at:end], packed[1, at:end] = ids[i], labels[i]
                packed[2, at:end] = number if options.neat_pack else 1
                at = end
            for writer, values in zip((ids_out, labels_out, masks_out), packed, strict=True):
                writer.add(values, one)
    for path in single.parent.glob("single_*"):
        path.unlink()


@contextlib.contextmanager
def _aside_then_under(prefix: Path) -> Iterator[Path]:
    """Yield a prefix in a folder aside; on success its files take their place, the index files last."""
    prefix = prefix.expanduser()
    with storage_errors(prefix):
        prefix.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=".finerank-aside-", dir=prefix.parent))
        try:
            yield aside / prefix.name
            # Without its index a `.bin` is nothing: no old index may ever lie beside a new `.bin`.
            written = sorted(aside.iterdir(), key=lambda p: (p.suffix == ".idx", p.suffix == ".json", p.name))
            for path in written:
                fsync_path(path)
            _take_the_place(written, prefix.parent)
            fsync_path(prefix.parent)
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def _take_the_place(written: Sequence[Path], folder: Path) -> None:
    """Rename files into a folder, the last ones' namesakes leaving it first; an error puts all back as it was."""
    undo: list[tuple[Path, Path]] = []
    old = written[0].parent / "old"
    try:
        old.mkdir()
        there = [path for path in reversed(written) if (folder / path.name).exists()]
        moves = [(folder / path.name, old / path.name) for path in there]
        for source, target in moves + [(path, folder / path.name) for path in written]:
            os.replace(source, target)
            undo.append((target, source))
    except BaseException:
        for source, target in reversed(undo):
            with contextlib.suppress(OSError):
                os.replace(source, target)
        raise


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
