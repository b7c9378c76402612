"""Files to samples, in order and with every row accounted for, in one process or several.

    for result in make_samples(files, maker, choose, receipt, workers=2): writer.add(result)

Rows are read here, cut into chunks and sent to the workers; results come back in the order of the rows, whatever the
number of workers, and only a few chunks are under way at a time, so that memory stays flat for files of any size.
"""

import collections
import itertools
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np

from finerank.data import readers
from finerank.data.handlers import Handler, detect_handler, make_handler
from finerank.data.key_index import KeySet
from finerank.data.receipt import DUPLICATE, FileReceipt, Receipt
from finerank.data.rows import BadRow
from finerank.data.samples import TOO_LONG, ChunkResult, SampleMaker
from finerank.data.types import IGNORE_INDEX
from finerank.errors import ConfigError, DataError

CHUNK_ROWS = 512
CHUNK_CHARACTERS = 4 << 20
"""A chunk ends earlier when its texts are long, so that huge cells do not pile up."""
LOOK_AHEAD = 64
"""How many rows may be looked at to tell a file's form."""

Rows = list[tuple[int, "dict[str, Any] | BadRow"]]
Task = tuple[int, Handler, Rows]

_maker: SampleMaker | None = None


def choose_handler(
    name: str | None, *, map_keys: Mapping[str, Any] | None = None, mask_history: bool = False
) -> Callable[[Path, Rows], Handler]:
    """How a file's handler is found: by name, or from its first rows. The function raises ConfigError, DataError."""
    named = make_handler(name, map_keys=map_keys, mask_history=mask_history) if name else None

    def choose(path: Path, rows: Rows) -> Handler:
        if named is not None:
            return named
        first = [row for _, row in rows if isinstance(row, dict)]
        found = detect_handler(first, map_keys=map_keys, mask_history=mask_history)
        if found is None:
            columns = ", ".join(map(repr, first[0])) if first else "none"
            inside = [key for key, value in first[0].items() if isinstance(value, list)] if len(rows) == 1 else []
            hint = f"; or are its rows under {inside[0]!r}? Then make that list the file" if inside else ""
            raise DataError(
                f"The rows of {path} have no known form (columns: {columns}); name one with --handler-name, and rename "
                f"columns with --map-keys{hint}."
            )
        return found

    return choose


def make_samples(
    files: Sequence[Path],
    maker: SampleMaker,
    choose: Callable[[Path, Rows], Handler],
    receipt: Receipt,
    *,
    workers: int = 1,
    strict: bool = False,
    deduplicate: bool = False,
    sample_by: str = "line",
) -> Iterator[ChunkResult]:
    """The samples of all files in order; `receipt` gains one entry for each file.

    Args:
        files: what to read.
        maker: what makes samples of rows.
        choose: gives the handler of a file from its first rows.
        workers: processes; 1 works in this one.
        strict: raise at the first row that cannot be used.
        deduplicate: leave out rows equal to an earlier one, also of another file.
        sample_by: what a row of a plain-text file is; see `readers.read_rows`.

    Raises:
        ConfigError: `sample_by` would have no effect.
        DataError: a file cannot be read; with `strict` or overlong "error", a bad row.
    """
    if sample_by != "line" and not any(map(readers.is_plain_text, files)):
        raise ConfigError(f"--sample-by {sample_by} has no effect: no file is plain text (.txt); leave it out.")
    receipt.files += [FileReceipt(str(path)) for path in files]
    own = receipt.files[len(receipt.files) - len(files) :]
    seen = KeySet()
    tasks = _tasks(files, own, choose, sample_by)
    for index, result in _map(tasks, maker, workers):
        yield _account(result, own[index], seen, maker, strict=strict, deduplicate=deduplicate)


def _tasks(
    files: Sequence[Path], receipts: Sequence[FileReceipt], choose: Callable[[Path, Rows], Handler], sample_by: str
) -> Iterator[Task]:
    for index, path in enumerate(files):
        rows = readers.read_rows(path, sample_by=sample_by)
        head: Rows = list(itertools.islice(rows, LOOK_AHEAD))
        if not head:
            continue
        if all(isinstance(row, BadRow) for _, row in head):
            handler = make_handler("alpaca")  # never asked: there is no row to convert
        else:
            handler = choose(path, head)
            receipts[index].handler = handler.name
            receipts[index].notes += handler.notes([row for _, row in head])
        for chunk in _chunks(itertools.chain(head, rows)):
            yield index, handler, chunk


def _chunks(rows: Iterator[tuple[int, Any]]) -> Iterator[Rows]:
    chunk: Rows = []
    characters = 0
    for number, row in rows:
        chunk.append((number, row))
        if isinstance(row, dict):
            characters += sum(len(value) for value in row.values() if isinstance(value, str | list))
        if len(chunk) == CHUNK_ROWS or characters > CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def _map(tasks: Iterator[Task], maker: SampleMaker, workers: int) -> Iterator[tuple[int, ChunkResult]]:
    """(file index, result) for each task, in order."""
    if workers <= 1:
        for index, handler, rows in tasks:
            yield index, maker(handler, rows)
        return
    maker.template.encoder.encode([""])  # what is computed once is computed before the workers are forked
    method = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)
    # Not multiprocessing's Pool, which waits for ever for the result of a worker that was killed.
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(maker,))
    under_way: collections.deque[tuple[int, Future[ChunkResult]]] = collections.deque()
    try:
        for index, handler, rows in tasks:
            under_way.append((index, pool.submit(_work, handler, rows)))
            while len(under_way) > 2 * workers + 1:
                index_done, done = under_way.popleft()
                yield index_done, done.result()
        for index_done, done in under_way:
            yield index_done, done.result()
    except BrokenProcessPool as error:
        raise DataError(
            "The rows are not prepared: a worker process was ended, perhaps for want of memory; give fewer --workers."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker(maker: SampleMaker) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # each worker is one process on one core
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_end_with_parent, daemon=True).start()
    global _maker
    _maker = maker


def _end_with_parent() -> None:
    """A parent that was killed cannot tell its workers to stop; they would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(handler: Handler, rows: Rows) -> ChunkResult:
    assert _maker is not None
    return _maker(handler, rows)


def _account(
    result: ChunkResult, file: FileReceipt, seen: KeySet, maker: SampleMaker, *, strict: bool, deduplicate: bool
) -> ChunkResult:
    """Enter a chunk's rows into the receipt; returns what is left of it."""
    kept = np.flatnonzero(result.is_kept)
    copies = kept[~seen.add_new(result.digests[kept])]
    file.duplicates.add_all(result.rows[copies])
    if deduplicate and len(copies):
        result.drop(dict.fromkeys(copies.tolist(), DUPLICATE))
    for i, reason in sorted(result.reasons.items()):
        row = int(result.rows[i])
        if strict or (reason == TOO_LONG and maker.rules.overlong == "error"):
            what = "leave it out" if reason == DUPLICATE else "correct the row or leave it out"
            raise DataError(f"{file.path} row {row}: {reason}; {what}.")
        file.drop(row, reason)
    file.keep_all(len(result.rows) - len(result.reasons), truncated=result.rows[result.truncated])
    for ids, labels in zip(maker.fields[::2], maker.fields[1::2], strict=True):
        trained = int((result.flat[labels] != IGNORE_INDEX).sum())
        file.add_samples(result.lengths[ids], trained)
    return result
