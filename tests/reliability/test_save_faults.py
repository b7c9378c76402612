"""Each file operation of a save fails once, with each error, and the process dies at each once: nothing whole is lost.

The operations are enumerated by counting those of an undisturbed save, so none is left out.
"""

import errno
import os
from pathlib import Path

import faults
import pytest
import torch

from finerank.checkpoints import native
from finerank.errors import StorageError
from finerank.files import replace_file

ERRORS = (errno.ENOSPC, errno.EIO, errno.EACCES, errno.EROFS)


def save(run: Path, step: int, value: float) -> None:
    native.save_checkpoint(
        native.folder_of(run, step),
        state={"step": step, "value": value},
        tensors={"parameter/a": torch.full((8, 8), value), "optimizer/a": torch.full((8, 8), -value)},
        write_more=lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"x" * 100),
    )


def operations(run: Path, step: int) -> int:
    with faults.injected(faults.Faults(0, lambda name: None)) as counted:
        save(run, step, 9.0)
    assert {"mkdir", "open for writing", "write", "close", "fsync", "rename"} <= set(counted.names)
    return counted.count


def is_whole(folder: Path, *values: float) -> bool:
    """Undamaged, and all of one state."""
    if native.damage(folder) is not None:
        return False
    read = native.read_checkpoint(folder)
    a, b = read.tensors["parameter/a"], read.tensors["optimizer/a"]
    value = read.state["value"]
    return value in values and bool((a == value).all()) and bool((b == -value).all())


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: errno.errorcode[e])
@pytest.mark.parametrize("replacing", [False, True])
def test_an_error_at_any_operation_leaves_the_last_whole_checkpoint(
    tmp_path: Path, error: int, replacing: bool
) -> None:
    def fail(name: str) -> None:
        raise OSError(error, os.strerror(error))

    total = operations(tmp_path / "counted", 2)
    for at in range(1, total + 1):
        run = tmp_path / f"{at}"
        save(run, 1, 1.0)
        if replacing:
            save(run, 2, 2.0)
        raised = False
        with faults.injected(faults.Faults(at, fail)) as injected:
            try:
                save(run, 2, 3.0)
            except StorageError as failure:
                raised = True
                assert "Cannot write" in str(failure) and str(failure).rstrip(".").count(";") >= 1
        assert injected.count >= at, "the fault was never reached"
        native.tidy_after_kill(run)
        assert is_whole(native.folder_of(run, 1), 1.0), (at, injected.names[at - 1])
        newest = native.newest_whole(run, say=lambda text: None)
        assert newest is not None and is_whole(newest, 1.0, 2.0, 3.0), (at, injected.names[at - 1])
        if not raised:
            assert newest == native.folder_of(run, 2) and is_whole(newest, 3.0), (at, injected.names[at - 1])
        save(run, 2, 4.0)  # the next save works again
        assert is_whole(native.folder_of(run, 2), 4.0)


@pytest.mark.parametrize("replacing", [False, True])
def test_death_at_any_operation_leaves_a_whole_checkpoint(tmp_path: Path, replacing: bool) -> None:
    total = operations(tmp_path / "counted", 2) + (3 if replacing else 0)
    for at in range(1, total + 1):
        run = tmp_path / f"{at}"
        save(run, 1, 1.0)
        if replacing:
            save(run, 2, 2.0)
        child = os.fork()
        if child == 0:
            with faults.injected(faults.Faults(at, lambda name: os._exit(77))):
                save(run, 2, 3.0)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) in (0, 77)
        newest = native.newest_whole(run, say=lambda text: pytest.fail(text))
        assert newest is not None and is_whole(newest, 1.0, 2.0, 3.0), at
        native.tidy_after_kill(run)
        assert {p.name for p in run.iterdir()} <= {"checkpoint-1", "checkpoint-2"}
        save(run, 2, 4.0)
        assert is_whole(native.folder_of(run, 2), 4.0)


def test_death_while_the_only_checkpoint_is_replaced_leaves_it_whole(tmp_path: Path) -> None:
    """As with --keep-last 1 when a stop had saved a step whose evaluation was still to come."""
    total, nameless = operations(tmp_path / "counted", 2) + 3, 0
    for at in range(1, total + 1):
        run = tmp_path / f"{at}"
        save(run, 2, 2.0)
        child = os.fork()
        if child == 0:
            with faults.injected(faults.Faults(at, lambda name: os._exit(77))):
                save(run, 2, 3.0)
            os._exit(0)
        os.waitpid(child, 0)
        nameless += not native.folder_of(run, 2).exists()
        native.tidy_after_kill(run)
        assert is_whole(native.folder_of(run, 2), 2.0, 3.0), at
        assert [p.name for p in run.iterdir()] == ["checkpoint-2"]
    assert nameless, "no death fell between the two renames"


def test_death_at_any_operation_of_pruning_brings_no_checkpoint_back(tmp_path: Path) -> None:
    save(tmp_path / "counted", 1, 1.0)
    with faults.injected(faults.Faults(0, lambda name: None)) as counted:
        native.drop_newer(tmp_path / "counted", 0)
    for at in range(1, counted.count + 1):
        run = tmp_path / f"{at}"
        save(run, 1, 1.0)
        save(run, 2, 2.0)
        child = os.fork()
        if child == 0:
            with faults.injected(faults.Faults(at, lambda name: os._exit(77))):
                native.drop_newer(run, 1)
            os._exit(0)
        os.waitpid(child, 0)
        gone = not native.folder_of(run, 2).exists()
        native.tidy_after_kill(run)
        assert is_whole(native.folder_of(run, 1), 1.0)
        assert gone != native.folder_of(run, 2).exists()


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: errno.errorcode[e])
def test_an_error_at_any_operation_leaves_the_old_file_or_the_new_one(tmp_path: Path, error: int) -> None:
    def fail(name: str) -> None:
        raise OSError(error, os.strerror(error))

    def write(path: Path, text: str) -> None:
        with replace_file(path) as aside:
            aside.write_text(text)

    with faults.injected(faults.Faults(0, fail)) as counted:
        write(tmp_path / "f", "old")
    for at in range(1, counted.count + 1):
        write(tmp_path / "f", "old")
        allowed = ("old", "new")
        with faults.injected(faults.Faults(at, fail)):
            try:
                write(tmp_path / "f", "new")
                allowed = ("new",)  # a failure that did not matter, such as making a folder that is there
            except StorageError as failure:
                assert "Cannot write" in str(failure)
        assert (tmp_path / "f").read_text() in allowed
        assert not list(tmp_path.glob("*aside*"))
