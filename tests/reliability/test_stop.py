"""Signals and the run lock, in real processes."""

import os
import signal
import threading
from pathlib import Path

import children
import pytest

from finerank.checkpoints import native
from finerank.errors import CheckpointError
from finerank.train.metrics import read_metrics
from finerank.train.stop import run_lock


def started(folder: Path, **settings) -> children.BaseProcess:
    """A child that has finished two steps."""
    child = children.start(children.fake_run, str(folder), **settings)
    children.wait_for(child, lambda: len(read_metrics(folder / "metrics.jsonl")) >= 3)
    return child


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stop_saves_and_says_so_in_the_exit_code(tmp_path: Path, number: int, code: int) -> None:
    child = started(tmp_path, seconds_per_batch=0.01, num_steps=500, keep_best=False)
    os.kill(child.pid, number)
    assert children.finish(child) == code
    newest = native.newest_whole(tmp_path, say=pytest.fail)
    assert newest is not None and native.read_checkpoint(newest).step >= 2
    assert not (tmp_path / "run.lock").exists()


def test_a_second_ctrl_c_leaves_at_once(tmp_path: Path) -> None:
    child = started(tmp_path, seconds_per_batch=0.01, seconds_per_save=30.0, num_steps=500, keep_best=False)
    os.kill(child.pid, signal.SIGINT)
    children.wait_for(child, lambda: any("aside" in p.name for p in tmp_path.iterdir()))  # it is saving
    os.kill(child.pid, signal.SIGINT)
    assert children.finish(child, timeout_seconds=5) == 130
    assert native.newest_whole(tmp_path, say=pytest.fail) is None


def test_a_save_longer_than_the_grace_time_is_given_up(tmp_path: Path) -> None:
    child = started(
        tmp_path, seconds_per_batch=0.01, seconds_per_save=30.0, num_steps=500, keep_best=False, grace_seconds=0.3
    )
    os.kill(child.pid, signal.SIGTERM)
    assert children.finish(child, timeout_seconds=10) == 143


def test_one_folder_has_one_run(tmp_path: Path) -> None:
    child = started(tmp_path, seconds_per_batch=0.01, num_steps=5000, keep_best=False)
    with pytest.raises(CheckpointError, match=f"in use by another run .process {child.pid} on"), run_lock(tmp_path):
        pass
    os.kill(child.pid, signal.SIGKILL)
    assert children.finish(child) == -9
    assert (tmp_path / "run.lock").exists()
    with run_lock(tmp_path):  # the lock of a dead process is taken over
        assert str(os.getpid()) in (tmp_path / "run.lock").read_text()
    assert not (tmp_path / "run.lock").exists()


def test_a_run_outside_the_main_thread_needs_no_signals(tmp_path: Path) -> None:
    done: list[int] = []
    thread = threading.Thread(target=lambda: done.append(children.fake_run(str(tmp_path), num_steps=3)))
    thread.start()
    thread.join()
    assert done == [0]
