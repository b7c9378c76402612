"""Each file operation of preprocessing fails once: nothing half written stays, and what was there before does."""

import errno
import json
import os
from pathlib import Path

import faults
import pytest

from finerank.data.megatron import IndexedOptions, write_indexed
from finerank.data.pipeline import choose_handler
from finerank.data.prefixes import kind_of
from finerank.data.samples import SampleMaker, SampleRules
from finerank.data.settings import TemplateSettings
from finerank.data.templates import load_template
from finerank.errors import StorageError
from tiny import tiny_tokenizer

MAKER = SampleMaker(load_template(TemplateSettings(), tiny_tokenizer()), SampleRules(seq_length=128, megatron=True))


def write(rows: Path, prefix: Path, *, pack: bool) -> None:
    options = IndexedOptions(output_prefix=prefix, pack=pack, vocab_size=384)
    write_indexed([rows], MAKER, choose_handler(None), options)


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO], ids=lambda e: errno.errorcode[e])
@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("replacing", [False, True])
def test_an_error_at_any_operation_leaves_what_was_there(tmp_path: Path, error: int, pack: bool, replacing: bool):
    rows = tmp_path / "rows.jsonl"

    def fail(name: str) -> None:
        raise OSError(error, os.strerror(error))

    def write_rows(word: str) -> None:
        rows.write_text("".join(json.dumps({"instruction": word, "output": f"{i}"}) + "\n" for i in range(20)))

    def start(folder: Path) -> dict[str, bytes]:
        folder.mkdir()
        write_rows("Old.")
        if replacing:
            write(rows, folder / "a", pack=pack)
        before = contents(folder)
        write_rows("New and longer.")
        return before

    start(tmp_path / "counted")
    with faults.injected(faults.Faults(0, fail)) as counted:
        write(rows, tmp_path / "counted" / "a", pack=pack)
    after = contents(tmp_path / "counted")
    assert counted.count > 20 and {"write", "replace", "fsync", "mkdir"} <= set(counted.names)
    for at in range(1, counted.count + 1):
        folder = tmp_path / f"{at}"
        before = start(folder)
        failed = True
        with faults.injected(faults.Faults(at, fail)):
            try:
                write(rows, folder / "a", pack=pack)
                failed = False
            except StorageError as failure:
                assert str(failure).startswith("Cannot write ") and str(folder) in str(failure)
        found = contents(folder) if not any(p.is_dir() for p in folder.iterdir()) else None
        name = counted.names[at - 1]
        if found is None:  # only where removing itself failed; the next reader takes nothing of it
            assert name in ("rmdir", "unlink", "scandir", "open"), (at, name)
            assert (kind_of(folder / "a") is not None) == (replacing or not failed)
            continue
        assert found == after or (failed and found == before), (at, name, sorted(found))
        assert found == after or failed
