"""Where a run is: which of its parts are under way in a forked child, readable by the parent, before and after a kill.

moments = Moments()                      in the parent, before the fork
with moments.told():                     in the child: the parts of `tune` count their beginnings and ends
    cli.main([...])
moments.wait("saving", child)            in the parent: until the child is inside that part
moments.now()                            "saving", also when the child is dead
"""

import contextlib
import importlib
import multiprocessing
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from typing import Any

PARTS = {
    "saving": ("finerank.checkpoints.native", "save_checkpoint"),
    "evaluating": ("finerank.train.loop", "evaluate_loss"),
    "finishing": ("finerank.recipes._leave", "leave"),
    "preprocessing": ("finerank.recipes._prepare", "load_splits"),
    "loading": ("finerank.recipes._prepare", "load_base"),
    "training": ("finerank.train.loop:TrainLoop", "_train_step"),
}
"""By name, the first that is under way names the moment: a save in the background runs beside training."""


class Moments:
    """Counts of the beginnings and ends of each part, in memory that parent and child share."""

    def __init__(self) -> None:
        self._began = multiprocessing.get_context("fork").RawArray("l", len(PARTS))
        self._ended = multiprocessing.get_context("fork").RawArray("l", len(PARTS))

    def clear(self) -> None:
        """Before the next child."""
        self._began[:] = self._ended[:] = [0] * len(PARTS)

    def now(self) -> str:
        """The part that is, or at the death of the child was, under way."""
        under_way = [name for i, name in enumerate(PARTS) if self._began[i] > self._ended[i]]
        return under_way[0] if under_way else "between"

    def wait(self, part: str, child: BaseProcess, *, skip: int = 0) -> bool:
        """Poll until the part has begun for the (`skip` + 1)-th time; False when the child ended before."""
        i = list(PARTS).index(part)
        while child.is_alive():
            if self._began[i] > skip:
                return True
            time.sleep(0.0002)
        return False

    @contextlib.contextmanager
    def told(self) -> Iterator[None]:
        """For the process that trains."""
        before = []
        for i, (place, name) in enumerate(PARTS.values()):
            module, _, attribute = place.partition(":")
            owner: Any = importlib.import_module(module)
            owner = getattr(owner, attribute) if attribute else owner
            before.append((owner, name, getattr(owner, name)))
            setattr(owner, name, self._counted(i, getattr(owner, name)))
        try:
            yield
        finally:
            for owner, name, value in before:
                setattr(owner, name, value)

    def _counted(self, i: int, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self._began[i] += 1
            try:
                return function(*args, **kwargs)
            finally:
                self._ended[i] += 1

        return counted
