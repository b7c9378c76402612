"""The streaming safetensors reader and writer against the library, and against damaged files."""

import json
import random
import struct
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch

from finerank.checkpoints.safetensors_file import DTYPES, SafetensorsReader, SafetensorsWriter
from finerank.checkpoints.weights import TensorInfo, same_bits
from finerank.errors import CheckpointError


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = {str(d): (10 * torch.rand(3, 5, generator=generator)).to(d) for d in DTYPES.values()}
    return {**made, "empty": torch.zeros(0, 7), "scalar": torch.tensor(3.5), "名": torch.ones(2)}


def test_the_library_reads_what_we_write(tmp_path: Path) -> None:
    content = tensors()
    infos = {n: TensorInfo(tuple(t.shape), t.dtype) for n, t in content.items()}
    with SafetensorsWriter(tmp_path / "x.safetensors", infos) as writer:
        for name, tensor in content.items():
            writer.write(name, tensor)
    loaded = safetensors.torch.load_file(tmp_path / "x.safetensors")
    assert set(loaded) == set(content) and all(same_bits(loaded[n], t) for n, t in content.items())
    with safetensors.safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_we_read_what_the_library_writes(tmp_path: Path) -> None:
    content = tensors()
    safetensors.torch.save_file(content, tmp_path / "x.safetensors")
    with SafetensorsReader(tmp_path / "x.safetensors") as reader:
        assert set(reader.entries) == set(content)
        assert all(same_bits(reader.read(n), t) for n, t in content.items())


def with_header(path: Path, header: Any, data: bytes = b"\0" * 16) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(**change: Any) -> dict[str, Any]:
    return {"w": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16], **change}}


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"{",
        b"[]",
        b"[" * 50_000,
        b"\xff\xff",
        entry(dtype="F7"),
        entry(shape=[2, 3]),
        entry(shape=[-2, -2]),
        entry(shape=[2.0, 2]),
        entry(shape="22"),
        entry(shape=[1 << 62, 1 << 62]),
        entry(data_offsets=[0, 32]),
        entry(data_offsets=[16, 0]),
        entry(data_offsets=[-16, 0]),
        entry(data_offsets=[0]),
        {"w": []},
        {"w": None},
        {**entry(), "v": entry()["w"]},
    ],
    ids=lambda h: str(h)[:60],
)
def test_damaged_headers_are_one_error(header: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"x\.safetensors is damaged"):
        SafetensorsReader(with_header(tmp_path / "x.safetensors", header))


def test_huge_announced_headers_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    for length in (1 << 63, 1 << 40, 200_000_000, 0):
        path.write_bytes(struct.pack("<Q", length) + b"{}")
        with pytest.raises(CheckpointError, match="damaged"):
            SafetensorsReader(path)


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file({"w": torch.randn(100)}, path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"x\.safetensors is damaged.*cut short"):
        SafetensorsReader(path)


def test_mutated_files_give_one_error(tmp_path: Path) -> None:
    path, rng = tmp_path / "x.safetensors", random.Random(0)
    safetensors.torch.save_file({"a": torch.randn(4), "b": torch.arange(3)}, path)
    data = path.read_bytes()
    for _ in range(300):
        changed = bytearray(data)
        for _ in range(rng.randint(1, 4)):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        path.write_bytes(changed[: rng.randint(0, len(changed))] if rng.random() < 0.2 else changed)
        try:
            with SafetensorsReader(path) as reader:
                for name in reader.entries:
                    reader.read(name)
        except CheckpointError as error:
            assert "\n" not in str(error)
