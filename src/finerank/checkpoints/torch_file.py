"""torch's `.pt`/`.pth` files read without executing anything and written one tensor at a time.

    file = TorchFile(path)
    file.content                  the saved object; each tensor is a `StoredTensor` (shape and dtype only)
    file.read(stored)             that tensor, in fresh memory, its bytes checked against the archive's CRC

    with TorchWriter(path, {"model": {"w": TensorInfo((4, 4), torch.bfloat16)}}) as file: file.write(tensor)

Layout: a zip of uncompressed members `<stem>/data.pkl` (a pickle whose tensors are persistent ids), `<stem>/data/<key>`
(bytes of a storage), `<stem>/version`, `<stem>/byteorder`. Source: torch/serialization.py.
"""

import argparse
import collections
import io
import pickle
import struct
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch
from torch import Tensor

from finerank.checkpoints import pickles
from finerank.checkpoints.pickles import Inert, Name, Persistent
from finerank.checkpoints.safetensors_file import as_bytes
from finerank.checkpoints.weights import TensorInfo
from finerank.errors import CheckpointError

_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_STORAGE_NAMES = {dtype: name for name, dtype in _STORAGES.items()}
_REBUILD = {("torch._utils", "_rebuild_tensor_v2"), ("torch._utils", "_rebuild_tensor")}
_MAX_PICKLE_BYTES = 512 << 20
_ALIGNMENT = 64


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """A tensor that lies in a torch file."""

    key: str
    info: TensorInfo
    offset: int
    """First element within the storage."""
    stride: tuple[int, ...]


class TorchFile:
    """A torch zip file, its pickle read by a machine that executes nothing. Raises CheckpointError."""

    def __init__(self, path: Path):
        self.path = Path(path)
        with self._errors(), zipfile.ZipFile(self.path) as archive:
            members = {m.filename: m for m in archive.infolist()}
            pickled = [n for n in members if n.endswith("/data.pkl") and n.count("/") == 1]
            if len(pickled) != 1:
                raise self._damaged("it has no data.pkl")
            root = pickled[0].removesuffix("data.pkl")
            if any(m.compress_type != zipfile.ZIP_STORED or m.file_size != m.compress_size for m in members.values()):
                raise self._damaged("members are compressed")
            if members[pickled[0]].file_size > _MAX_PICKLE_BYTES:
                raise self._damaged("its pickle is too large")
            order = archive.read(root + "byteorder") if root + "byteorder" in members else b"little"
            if order.strip() != b"little":
                raise self._damaged("it was written on a big-endian machine")
            self._members = {n.removeprefix(root + "data/"): m for n, m in members.items()}
            self.content = self._with_tensors(pickles.load(archive.read(pickled[0]), str(self.path)))

    def read(self, stored: StoredTensor) -> Tensor:
        """The tensor in fresh memory. Raises CheckpointError when its bytes are not what the archive's CRC says."""
        member = self._members[stored.key]
        storage = torch.empty(member.file_size // stored.info.dtype.itemsize, dtype=stored.info.dtype)
        with self._errors(), open(self.path, "rb", buffering=0) as file:
            file.seek(member.header_offset)
            head = file.read(30)
            if len(head) != 30 or head[:4] != b"PK\x03\x04":
                raise self._damaged(f"member {stored.key} is not where its index says")
            name_length, extra_length = struct.unpack("<HH", head[26:30])
            file.seek(member.header_offset + 30 + name_length + extra_length)
            view = as_bytes(storage)
            done = 0
            while done < len(view):
                count = file.readinto(view[done:])  # type: ignore[attr-defined]
                if not count:
                    raise self._damaged("it is cut short")
                done += count
            if zlib.crc32(view) != member.CRC:
                raise self._damaged(f"the bytes of member {stored.key} have changed since they were written")
        return storage.as_strided(stored.info.shape, stored.stride, stored.offset).contiguous()

    def _with_tensors(self, value: Any) -> Any:
        """Replace the rebuild calls by `StoredTensor`s; containers are walked once, without recursion."""
        holder = [value]
        seen: set[int] = set()
        waiting: list[Any] = [holder]
        while waiting:
            container = waiting.pop()
            if id(container) in seen:
                continue
            seen.add(id(container))
            items = enumerate(container) if isinstance(container, list) else container.items()
            for key, item in list(items):
                if isinstance(item, Inert):
                    item = container[key] = self._tensor(item)
                if isinstance(item, list | dict):
                    waiting.append(item)
                elif isinstance(item, Inert) and isinstance(item.state, dict):
                    waiting.append(item.state)
        return holder[0]

    def _tensor(self, item: Inert) -> Any:
        """A `StoredTensor` for `_rebuild_tensor_v2(storage, offset, size, stride, ...)`; other objects stay inert."""
        if not isinstance(item.kind, Name):
            return item
        if item.kind == Name("torch._utils", "_rebuild_parameter") and item.args and isinstance(item.args[0], Inert):
            return self._tensor(item.args[0])
        if (item.kind.module, item.kind.name) not in _REBUILD:
            return item
        try:
            (persistent, offset, size, stride), *_ = (item.args[:4],)
            tag, kind, key, _, numel = persistent.pid
            dtype = _STORAGES[kind.name]
            member = self._members[key]
            whole = all(type(n) is int and n >= 0 for n in (offset, numel, *size, *stride))
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise self._damaged("a tensor's description is not understood") from error
        well_formed = isinstance(persistent, Persistent) and tag == "storage" and whole and len(size) == len(stride)
        if not well_formed or len(size) > 16 or numel * dtype.itemsize != member.file_size:
            raise self._damaged(f"tensor {str(key)[:40]} does not fit its bytes; the file is cut short or altered")
        info = TensorInfo(tuple(size), dtype)
        last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
        # no view may be larger than its storage (a stride of 0 would make a huge tensor of a few bytes)
        if info.numel > numel or (info.numel and last >= numel):
            raise self._damaged(f"tensor {str(key)[:40]} reaches beyond its bytes")
        return StoredTensor(key, info, offset, tuple(stride))

    def _damaged(self, why: str) -> CheckpointError:
        return CheckpointError(f"{self.path} is damaged or no torch checkpoint: {why}; get the file again.")

    def _errors(self) -> "_Errors":
        return _Errors(self)


class _Errors:
    """What a torn zip makes the library raise, as one sentence."""

    def __init__(self, file: TorchFile):
        self.file = file

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if isinstance(error, CheckpointError) or error is None:
            return
        if isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError):
            raise CheckpointError(f"Cannot read {self.file.path}: {str(error.strerror).lower()}.") from error
        if isinstance(error, zipfile.BadZipFile | EOFError | OSError | ValueError | NotImplementedError | LookupError):
            raise self.file._damaged(" ".join(str(error).split())[:120] or "no zip archive") from error
        if isinstance(error, RuntimeError | struct.error | zlib.error):
            raise self.file._damaged("it is encrypted or not a plain zip") from error


