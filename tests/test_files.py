"""Files and folders appear whole or not at all, and errors of the disk say what to do."""

import errno
import os
from pathlib import Path

import pytest

from finerank import files
from finerank.errors import StorageError


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_a_file_appears_under_its_name_only_when_it_is_whole(tmp_path: Path):
    target = tmp_path / "deep" / "a.txt"
    with files.replace_file(target) as aside:
        aside.write_text("new")
        assert not target.exists() and aside.parent == target.parent
    assert target.read_text() == "new" and names(target.parent) == ["a.txt"]


def test_a_failed_write_leaves_the_old_file_and_no_leftover(tmp_path: Path):
    target = tmp_path / "a.txt"
    target.write_text("old")
    with pytest.raises(RuntimeError), files.replace_file(target) as aside:
        aside.write_text("half")
        raise RuntimeError
    assert target.read_text() == "old" and names(tmp_path) == ["a.txt"]


def test_a_folder_takes_the_place_of_the_old_one_whole(tmp_path: Path):
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").touch()
    with files.replace_folder(target) as aside:
        (aside / "new").write_text("1")
        assert names(target) == ["old"]
    assert names(target) == ["new"] and names(tmp_path) == ["out"]


def test_a_failed_folder_leaves_the_old_one(tmp_path: Path):
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").touch()
    with pytest.raises(KeyboardInterrupt), files.replace_folder(target) as aside:
        (aside / "new").write_text("1")
        raise KeyboardInterrupt
    assert names(target) == ["old"] and names(tmp_path) == ["out"]


@pytest.mark.parametrize(
    ("code", "fix"),
    [
        (errno.ENOSPC, "free space"),
        (errno.EACCES, "you may write to"),
        (errno.EROFS, "read-only"),
        (errno.EDQUOT, "quota"),
        (errno.EIO, "repair the disk"),
    ],
)
def test_errors_of_the_disk_carry_the_fix(tmp_path: Path, code: int, fix: str):
    target = tmp_path / "a"
    with pytest.raises(StorageError, match=fix) as error, files.replace_file(target) as aside:
        aside.touch()
        raise OSError(code, os.strerror(code))
    assert str(target) in str(error.value) and error.value.exit_code == 5
    assert isinstance(error.value, OSError) and names(tmp_path) == []


def test_a_file_in_the_place_of_a_folder_is_a_storage_error(tmp_path: Path):
    (tmp_path / "a").touch()
    with pytest.raises(StorageError, match="Cannot write"):
        files.write_text(tmp_path / "a" / "b", "text")


def test_leftovers_of_killed_writers_are_removed_and_nothing_else(tmp_path: Path):
    aside = files._aside(tmp_path / "checkpoint-3")
    aside.mkdir()
    (aside / "half").touch()
    (tmp_path / "checkpoint-2").mkdir()
    assert files.remove_leftovers(tmp_path) == [aside.name]
    assert names(tmp_path) == ["checkpoint-2"]


def test_discard_folder_removes_it(tmp_path: Path):
    (tmp_path / "a").mkdir()
    files.discard_folder(tmp_path / "a")
    assert names(tmp_path) == []
    with pytest.raises(StorageError):
        files.discard_folder(tmp_path / "a")


def test_sha256_is_the_known_one(tmp_path: Path):
    (tmp_path / "a").write_bytes(b"abc")
    assert files.sha256_file(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_walk_lists_innermost_first(tmp_path: Path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "f").touch()
    assert files.walk(tmp_path) == [
        (tmp_path / "a" / "b", []),
        (tmp_path / "a", [tmp_path / "a" / "f"]),
        (tmp_path, []),
    ]


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("FINERANK_HOME", str(tmp_path))
    assert files.cache_folder() == tmp_path
    monkeypatch.delenv("FINERANK_HOME")
    assert files.cache_folder() == Path.home() / ".cache" / "finerank"
