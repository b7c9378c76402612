"""Foreign pickles: real ones are read bit for bit, hostile and broken ones end in one error and execute nothing."""

import argparse
import collections
import enum
import io
import os
import pickle
import random
import struct
import subprocess
import types
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finerank.checkpoints import pickles
from finerank.checkpoints.formats import mcore
from finerank.checkpoints.pickles import Inert, Name
from finerank.checkpoints.torch_file import StoredTensor, TorchFile, TorchWriter, namespace, walk
from finerank.checkpoints.weights import TensorInfo, same_bits
from finerank.errors import CheckpointError


class Colour(enum.Enum):
    RED = 1


class Runs:
    """Runs a command when a real unpickler loads it."""

    def __init__(self, *call: Any):
        self.call = call

    def __reduce__(self) -> Any:
        return self.call[0], self.call[1:]


def rich() -> dict[str, Any]:
    """What real Megatron checkpoints hold besides tensors."""
    return {
        "args": argparse.Namespace(a=1, b=[1, 2], c=None, dtype=torch.bfloat16, colour=Colour.RED, path=Path("x")),
        "nested": {"deep": {"w": torch.randn(3, 4)}},
        "rng_state": [{"np": np.random.default_rng(0).random(3), "scalar": np.float64(2.5), "set": {1, 2}}],
        "config": types.SimpleNamespace(x=(1, (2, 3)), y=frozenset([1])),
        "model": collections.OrderedDict(half=torch.randn(5).half(), view=torch.arange(20).reshape(4, 5).T[1:3]),
        "default": collections.defaultdict(dict, {"q": {"w": torch.zeros(0, 3)}}),
        "parameter": torch.nn.Parameter(torch.randn(2, 2)),
        "big": 2**70,
        "bytes": b"abc",
    }


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_real_objects_are_read_bit_for_bit(protocol: int, tmp_path: Path) -> None:
    saved = rich()
    torch.save(saved, tmp_path / "x.pt", pickle_protocol=protocol)
    file = TorchFile(tmp_path / "x.pt")
    tensors = {name: v for name, v in walk(file.content) if isinstance(v, StoredTensor)}
    expected = {name: v for name, v in walk(saved) if isinstance(v, torch.Tensor)}
    assert set(tensors) == set(expected)
    for name, tensor in expected.items():
        assert same_bits(file.read(tensors[name]), tensor.detach().contiguous()), name
    attributes = file.content["args"].attributes()
    assert (attributes["a"], attributes["b"], attributes["c"]) == (1, [1, 2], None)
    assert attributes["dtype"] == Name("torch", "bfloat16")
    assert isinstance(attributes["colour"], Inert)
    assert (file.content["big"] == 2**70 and file.content["bytes"] in (b"abc", "abc")) or protocol == 2


def test_written_files_are_read_by_torch(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 5), "b": torch.randn(7).bfloat16(), "c": torch.zeros(0, 4), "d": torch.arange(5)}
    infos = {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in tensors.items()}
    with TorchWriter(tmp_path / "x.pt", {"args": namespace({"k": [1, "x"]}), "model": infos}) as writer:
        for tensor in tensors.values():
            writer.write(tensor)
    with torch.serialization.safe_globals([argparse.Namespace]):
        for mmap in (False, True):
            loaded = torch.load(tmp_path / "x.pt", weights_only=True, mmap=mmap)
            assert vars(loaded["args"]) == {"k": [1, "x"]}
            assert all(same_bits(loaded["model"][n], t) for n, t in tensors.items())
    ours = TorchFile(tmp_path / "x.pt")
    assert all(same_bits(ours.read(ours.content["model"][n]), t) for n, t in tensors.items())