def walk(content: Any, prefix: str = "", *, depth: int = 8) -> Iterator[tuple[str, Any]]:
    """(dotted name, leaf) of nested dicts, as the legacy layout and state dicts nest them."""
    if depth == 0:
        raise CheckpointError("The checkpoint's dicts are nested deeper than any known layout.")
    for key, value in content.items():
        if isinstance(value, dict):
            yield from walk(value, f"{prefix}{key}.", depth=depth - 1)
        else:
            yield f"{prefix}{key}", value


@dataclass(frozen=True, eq=False)
class _Storage:
    key: str
    info: TensorInfo


class _Pickler(pickle.Pickler):
    """Pickles a nest of dicts whose leaves may be `TensorInfo`: each becomes a tensor over a storage of its own."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file, protocol=2)
        self.infos: list[TensorInfo] = []

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, TensorInfo):
            return NotImplemented
        storage = _Storage(str(len(self.infos)), value)
        self.infos.append(value)
        strides = torch.empty(value.shape, device="meta").stride()
        args: tuple[Any, ...] = (storage, 0, value.shape, strides, False, collections.OrderedDict())
        return torch._utils._rebuild_tensor_v2, args

    def persistent_id(self, value: Any) -> Any:
        if not isinstance(value, _Storage):
            return None
        kind = getattr(torch, _STORAGE_NAMES[value.info.dtype])
        return "storage", kind, value.key, "cpu", value.info.numel


class TorchWriter:
    """Writes a torch file whose tensors arrive one by one, in the order in which their `TensorInfo`s are met."""

    def __init__(self, path: Path, content: Any):
        self.path = Path(path)
        buffer = io.BytesIO()
        pickler = _Pickler(buffer)
        pickler.dump(content)
        self._waiting = pickler.infos[::-1]
        self._count = 0
        self._zip = zipfile.ZipFile(self.path, "w", zipfile.ZIP_STORED, allowZip64=True)
        self._root = self.path.stem
        self._add("data.pkl", memoryview(buffer.getvalue()))
        self._add("byteorder", memoryview(b"little"))

    def __enter__(self) -> "TorchWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:
            assert not self._waiting, f"{len(self._waiting)} tensors were not written"
            self._add("version", memoryview(b"3\n"))
        self._zip.close()

    def write(self, tensor: Tensor) -> None:
        """Append the next tensor; it must have the shape and dtype that were announced."""
        info = self._waiting.pop()
        assert (tuple(tensor.shape), tensor.dtype) == (info.shape, info.dtype), (tensor.shape, tensor.dtype, info)
        self._add(f"data/{self._count}", as_bytes(tensor))
        self._count += 1

    def _add(self, name: str, data: memoryview) -> None:
        member = zipfile.ZipInfo(f"{self._root}/{name}")
        large = len(data) > 1 << 30
        member.extra = self._padding(member.filename, large)
        member.file_size = len(data)
        with self._zip.open(member, "w", force_zip64=large) as file:
            for start in range(0, len(data), 1 << 24):
                file.write(data[start : start + (1 << 24)])

    def _padding(self, filename: str, large: bool) -> bytes:
        """An extra field that puts the data at a multiple of 64, so that readers may map it into memory."""
        assert self._zip.fp is not None
        begin = self._zip.fp.tell() + 30 + len(filename.encode()) + (20 if large else 0) + 4
        return struct.pack("<2sH", b"FB", -begin % _ALIGNMENT) + b"Z" * (-begin % _ALIGNMENT)


def is_torch_file(path: Path) -> bool:
    """A zip archive by its first bytes."""
    try:
        with open(path, "rb") as file:
            return file.read(4) == b"PK\x03\x04"
    except OSError:
        return False


def namespace(values: dict[str, Any]) -> argparse.Namespace:
    """The `args` object of a Megatron checkpoint."""
    return argparse.Namespace(**values)
