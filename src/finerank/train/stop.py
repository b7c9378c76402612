"""Stopping in time: signals, and the lock that keeps two runs out of one folder.

    Ctrl-C, SIGTERM   finish the micro-batch, save, exit with 130 or 143
    second Ctrl-C     exit at once (what is on the disk is whole anyway)
    SIGUSR1           save after this step and go on

When saving takes longer than `--grace-seconds`, the process leaves with the checkpoint before.
"""

import contextlib
import errno
import fcntl
import json
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from finerank.errors import CheckpointError, Interrupted
from finerank.files import storage_errors

EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}


class StopSignal(Exception):
    """Not an error but the way out of the loop, raised at the first safe point after a stop was asked for."""


class Signals:
    """A context in which signals set flags that the loop looks at."""

    def __init__(self, *, grace_seconds: float):
        self.grace_seconds = grace_seconds
        self.stop_signal: signal.Signals | None = None
        self._save_asked = False
        self._timer: threading.Timer | None = None
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> "Signals":
        # Python delivers signals to the main thread only; a run inside another thread is stopped by its owner
        if threading.current_thread() is threading.main_thread():
            for number, handler in (
                (signal.SIGINT, self._on_stop),
                (signal.SIGTERM, self._on_stop),
                (signal.SIGUSR1, self._on_save),
            ):
                self._before[number] = signal.signal(number, handler)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        if self._timer is not None:
            self._timer.cancel()

    def check(self) -> None:
        """Raise StopSignal when a stop was asked for."""
        if self.stop_signal is not None:
            raise StopSignal

    def take_save_request(self) -> bool:
        """Whether SIGUSR1 came since the last call."""
        asked, self._save_asked = self._save_asked, False
        return asked

    def interrupted(self, message: str) -> Interrupted:
        """The error to leave the program with; its exit code names the signal."""
        assert self.stop_signal is not None
        error = Interrupted(message)
        error.exit_code = EXIT_CODES[self.stop_signal]
        return error

    def _on_stop(self, number: int, _frame: FrameType | None) -> None:
        if self.stop_signal is not None:
            if number == signal.SIGINT:
                self._leave("stopped at once; go on from the newest whole checkpoint with --resume auto")
            return
        self.stop_signal = signal.Signals(number)
        self._timer = threading.Timer(
            self.grace_seconds,
            self._leave,
            ["the grace time is over; go on from the newest whole checkpoint with --resume auto"],
        )
        self._timer.daemon = True
        self._timer.start()

    def _on_save(self, _number: int, _frame: FrameType | None) -> None:
        self._save_asked = True

    def _leave(self, message: str) -> None:
        assert self.stop_signal is not None
        # no print(): the signal may have come inside a write to the same stream
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"finerank: {message}\n".encode())
        os._exit(EXIT_CODES[self.stop_signal])


def ignore_save_requests() -> None:
    """Until the loop takes SIGUSR1 and after it: there is nothing to save, and by default the signal would kill."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)


@contextlib.contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Hold a run folder for this process. Raises CheckpointError when a living process holds it.

    The lock belongs to the process, not to the file: the kernel drops it when the process dies, however it dies, so the
    file that a killed run left behind is simply taken over.
    """
    path = folder / "run.lock"
    is_new = not folder.exists()
    descriptor = _take(path)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
            if is_new:
                folder.rmdir()  # only when nothing was written: a run that never began leaves no folder
        os.close(descriptor)


def _take(path: Path) -> int:
    while True:
        with storage_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            except FileNotFoundError:
                continue  # another run that never began has just removed the new folder
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = _holder(descriptor)
            os.close(descriptor)
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise CheckpointError(
                    f"{path.parent} is in use by another run{holder}; wait for it, stop it, or choose another "
                    "--output-dir."
                ) from error
            with storage_errors(path):
                raise
        # between open and lock the holder may have finished and removed this file: then lock the new one
        with contextlib.suppress(FileNotFoundError):
            if os.fstat(descriptor).st_ino == os.stat(path).st_ino:
                with contextlib.suppress(OSError):  # on a full disk; the content only tells others who holds the lock
                    os.ftruncate(descriptor, 0)
                    os.write(descriptor, json.dumps({"host": socket.gethostname(), "pid": os.getpid()}).encode())
                return descriptor
        os.close(descriptor)


def _holder(descriptor: int) -> str:
    try:
        content = json.loads(os.pread(descriptor, 1000, 0))
        return f" (process {content['pid']} on {content['host']})"
    except (ValueError, KeyError, TypeError, OSError):
        return ""