def with_pickle(path: Path, data: bytes, **members: bytes) -> Path:
    """A torch file around any pickle."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", data)
        archive.writestr("x/version", "3\n")
        for name, content in members.items():
            archive.writestr(f"x/data/{name}", content)
    return path


def as_rank(folder: Path, data: bytes) -> Path:
    """A Megatron checkpoint whose only rank holds this pickle."""
    rank = folder / "iter_0000001" / "mp_rank_00"
    rank.mkdir(parents=True, exist_ok=True)
    (folder / "latest_checkpointed_iteration.txt").write_text("1")
    with_pickle(rank / "model_optim_rng.pt", data)
    return folder


def hostile(marker: Path) -> list[bytes]:
    """Pickles that write `marker` when a real unpickler loads them."""
    command = f"touch {marker}"
    objects = [
        Runs(os.system, command),
        Runs(eval, f"open({str(marker)!r}, 'w')"),
        Runs(subprocess.getoutput, command),
        {"model": {"w": Runs(os.system, command)}},
        [Runs(__import__, "antigravity")],
    ]
    handmade = [
        b"cos\nsystem\n(S'" + command.encode() + b"'\ntR.",
        b"(S'" + command.encode() + b"'\nios\nsystem\n.",  # INST
        b"(cos\nsystem\nS'" + command.encode() + b"'\no.",  # OBJ
        b"\x80\x02cargparse\nNamespace\n)\x81}(X\x08\x00\x00\x00__dict__cos\nsystem\nub.",
        b"\x80\x04\x8c\x08builtins\x8c\x04exec\x93\x8c\x04x=1 \x85R.",
    ]
    return [pickle.dumps(o, protocol=p) for o in objects for p in (0, 1, 2, 4)] + handmade


def test_hostile_pickles_execute_nothing(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    for data in hostile(marker):
        try:
            pickles.load(data, "x")
        except CheckpointError as error:
            assert str(error).startswith("x is damaged")
        with pytest.raises(CheckpointError):
            mcore.read(as_rank(tmp_path / "mg", data))
    assert not marker.exists()
    pickle.loads(hostile(marker)[0])  # the same bytes do run elsewhere
    assert marker.exists()


def test_imports_nothing(tmp_path: Path) -> None:
    (tmp_path / "evil_module.py").write_text("raise SystemExit('imported')")
    loaded = pickles.load(b"\x80\x02cevil_module\nThing\n)R.", "x")
    assert isinstance(loaded, Inert) and loaded.kind == Name("evil_module", "Thing")


BOMBS = {
    "deep lists": b"]" * 60_000 + b"a" * 59_999 + b".",
    "deep tuples as a key": b"}" + b")" + b"\x85" * 60_000 + b"K\x01s.",
    "doubling": b"]q\x00" + b"".join(b"(h%ch%cl\x94" % (0, 0) for _ in range(10)) + b".",
    "endless memo": b"\x80\x04N" + b"\x94" * 100_000 + b".",
    "huge announced string": b"\x80\x04\x8d" + struct.pack("<Q", 1 << 62) + b"x.",
    "huge announced bytes": b"\x80\x04\x8e" + struct.pack("<Q", (1 << 63) - 1) + b"x.",
    "huge number": b"L" + b"9" * 100_000 + b"L\n.",
    "huge bytearray": b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b".",
    "no stop": b"\x80\x02N",
    "empty": b"",
    "two results": b"NN.",
    "a mark left": b"(.",
    "append to a number": b"K\x01K\x02a.",
    "unhashable key": b"}]Ns.",
    "build on a dict": b"}}b.",
    "extension": b"\x80\x02\x82\x01.",
    "next buffer": b"\x80\x05\x97.",
    "persistent id in text": b"Pabc\n.",
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_end_quickly(name: str) -> None:
    try:
        pickles.load(BOMBS[name], "x")
    except CheckpointError as error:
        assert "x is damaged" in str(error)


def rebuild(key: str = "0", *, offset: Any = 0, size: Any = (2, 2), stride: Any = (2, 1), numel: Any = 4) -> bytes:
    """A pickle of one tensor with any description."""

    class Fake:
        def __reduce__(self) -> Any:
            return torch._utils._rebuild_tensor_v2, (Storage(), offset, size, stride, False, {})

    class Storage:
        pass

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: Any) -> Any:
            return ("storage", torch.FloatStorage, key, "cpu", numel) if isinstance(value, Storage) else None

    buffer = io.BytesIO()
    Pickler(buffer, protocol=2).dump({"w": Fake()})
    return buffer.getvalue()


def test_a_well_described_tensor_is_read(tmp_path: Path) -> None:
    values = np.arange(4, dtype=np.float32)
    file = TorchFile(with_pickle(tmp_path / "x.pt", rebuild(), **{"0": values.tobytes()}))
    assert torch.equal(file.read(file.content["w"]), torch.from_numpy(values).reshape(2, 2))


@pytest.mark.parametrize(
    "change",
    [
        {"offset": 1},
        {"offset": -1},
        {"size": (1 << 40, 1 << 40)},
        {"size": (1 << 40, 2), "stride": (0, 0)},
        {"stride": (2, -1)},
        {"stride": (100, 1)},
        {"size": (2,)},
        {"size": (-1, 2)},
        {"size": (True, 2)},
        {"size": ("2", 2)},
        {"size": None},
        {"numel": 1 << 40},
        {"numel": 3},
        {"key": "1"},
        {"key": "../../version"},
    ],
    ids=str,
)
def test_tensors_that_reach_beyond_their_bytes_are_refused(change: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"x\.pt is damaged"):
        TorchFile(with_pickle(tmp_path / "x.pt", rebuild(**change), **{"0": b"\0" * 16}))


def test_compressed_and_foreign_archives_are_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", b"\0" * 10_000_000)
    (tmp_path / "text.pt").write_text("hello")
    torch.save({"w": torch.zeros(2)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with zipfile.ZipFile(tmp_path / "other.pt", "w") as archive:
        archive.writestr("readme.txt", "hi")
    for path in sorted(tmp_path.glob("*.pt")):
        with pytest.raises(CheckpointError, match=path.name):
            TorchFile(path)
    with pytest.raises(CheckpointError, match="no such file"):
        TorchFile(tmp_path / "absent.pt")


def _golden() -> bytes:
    buffer = io.BytesIO()
    torch.save(rich(), buffer, pickle_protocol=4)
    return zipfile.ZipFile(buffer).read("archive/data.pkl")


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=80))
def test_random_bytes_give_one_error(data: bytes) -> None:
    try:
        pickles.load(data, "x")
    except CheckpointError as error:
        assert "\n" not in str(error)


def mutated(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.randint(1, 6)):
        kind, at = rng.randrange(4), rng.randrange(len(changed))
        if kind == 0:
            changed[at] = rng.randrange(256)
        elif kind == 1:
            del changed[at : at + rng.randint(1, 20)]
        elif kind == 2:
            changed[at:at] = bytes(rng.randrange(256) for _ in range(rng.randint(1, 8)))
        else:
            other = rng.randrange(len(changed))
            changed[at : at + 8] = changed[other : other + 8]
        if not changed:
            return b"."
    return bytes(changed)


def fuzz_pickles(count: int, seed: int) -> None:
    rng, data = random.Random(seed), _golden()
    for _ in range(count):
        try:
            pickles.load(mutated(data, rng), "x")
        except CheckpointError as error:
            assert "\n" not in str(error)


def fuzz_files(count: int, seed: int, folder: Path) -> None:
    rng = random.Random(seed)
    torch.save(
        {"model": {"w": torch.randn(4, 4), "v": torch.arange(6)}, "args": argparse.Namespace(a=1)}, folder / "x.pt"
    )
    data = (folder / "x.pt").read_bytes()
    for _ in range(count):
        (folder / "x.pt").write_bytes(mutated(data, rng))
        try:
            file = TorchFile(folder / "x.pt")
            for _, value in walk(file.content) if isinstance(file.content, dict) else ():
                if isinstance(value, StoredTensor):
                    assert file.read(value).numel() <= 16
        except CheckpointError as error:
            assert str(folder) in str(error) or "nested" in str(error)


def test_mutated_pickles_give_one_error() -> None:
    fuzz_pickles(800, seed=0)


def test_mutated_files_give_one_error(tmp_path: Path) -> None:
    fuzz_files(300, seed=0, folder=tmp_path)


@pytest.mark.long
def test_a_hundred_thousand_mutations(tmp_path: Path) -> None:
    fuzz_pickles(70_000, seed=1)
    fuzz_files(30_000, seed=1, folder=tmp_path)
