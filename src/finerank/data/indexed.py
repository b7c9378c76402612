"""Megatron's indexed files: `.bin` holds the token arrays one after the other, `.idx` says where each one is.

    with IndexedWriter(prefix) as writer: writer.add(flat, lengths)
    file = IndexedFile(prefix); file.values[file.starts[i] : file.starts[i] + file.lengths[i]]

Layout of `.idx`, little-endian: 9 bytes `MMIDIDX\\0\\0`, u64 version 1, u8 type code, u64 number of sequences N, u64
number of document boundaries M, N x int32 lengths in tokens, N x int64 byte offsets in `.bin`, M x int64 boundaries
(first 0, last N). The reader checks all of it against the sizes of both files and maps the values into memory.
"""

import contextlib
import mmap
import os
import shutil
import struct
import tempfile
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, cast

import numpy as np

from finerank.errors import DataError
from finerank.files import storage_errors

_MAGIC = b"MMIDIDX\x00\x00"
_HEAD = struct.Struct("<9sQBQQ")
_DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}
_TOKENS = {1, 2, 3, 4, 5, 8}
CODE_INT32, CODE_UINT16 = 4, 8

_BLOCK = 1 << 16
"""Sequences whose place is written at a time."""


def bin_path(prefix: Path) -> Path:
    """The file with the values."""
    return prefix.with_name(prefix.name + ".bin")


def idx_path(prefix: Path) -> Path:
    """The file that says where each sequence is."""
    return prefix.with_name(prefix.name + ".idx")


class IndexedWriter:
    """Writes one pair of files; sequences are added in order, and nothing about them is kept in memory.

    Leaving the `with` block completes the index; an error leaves the files behind for the caller, who writes into a
    place aside, to remove. Raises StorageError.
    """

    def __init__(self, prefix: Path, *, code: int = CODE_INT32):
        self.prefix = Path(prefix)
        self.code = code
        self.dtype = np.dtype(_DTYPES[code])
        self._num_sequences = self._num_boundaries = 0
        with contextlib.ExitStack() as stack:
            self._file = stack.enter_context(self._opened(bin_path(self.prefix), "wb"))
            self._index = stack.enter_context(self._opened(idx_path(self.prefix), "w+b"))
            with storage_errors(idx_path(self.prefix)):
                # the index ends with the boundaries, and where they are to stand is known at the end
                self._boundaries = stack.enter_context(tempfile.TemporaryFile(dir=self.prefix.parent))
                self._index.write(bytes(_HEAD.size))
            self._open_files = stack.pop_all()
        self._add_boundaries(np.zeros(1, np.int64))

    def add(self, flat: np.ndarray, lengths: np.ndarray, *, boundaries: np.ndarray | None = None) -> None:
        """Append sequences.

        Args:
            flat: their values, one after the other.
            lengths: int64, the length of each.
            boundaries: for document boundaries other than one after each sequence: how many sequences of `lengths`
                lie before each of them.
        """
        assert int(lengths.sum()) == len(flat)
        with storage_errors(bin_path(self.prefix)):
            self._file.write(np.ascontiguousarray(flat, self.dtype).tobytes())
        with storage_errors(idx_path(self.prefix)):
            self._index.write(lengths.astype("<i4").tobytes())
        self._add_boundaries(np.arange(1, len(lengths) + 1) if boundaries is None else boundaries)
        self._num_sequences += len(lengths)

    def _add_boundaries(self, after: np.ndarray) -> None:
        with storage_errors(idx_path(self.prefix)):
            self._boundaries.write((self._num_sequences + after).astype("<i8").tobytes())
        self._num_boundaries += len(after)

    def __enter__(self) -> "IndexedWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        with storage_errors(bin_path(self.prefix)), self._open_files:
            if kind is None:
                self._file.flush()
                os.fsync(self._file.fileno())
                self._complete_index()

    def _complete_index(self) -> None:
        index = self._index
        with storage_errors(idx_path(self.prefix)):
            start = 0
            for first in range(0, self._num_sequences, _BLOCK):
                index.seek(_HEAD.size + 4 * first)
                lengths = np.frombuffer(index.read(4 * min(_BLOCK, self._num_sequences - first)), "<i4")
                ends = start + np.cumsum(lengths, dtype=np.int64) * self.dtype.itemsize
                index.seek(0, os.SEEK_END)
                index.write((ends - lengths * np.int64(self.dtype.itemsize)).astype("<i8").tobytes())
                start = int(ends[-1])
            self._boundaries.seek(0)
            shutil.copyfileobj(self._boundaries, index, 1 << 20)
            index.seek(0)
            index.write(_HEAD.pack(_MAGIC, 1, self.code, self._num_sequences, self._num_boundaries))
            index.flush()
            os.fsync(index.fileno())

    @staticmethod
    def _opened(path: Path, mode: str) -> BinaryIO:
        with storage_errors(path):
            return cast(BinaryIO, open(path, mode, buffering=1 << 20))  # closed in __exit__


