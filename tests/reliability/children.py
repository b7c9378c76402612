"""Runs in processes of their own, started in milliseconds: forked, with the libraries imported already.

child = start(fake_run, folder, seconds_per_step=0.01)
os.kill(child.pid, signal.SIGKILL); child.join()
"""

import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # what the first optimizer of a process imports: longer than a whole run here

import train_fakes
from finerank.checkpoints import checksums, native
from finerank.errors import FinerankError
from finerank.train.stop import run_lock

_context = multiprocessing.get_context("fork")


def start(target: Callable[..., int], *args: Any, **kwargs: Any) -> BaseProcess:
    """Start `target` in a process whose exit code is what it returns."""
    child = _context.Process(target=_run, args=(target, args, kwargs))
    child.start()
    return child


def finish(child: BaseProcess, *, timeout_seconds: float = 60) -> int:
    """Wait for a child; its exit code (-9 when it was killed)."""
    child.join(timeout_seconds)
    assert child.exitcode is not None, "the child did not end"
    return child.exitcode


def wait_for(child: BaseProcess, condition: Callable[[], bool], *, timeout_seconds: float = 60) -> None:
    """Poll until a condition holds, while the child lives."""
    end = time.monotonic() + timeout_seconds
    while not condition():
        assert child.is_alive(), f"the child ended with {child.exitcode}"
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.002)


def _run(target: Callable[..., int], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    torch.set_num_threads(1)  # a forked process cannot use the thread pool of its parent
    log = os.environ.get("FINERANK_TEST_LOG")
    if log:
        sys.stderr = open(log, "a", buffering=1)  # noqa: SIM115
    sys.exit(target(*args, **kwargs))


def fake_run(folder: str, *, seconds_per_batch: float = 0.0, seconds_per_save: float = 0.0, **settings: Any) -> int:
    """A run over the fakes that goes on from the newest checkpoint, as `--resume auto` does."""
    run = Path(folder)

    def slow_loss(model: Any, batch: Any) -> Any:
        time.sleep(seconds_per_batch)
        return train_fakes.loss_sum(model, batch)

    def slow_sha256(path: Path) -> str:
        time.sleep(seconds_per_save)
        return real_sha256(path)

    real_sha256, checksums.sha256_file = checksums.sha256_file, slow_sha256  # type: ignore[assignment]
    try:
        with run_lock(run):
            native.tidy_after_kill(run)
            loop = train_fakes.make_loop(run, **settings)
            loop.loss_function = slow_loss
            newest = native.newest_whole(run, say=print)
            if newest is not None:
                loop.restore(native.read_checkpoint(newest))
            loop.run()
    except FinerankError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0
