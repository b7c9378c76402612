"""Rows to a data set, through a cache keyed by content.

    ~/.cache/finerank/data/<key>/rows_packed_{input_ids,labels}_document.{bin,idx}, receipt.json

Pairs have four files, `chosen_` and `rejected_` of each.

The key is the SHA-256 of the files' contents, the template's digest (which holds the tokenizer's), the rules and this
pipeline's version. Entries are made aside and renamed, so a killed run leaves none half made; any of them may be
deleted at any time.
"""

import hashlib
import json
import tempfile
from contextlib import ExitStack
from pathlib import Path

from finerank.data import prefixes
from finerank.data.handlers import Handler
from finerank.data.indexed import IndexedWriter
from finerank.data.pairs import PairDataset, Samples
from finerank.data.pipeline import Rows, choose_handler, make_samples
from finerank.data.readers import input_files
from finerank.data.receipt import Receipt
from finerank.data.samples import SampleMaker, SampleRules
from finerank.data.settings import DataSettings
from finerank.data.stages import check_kind
from finerank.data.templates import Template
from finerank.data.tokens import TokenDataset
from finerank.files import cache_folder, replace_folder, sha256_file

VERSION = 2
"""Raise it when the same rows and settings would give other ids or another receipt."""

_PREFIX = "rows"


def rows_dataset(settings: DataSettings, paths: list[str], template: Template, receipt: Receipt) -> Samples:
    """The samples of files of rows; their receipts are added to `receipt`. Raises DataError, StorageError."""
    files = input_files(paths)
    key = cache_key(settings, files, template)
    if not settings.data_cache:
        with tempfile.TemporaryDirectory(prefix="finerank-") as folder:
            _build(Path(folder), settings, files, template)
            return _open(Path(folder), settings, files, key, receipt)  # stays mapped after removal
    folder_of_key = cache_folder() / "data" / key[:40]
    if not (folder_of_key / "receipt.json").is_file():
        with replace_folder(folder_of_key) as aside:
            _build(aside, settings, files, template)
    return _open(folder_of_key, settings, files, key, receipt)


def cache_key(settings: DataSettings, files: list[Path], template: Template) -> str:
    """Hex SHA-256 of all that decides ids, labels and receipt."""
    told = {
        "version": VERSION,
        "template": template.digest,
        "files": [sha256_file(path) for path in files],
        "extensions": ["".join(path.suffixes).lower() for path in files],
        "handler": settings.handler_name,
        "map_keys": settings.map_keys,
        "mask_history": settings.mask_history,
        "rules": vars(_rules(settings)),
        "deduplicate": settings.deduplicate,
        "strict": settings.strict,
        "stage": settings.stage,
        "sample_by": settings.sample_by,
    }
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def _rules(settings: DataSettings) -> SampleRules:
    return SampleRules(
        seq_length=settings.seq_length,
        overlong=settings.overlong,
        train_on_prompt=settings.train_on_prompt,
        append_eod=settings.append_eod or settings.stage == "pt",  # a text has no other end
        pairwise=settings.stage == "dpo",
    )


def _build(folder: Path, settings: DataSettings, files: list[Path], template: Template) -> None:
    receipt = Receipt()
    choose = choose_handler(settings.handler_name, map_keys=settings.map_keys, mask_history=settings.mask_history)

    def choose_checked(path: Path, rows: Rows) -> Handler:
        handler = choose(path, rows)
        check_kind(str(path), handler.kind, settings.stage)
        return handler

    maker = SampleMaker(template, _rules(settings))
    results = make_samples(
        files,
        maker,
        choose_checked,
        receipt,
        workers=settings.workers,
        strict=settings.strict,
        deduplicate=settings.deduplicate,
        sample_by=settings.sample_by,
    )
    with ExitStack() as stack:
        writers = {
            name: stack.enter_context(IndexedWriter(prefixes.field_prefix(folder / _PREFIX, name)))
            for name in maker.fields
        }
        for result in results:
            for name, writer in writers.items():
                writer.add(result.flat[name], result.lengths[name])
    (folder / "receipt.json").write_text(receipt.to_json(), encoding="utf-8")


def _open(folder: Path, settings: DataSettings, files: list[Path], key: str, receipt: Receipt) -> Samples:
    stored = Receipt.from_dict(json.loads((folder / "receipt.json").read_text(encoding="utf-8")))
    for entry, path in zip(stored.files, files, strict=True):
        entry.path = str(path)  # the same rows may lie elsewhere now
    receipt.files += stored.files
    receipt.notes += stored.notes

    def opened(part: str = "") -> TokenDataset:
        data = prefixes.open_fields(folder / _PREFIX, part, longest=settings.seq_length)
        data.digest = key + part  # the key says all that decides the ids
        return data

    return opened() if settings.stage != "dpo" else PairDataset(opened("chosen_"), opened("rejected_"))