class IndexedFile:
    """One pair of files, checked and memory-mapped.

    Attributes:
        values: all tokens of the `.bin`, mapped, not read.
        starts: int64 [N], where each sequence begins in `values`.
        lengths: int64 [N], in tokens.
        boundaries: int64 [M], document boundaries.
    """

    def __init__(self, prefix: Path):
        """Raises DataError for files that are missing, damaged or do not belong together."""
        idx, values = idx_path(prefix), bin_path(prefix)
        try:
            raw = np.fromfile(idx, dtype=np.uint8)
            num_bytes = values.stat().st_size
        except OSError as error:
            raise DataError(
                f"Cannot read {error.filename or idx}: {error.strerror}; give a whole .bin/.idx pair."
            ) from error
        if len(raw) < _HEAD.size or raw[:9].tobytes() != _MAGIC:
            raise DataError(f"{idx} is no Megatron index file; preprocess the rows again.")
        _, version, code, num, num_boundaries = _HEAD.unpack(raw[: _HEAD.size].tobytes())
        if version != 1 or code not in _TOKENS:
            raise DataError(
                f"{idx} has version {version} and type code {code}; only version 1 with whole numbers is read."
            )
        sizes = (4 * num, 8 * num, 8 * num_boundaries)
        extra = len(raw) - _HEAD.size - sum(sizes)
        if extra not in (0, num):  # one byte a sequence more in multimodal files
            raise DataError(
                f"{idx} is damaged: it should have {len(raw) - extra} bytes and has {len(raw)}; make it again."
            )
        at = np.cumsum([_HEAD.size, *sizes])
        self.lengths = raw[at[0] : at[1]].view("<i4").astype(np.int64)
        offsets = raw[at[1] : at[2]].view("<i8").astype(np.int64)
        self.boundaries = raw[at[2] : at[3]].view("<i8").astype(np.int64)
        dtype = np.dtype(_DTYPES[code])
        self._check(idx, values, offsets, dtype.itemsize, num_bytes)
        self.starts = offsets // dtype.itemsize
        count = num_bytes // dtype.itemsize
        self.values = np.memmap(values, dtype=dtype, mode="r", shape=(count,)) if count else np.zeros(0, dtype)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, i: int) -> np.ndarray:
        return self.values[self.starts[i] : self.starts[i] + self.lengths[i]]

    def _check(self, idx: Path, values: Path, offsets: np.ndarray, itemsize: int, num_bytes: int) -> None:
        def broken(what: str) -> DataError:
            return DataError(f"{idx} is damaged: {what}; preprocess the rows again.")

        if len(self.lengths):
            if self.lengths.min() < 0 or offsets.min() < 0:
                raise broken("a negative length or offset")
            if (offsets % itemsize).any():
                raise broken("an offset inside a token")
            # int64 cannot overflow here: lengths are below 2^31, and offsets are compared before the sum
            if offsets.max() > num_bytes or int((offsets + self.lengths * itemsize).max()) > num_bytes:
                need = int(min(offsets.max(), num_bytes) + self.lengths.max() * itemsize)
                raise DataError(
                    f"{values} is shorter ({num_bytes} bytes) than its index says (at least {need}); it was not "
                    "written to the end: preprocess the rows again."
                )
        boundaries = self.boundaries
        if not len(boundaries) or boundaries[0] != 0 or boundaries[-1] != len(self.lengths):
            raise broken("the document boundaries do not span the sequences")
        if (np.diff(boundaries) < 0).any():
            raise broken("the document boundaries are not in order")


def let_go(*arrays: np.ndarray) -> None:
    """Give the pages of mapped files back to the system; what is needed again comes from its cache of files.

    Else a process that has gone through its data holds all of it. No tokens change, and plain arrays stay as they are.
    """
    for values in arrays:
        mapped = getattr(values, "_mmap", None)
        if mapped is not None and hasattr(mmap, "MADV_DONTNEED"):  # not on Windows
            mapped.madvise(mmap.MADV_DONTNEED)
