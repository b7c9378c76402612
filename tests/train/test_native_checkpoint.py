"""Checkpoints: bit-equal round trip, same bytes for the same state, damage of every kind noticed."""

import json
from pathlib import Path

import pytest
import torch

from finerank.checkpoints import native
from finerank.errors import CheckpointError
from finerank.files import sha256_file

TENSORS = {
    "b": torch.randn(3, 4),
    "a": torch.arange(6, dtype=torch.int64).reshape(2, 3).t(),
    "half": torch.randn(5).to(torch.bfloat16),
    "step": torch.tensor(7.0),
}


def save(run: Path, step: int, *, more: bool = True) -> Path:
    folder = native.folder_of(run, step)
    write = (lambda f: (f / "adapter.txt").write_text("x")) if more else None
    native.save_checkpoint(folder, state={"step": step, "loss": 0.1 + 0.2}, tensors=TENSORS, write_more=write)
    return folder


def test_what_is_read_is_bit_equal_to_what_was_written(tmp_path: Path) -> None:
    read = native.read_checkpoint(save(tmp_path, 7))
    assert read.step == 7 and read.state["loss"] == 0.1 + 0.2
    assert set(read.tensors) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert read.tensors[name].dtype == tensor.dtype and torch.equal(read.tensors[name], tensor), name


def test_same_state_gives_same_bytes(tmp_path: Path) -> None:
    one, two = save(tmp_path / "1", 5), save(tmp_path / "2", 5)
    assert [sha256_file(p) for p in sorted(one.iterdir())] == [sha256_file(p) for p in sorted(two.iterdir())]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("name", ["state.json", "state.safetensors", "manifest.json", "adapter.txt"])
@pytest.mark.parametrize("harm", [cut, flip, Path.unlink])
def test_any_damage_is_noticed_and_the_one_before_taken(tmp_path: Path, name: str, harm) -> None:
    before, newest = save(tmp_path, 4), save(tmp_path, 8)
    if name == "manifest.json" and harm is cut:
        harm = lambda p: p.write_text(p.read_text()[:-9])  # noqa: E731 (the last byte is only a line end)
    harm(newest / name)
    said: list[str] = []
    assert native.newest_whole(tmp_path, say=said.append) == before
    assert len(said) == 1 and said[0].startswith("skipped checkpoint-8: ")
    with pytest.raises(CheckpointError, match="cannot be resumed"):
        native.read_checkpoint(newest)


def test_a_manifest_that_points_outside_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    (tmp_path / "secret").write_text("x")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["../secret"] = {"bytes": 1, "sha256": sha256_file(tmp_path / "secret")}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert "outside" in (native.damage(folder) or "")


def test_pruning_keeps_the_newest_and_the_named(tmp_path: Path) -> None:
    for step in (1, 2, 3, 10, 20):
        save(tmp_path, step, more=False)
    (tmp_path / "checkpoint-final").mkdir()
    native.prune(tmp_path, newest=10, keep_last=1, keep_steps=[2, None])
    assert [s for s, _ in native.checkpoints(tmp_path)] == [2, 10, 20]  # 20 is a stranger's
    assert native.drop_newer(tmp_path, 10) == [20]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-2", "checkpoint-final"]
