"""safetensors files read and written one tensor at a time.

    with SafetensorsReader(path) as file: file.entries["a"]; file.read("a")
    with SafetensorsWriter(path, {"a": TensorInfo(...)}) as file: file.write("a", tensor)

Layout: 8 bytes little-endian header length, a JSON header `{name: {dtype, shape, data_offsets}}`, the bytes. The
library maps files into memory, where every page that was read counts as resident, and writes only what is whole in
memory; plain reads and writes keep a conversion at the size of one tensor. Reference: the format's own README.
"""

import itertools
import json
import struct
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from finerank.checkpoints.weights import TensorInfo
from finerank.errors import CheckpointError

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MAX_HEADER_BYTES = 100_000_000  # the library's own bound


class SafetensorsReader:
    """A safetensors file: headers checked on opening, tensors read on request. Raises CheckpointError."""

    def __init__(self, path: Path):
        self.path = Path(path)
        try:
            self._file = open(self.path, "rb", buffering=0)  # noqa: SIM115
        except OSError as error:
            raise CheckpointError(f"Cannot read {self.path}: {(error.strerror or str(error)).lower()}.") from error
        try:
            self.entries, self._offsets, self.metadata = self._read_header()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "SafetensorsReader":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()

    def _read_header(self) -> tuple[dict[str, TensorInfo], dict[str, int], dict[str, str]]:
        size = self.path.stat().st_size
        head = self._file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else -1
        if not 2 <= length <= min(_MAX_HEADER_BYTES, size - 8):
            raise self._damaged("its header is cut short or no safetensors header")
        try:
            header = json.loads(self._read_bytes(8, length).decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise self._damaged("its header is no JSON") from error
        if not isinstance(header, dict):
            raise self._damaged("its header is no JSON object")
        metadata = header.pop("__metadata__", None) or {}
        entries, offsets = {}, {}
        spans = []
        for name, value in header.items():
            info, begin, end = self._check_entry(name, value, size - 8 - length)
            entries[name], offsets[name] = info, 8 + length + begin
            spans.append((begin, end))
        spans.sort()
        if any(a[1] > b[0] for a, b in itertools.pairwise(spans)):
            raise self._damaged("tensors overlap")
        return entries, offsets, metadata if isinstance(metadata, dict) else {}

    def _check_entry(self, name: str, value: Any, data_bytes: int) -> tuple[TensorInfo, int, int]:
        try:
            dtype = DTYPES[value["dtype"]]
            shape = tuple(value["shape"])
            begin, end = value["data_offsets"]
            whole = all(type(n) is int and n >= 0 for n in (*shape, begin, end))
        except (KeyError, TypeError, ValueError) as error:
            raise self._damaged(f"the header entry of {name!r} is not understood") from error
        info = TensorInfo(shape, dtype)
        if not whole or begin > end or end > data_bytes or info.nbytes != end - begin:
            raise self._damaged(f"tensor {name!r} does not lie inside the file; it is cut short or altered")
        return info, begin, end

    def read(self, name: str) -> Tensor:
        """The tensor in fresh memory. Raises CheckpointError when the file is shorter than its header says."""
        info = self.entries[name]
        tensor = torch.empty(info.shape, dtype=info.dtype)
        if info.numel:
            self._read_into(self._offsets[name], as_bytes(tensor))
        return tensor

    def _read_bytes(self, offset: int, count: int) -> bytes:
        buffer = bytearray(count)
        self._read_into(offset, memoryview(buffer))
        return bytes(buffer)

    def _read_into(self, offset: int, view: memoryview) -> None:
        self._file.seek(offset)
        done = 0
        while done < len(view):
            count = self._file.readinto(view[done:])
            if not count:
                raise self._damaged("it is cut short")
            done += count

    def _damaged(self, why: str) -> CheckpointError:
        return CheckpointError(f"{self.path} is damaged or no safetensors file: {why}; get the file again.")


class SafetensorsWriter:
    """Writes a safetensors file whose tensors arrive one by one, in the order of `entries`."""

    def __init__(self, path: Path, entries: Mapping[str, TensorInfo], *, metadata: Mapping[str, str] | None = None):
        self.path = Path(path)
        self._waiting = list(entries.items())[::-1]
        header: dict[str, Any] = {"__metadata__": dict(metadata or {"format": "pt"})}
        offset = 0
        for name, info in entries.items():
            span = [offset, offset + info.nbytes]
            header[name] = {"dtype": NAMES[info.dtype], "shape": list(info.shape), "data_offsets": span}
            offset = span[1]
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
        text += b" " * (-len(text) % 8)  # the data begins at a multiple of 8
        self._file = open(self.path, "wb", buffering=0)  # noqa: SIM115
        self._write_all(struct.pack("<Q", len(text)) + text)

    def __enter__(self) -> "SafetensorsWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()
        assert kind is not None or not self._waiting, f"not written: {[n for n, _ in self._waiting]}"

    def write(self, name: str, tensor: Tensor) -> None:
        """Append the next tensor; it must be the one announced, in name, shape and dtype."""
        expected, info = self._waiting.pop()
        assert (name, tuple(tensor.shape), tensor.dtype) == (expected, info.shape, info.dtype), (name, expected, info)
        if info.numel:
            self._write_all(as_bytes(tensor))

    def _write_all(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        while len(view):
            view = view[self._file.write(view) :]


def as_bytes(tensor: Tensor) -> memoryview:
    """The tensor's memory as bytes; a copy only when it is not contiguous memory of the CPU."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return flat.numpy().data
