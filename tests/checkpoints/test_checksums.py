"""A flipped bit in a weight file is found and named, whatever the format."""

import pytest

from finerank.checkpoints.checksums import FILE_NAME, check_checksums, write_checksums
from finerank.errors import CheckpointError


def folder_of(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "model.safetensors").write_bytes(bytes(range(256)) * 8)
    (tmp_path / "deep" / "model_optim_rng.pt").write_bytes(b"weights of a rank")
    (tmp_path / "config.json").write_text("{}")
    write_checksums(tmp_path)
    return tmp_path


def flip(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["model.safetensors", "deep/model_optim_rng.pt"])
def test_a_flipped_bit_is_named(tmp_path, name):
    folder = folder_of(tmp_path)
    check_checksums(folder)
    flip(folder / name, 7)
    with pytest.raises(CheckpointError, match=f"{name} has changed since it was written"):
        check_checksums(folder)
    flip(folder / name, 7)
    check_checksums(folder)


def test_missing_and_cut_files_are_named(tmp_path):
    folder = folder_of(tmp_path)
    (folder / "model.safetensors").write_bytes(b"short")
    with pytest.raises(CheckpointError, match=r"model\.safetensors is cut short"):
        check_checksums(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors is missing"):
        check_checksums(folder)


def test_text_files_may_be_edited(tmp_path):
    folder = folder_of(tmp_path)
    (folder / "config.json").write_text('{"edited": true}')
    check_checksums(folder)


@pytest.mark.parametrize(
    "text", ["", "[]", '{"files": 3}', '{"files": {"../x": {}}}', '{"files": {"model.safetensors": 1}}', "[" * 100000]
)
def test_a_damaged_list_is_one_sentence(tmp_path, text):
    folder = folder_of(tmp_path)
    (folder / FILE_NAME).write_text(text)
    with pytest.raises(CheckpointError):
        check_checksums(folder)


def test_a_folder_of_others_is_taken_as_it_is(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"x")
    check_checksums(tmp_path)
    assert not (tmp_path / FILE_NAME).exists()
