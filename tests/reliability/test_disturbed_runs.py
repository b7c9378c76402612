"""What happens around a run while it goes: folders vanish, clocks jump, others start, files are left over."""

import os
import signal
import threading
import time
import weakref
from pathlib import Path
from typing import Any

import children
import pytest

import train_fakes as fakes
from finerank.checkpoints import native
from finerank.errors import CheckpointError, StorageError
from finerank.train import loop as loop_module
from finerank.train.memory import OutOfMemoryError
from finerank.train.metrics import read_metrics
from finerank.train.saver import Saver
from finerank.train.stop import ignore_save_requests, run_lock


def same_bytes(a: Path, b: Path, step: int = 12) -> bool:
    return all(
        (native.folder_of(a, step) / name).read_bytes() == (native.folder_of(b, step) / name).read_bytes()
        for name in ("state.safetensors", "adapter_model.safetensors")
    )


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken")
    fakes.make_loop(folder).run()
    return folder


def stopped_at(folder: Path, step: int, **settings: Any) -> None:
    """A run that was asked to stop while it took step `step` + 1."""
    loop = fakes.make_loop(folder, **settings)
    real = loop._train_step

    def train_step() -> None:
        if loop.state.step == step:
            signal.raise_signal(signal.SIGTERM)
        real()

    loop._train_step = train_step  # type: ignore[method-assign]
    with pytest.raises(Exception, match="stopped after step"):
        loop.run()


def resumed(folder: Path, run: Path | None = None, **settings: Any) -> loop_module.TrainLoop:
    native.tidy_after_kill(folder)
    newest = native.newest_whole(folder, say=pytest.fail)
    assert newest is not None
    loop = fakes.make_loop(run or folder, **settings)
    loop.restore(native.read_checkpoint(newest))
    loop.run()
    return loop


def test_only_one_of_many_runs_started_at_once_gets_the_folder(tmp_path: Path) -> None:
    start = tmp_path / "start"

    def hold(folder: str) -> int:
        while not start.exists():
            time.sleep(0.0005)
        try:
            with run_lock(Path(folder)):
                time.sleep(0.3)
        except CheckpointError:
            return 2
        return 0

    for attempt in range(5):
        folder = tmp_path / f"run{attempt}"
        started = [children.start(hold, str(folder)) for _ in range(8)]
        start.touch()
        codes = sorted(children.finish(child) for child in started)
        assert codes == [0] + [2] * 7
        assert not folder.exists()
        start.unlink()


def test_folders_that_come_and_go_confuse_no_lock(tmp_path: Path) -> None:
    """Runs that never begin remove their new folder again, while others are about to lock it."""
    folder = tmp_path / "run"

    def again_and_again(folder: str) -> int:
        held = 0
        while held < 20:
            try:
                with run_lock(Path(folder)):
                    held += 1
            except CheckpointError:
                pass
        return 0

    started = [children.start(again_and_again, str(folder)) for _ in range(3)]
    assert [children.finish(child) for child in started] == [0, 0, 0]


def test_a_folder_that_vanishes_is_made_again(tmp_path: Path, unbroken: Path) -> None:
    run = tmp_path / "run"
    child = children.start(children.fake_run, str(run), seconds_per_batch=0.01)
    children.wait_for(child, lambda: len(read_metrics(run / "metrics.jsonl")) >= 4)
    run.rename(tmp_path / "elsewhere")
    assert children.finish(child) == 0
    assert same_bytes(run, unbroken)
    assert [row["step"] for row in read_metrics(run / "metrics.jsonl")] == list(range(13))


