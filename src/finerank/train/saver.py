"""Saving checkpoints while training goes on, at once or in the background; a failed save never ends a run.

In the background, `save` copies the state and returns; a thread writes the copy. So what is written is the state of one
step, whole, however far training has gone meanwhile. At most one save is on its way: the next one waits for it.
"""

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from finerank.checkpoints import native
from finerank.errors import StorageError


class Saver:
    """Writes the checkpoints of one run folder and removes those not to be kept."""

    def __init__(
        self,
        run: Path,
        *,
        keep_last: int,
        background: bool,
        say: Callable[[str], None],
        before_each: Callable[[], None] = lambda: None,
    ):
        """
        Args:
            run: folder that holds the checkpoints.
            keep_last: newest checkpoints to keep.
            background: copy the state and write the copy while training goes on.
            say: is told of a save that failed.
            before_each: brings to the disk what must be there before a checkpoint says that it happened.
        """
        self.run = run
        self.before_each = before_each
        self.keep_last = keep_last
        self.background = background
        self.say = say
        self.saved: list[tuple[int, bool]] = []
        """(step, whether its evaluation is in it) of each whole save, oldest first."""
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def save(
        self,
        key: tuple[int, bool],
        *,
        state: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        files: Mapping[str, bytes],
        keep_steps: Iterable[int | None],
    ) -> None:
        """Save the state of one step, unless the same was saved before. A failure is said, not raised.

        Args:
            key: the step and whether its evaluation is done.
            state: JSON values with `step`.
            tensors: parameters and moments; copied before this returns when saving in the background.
            files: further files of the checkpoint by name.
            keep_steps: steps whose checkpoints are kept besides the newest.
        """
        self.wait()
        if key in self.saved:
            return
        kept = list(keep_steps)
        if not self.background:
            self._write(key, state, tensors, files, kept)
            return
        copies = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
        # not a daemon: the interpreter waits for it, so that leaving normally never drops a save
        self._thread = threading.Thread(target=self._write_aside, args=(key, dict(state), copies, files, kept))
        self._thread.start()

    def wait(self) -> None:
        """Until the save in the background, if any, has ended. Raises what ended it, unless it was the disk."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _write_aside(self, *args: Any) -> None:
        _yield_to_training()
        try:
            self._write(*args)
        except BaseException as error:
            self._failure = error

    def _write(
        self,
        key: tuple[int, bool],
        state: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        files: Mapping[str, bytes],
        keep_steps: list[int | None],
    ) -> None:
        def write_files(folder: Path) -> None:
            for name, content in sorted(files.items()):
                (folder / name).write_bytes(content)

        step = key[0]
        try:
            self.before_each()
            native.save_checkpoint(
                native.folder_of(self.run, step), state=state, tensors=tensors, write_more=write_files
            )
        except StorageError as error:
            whole = f"checkpoint-{self.saved[-1][0]} stays" if self.saved else "there is none yet"
            self.say(f"warning: the checkpoint of step {step} was not saved; {whole}. {error}")
            return
        self.saved.append(key)
        try:
            native.prune(self.run, newest=step, keep_last=self.keep_last, keep_steps=keep_steps)
        except StorageError as error:
            self.say(f"warning: an older checkpoint than that of step {step} could not be removed. {error}")


def _yield_to_training() -> None:
    """Let this thread compute only while the threads of a step leave a core alone; whoever waits for it does."""
    if sys.platform == "linux":  # elsewhere a priority belongs to the process
        me = threading.get_native_id()
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, me, max(10, os.getpriority(os.PRIO_PROCESS, me)))