def test_a_torn_last_line_of_the_metrics_is_written_again(tmp_path: Path, unbroken: Path) -> None:
    stopped_at(tmp_path, 5)
    with open(tmp_path / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 6, "loss": 1.')
    resumed(tmp_path)
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == list(range(13))
    assert same_bytes(tmp_path, unbroken)


def test_a_clock_that_goes_backwards_changes_nothing(
    tmp_path: Path, unbroken: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hours = iter(range(10**9, 0, -3600))
    monkeypatch.setattr(time, "time", lambda: float(next(hours)))
    monkeypatch.setattr(time, "time_ns", lambda: next(hours) * 10**9)
    stopped_at(tmp_path, 5)
    for path in tmp_path.rglob("*"):
        os.utime(path, (2_000_000_000, 2_000_000_000))  # written in the future
    loop = resumed(tmp_path)
    assert same_bytes(tmp_path, unbroken) and loop.state.seconds > 0
    assert all(row["step_seconds"] >= 0 for row in read_metrics(tmp_path / "metrics.jsonl")[1:])


def test_time_and_counters_go_on_where_they_were(tmp_path: Path) -> None:
    stopped_at(tmp_path, 6)
    newest = native.newest_whole(tmp_path, say=pytest.fail)
    assert newest is not None
    before = native.read_checkpoint(newest).state["train"]
    after = resumed(tmp_path).state
    steps = [row["step_seconds"] for row in read_metrics(tmp_path / "metrics.jsonl")[1:]]
    assert before["step"] == 6 and 0 < before["seconds"] < after.seconds
    assert after.seconds >= sum(steps) and after.rows == 2 * before["rows"] == 72


@pytest.mark.parametrize("step", [2, 5, 7])
def test_early_stopping_and_the_best_so_far_survive_a_stop(tmp_path: Path, step: int) -> None:
    settings = {"num_steps": 50, "lr": 5.0, "eval_interval": 1, "early_stopping_patience": 3}
    whole = fakes.make_loop(tmp_path / "whole", **settings)
    whole.run()
    assert whole.state.stopped_early and whole.state.step > 2
    run = tmp_path / "run"
    at = min(step, whole.state.step - 1)
    stopped_at(run, at, **settings)
    loop = resumed(run, **settings)
    for name in ("step", "best_step", "best_eval_loss", "num_evals_without_better", "stopped_early"):
        assert getattr(loop.state, name) == getattr(whole.state, name), name
    loop.load_best()
    whole.load_best()
    assert all((a == b).all() for a, b in zip(*(fakes.weights(x).values() for x in (loop, whole)), strict=True))


def test_a_run_goes_on_in_another_folder_that_is_whole_from_the_first_moment(tmp_path: Path, unbroken: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    stopped_at(first, 5)
    loop = resumed(first, second)
    assert loop.saver.saved[0] == (5, True)
    assert same_bytes(second, unbroken)
    assert [row["step"] for row in read_metrics(second / "metrics.jsonl")] == list(range(13))


def test_a_checkpoint_may_be_a_link_to_another_file_system(tmp_path: Path, unbroken: Path) -> None:
    other = Path("/dev/shm")
    if not other.is_dir() or os.stat(other).st_dev == os.stat(tmp_path).st_dev:
        pytest.skip("no second file system here")
    run, place = tmp_path / "run", other / f"finerank-test-{os.getpid()}"
    place.mkdir()
    try:
        run.symlink_to(place)
        stopped_at(run, 5)
        newest = native.newest_whole(run, say=pytest.fail)
        assert newest is not None
        moved = tmp_path / "moved"
        os.rename(newest, place / "tmp")
        os.system(f"cp -r '{place / 'tmp'}' '{moved}' && rm -r '{place / 'tmp'}'")
        newest.symlink_to(moved)
        resumed(run, keep_last=1)
        assert same_bytes(run, unbroken)
        assert not [p for p in run.iterdir() if p.is_symlink()], "the link was pruned like a folder"
        assert moved.is_dir(), "what a link points to is not ours to remove"
    finally:
        os.system(f"rm -rf '{place}'")


def test_a_strangers_later_checkpoint_costs_the_run_none_of_its_own(tmp_path: Path) -> None:
    child = children.start(
        children.fake_run, str(tmp_path), seconds_per_batch=0.01, save_interval=1, keep_last=1, keep_best=False
    )
    children.wait_for(child, lambda: bool(native.checkpoints(tmp_path)))
    (tmp_path / "checkpoint-999").mkdir()
    assert children.finish(child) == 0
    assert [s for s, _ in native.checkpoints(tmp_path)] == [12, 999]
    assert native.damage(native.folder_of(tmp_path, 12)) is None


def test_a_save_that_could_not_prune_was_a_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def busy(*args: Any, **kwargs: Any) -> None:
        raise StorageError("Cannot write checkpoint-1: device or resource busy; choose another folder.")

    monkeypatch.setattr(native, "prune", busy)
    said: list[str] = []
    saver = Saver(tmp_path, keep_last=1, background=False, say=said.append)
    saver.save((1, True), state={"step": 1}, tensors={}, files={}, keep_steps=[])
    assert saver.saved == [(1, True)] and "could not be removed" in said[0] and "was not saved" not in said[0]


def test_a_bug_in_a_background_save_is_not_swallowed(tmp_path: Path) -> None:
    def broken() -> None:
        raise RuntimeError("a bug")

    saver = Saver(tmp_path, keep_last=1, background=True, say=pytest.fail, before_each=broken)
    saver.save((1, True), state={"step": 1}, tensors={}, files={}, keep_steps=[])
    with pytest.raises(RuntimeError, match="a bug"):
        saver.wait()
    saver.wait()


def test_metrics_reach_the_disk_before_the_checkpoint_that_follows_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    loop = fakes.make_loop(tmp_path, num_steps=2, keep_best=False)
    real_fsync, real_save = os.fsync, native.save_checkpoint

    def fsync(descriptor: int) -> None:
        order.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        real_fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(native, "save_checkpoint", lambda *a, **k: (order.append("save"), real_save(*a, **k)))
    loop.run()
    assert order[order.index("save") - 1] == "metrics.jsonl"


def test_a_save_request_before_or_after_the_loop_kills_nobody() -> None:
    def early(_: str) -> int:
        ignore_save_requests()
        signal.raise_signal(signal.SIGUSR1)
        return 0

    assert children.finish(children.start(early, "")) == 0


def test_a_full_disk_behind_stderr_ends_no_run(tmp_path: Path, unbroken: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")

    def run(folder: str) -> int:
        import sys

        with open("/dev/full", "w") as sys.stderr:
            try:
                return children.fake_run(folder, log_interval=1)
            finally:
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())

    assert children.finish(children.start(run, str(tmp_path))) == 0
    assert same_bytes(tmp_path, unbroken)


def test_a_process_without_a_main_thread_loop_ignores_nothing() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    thread = threading.Thread(target=ignore_save_requests)
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGUSR1) is before


def test_a_save_in_the_background_yields_to_training_and_the_last_one_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not hasattr(os, "sched_getaffinity"):
        pytest.skip("a thread has a priority of its own on Linux only")
    real, seen = native.save_checkpoint, []

    def save_checkpoint(folder: Path, **content: Any) -> None:
        thread = threading.current_thread()
        seen.append((thread is threading.main_thread(), os.getpriority(os.PRIO_PROCESS, threading.get_native_id())))
        real(folder, **content)

    monkeypatch.setattr(native, "save_checkpoint", save_checkpoint)
    own = os.getpriority(os.PRIO_PROCESS, 0)
    stopped_at(tmp_path, 5, async_save=True, save_interval=2, keep_best=False)
    assert len(seen) > 1 and seen[-1] == (True, own)
    assert set(seen[:-1]) == {(False, max(own, 10))}
    assert os.getpriority(os.PRIO_PROCESS, 0) == own


def test_what_ran_out_of_memory_is_given_back_before_the_state_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop, held, alive = fakes.make_loop(tmp_path, keep_best=False), [], []
    loop.held_out = None

    class Activations:
        """Like a graph: only the failed computation holds it, in a cycle."""

        def __init__(self) -> None:
            self.itself = self

    def loss_function(model: Any, batch: Any) -> Any:
        if loop.state.step < 3:
            return fakes.loss_sum(model, batch)
        activations = Activations()
        held.append(weakref.ref(activations))
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    real = native.save_checkpoint

    def save_checkpoint(folder: Path, **content: Any) -> None:
        alive.extend(ref() for ref in held)
        real(folder, **content)

    loop.loss_function = loss_function
    monkeypatch.setattr(native, "save_checkpoint", save_checkpoint)
    with pytest.raises(OutOfMemoryError, match="Out of memory on a micro-batch"):
        loop.run()
    assert alive == [None] and loop.saver.saved[-1] == (3, True)
