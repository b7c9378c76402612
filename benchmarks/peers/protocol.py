"""How a benchmark and its contestants talk: one line in, one line of JSON out, so that only one works at a time.

contestant -> {"ready": ..}            model and data are loaded
benchmark  -> step                     take one optimizer step
contestant -> {"step": 1, ...}         it is done
benchmark  -> end
contestant -> {"end": ...}             held-out loss after the last step, peak memory
"""

import argparse
import json
import os
import resource
import sys
import time
from dataclasses import dataclass
from typing import Any

# Everything that libraries print goes to stderr; the lines of the protocol have stdout for themselves.
_OUT = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)


@dataclass
class Task:
    """What every contestant is given."""

    model: str
    data: str
    num_steps: int
    seq_length: int
    global_batch_size: int
    held_out: int
    rank: int
    lr: float
    seed: int


def parse(description: str, **own: Any) -> tuple[Task, argparse.Namespace]:
    """The task and the contestant's own options (name -> default) from the command line."""
    parser = argparse.ArgumentParser(description=description)
    for name, kind in Task.__annotations__.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, required=True)
    for name, default in own.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    values = vars(parser.parse_args())
    return Task(**{name: values.pop(name) for name in Task.__annotations__}), argparse.Namespace(**values)


class Stopped(Exception):
    """The benchmark wants no further step."""


class Contestant:
    """The contestant's end of the line."""

    def __init__(self) -> None:
        self.begun: float | None = None

    def ready(self, **facts: Any) -> None:
        """Everything is loaded."""
        self._say(ready=True, **facts)

    def wait_for_step(self) -> None:
        """Block until the next step is asked for. Raises Stopped."""
        if sys.stdin.readline().strip() != "step":
            raise Stopped
        self.begun = time.perf_counter()

    def step_done(self, **facts: Any) -> None:
        """Report the step that began with the last `wait_for_step`."""
        assert self.begun is not None
        self._say(seconds=time.perf_counter() - self.begun, **facts)
        self.begun = None

    def end(self, **facts: Any) -> None:
        """The last report."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        self._say(end=True, peak_memory_bytes=peak, **facts)

    def _say(self, **message: Any) -> None:
        print(json.dumps(message), file=_OUT, flush=True)


def load_rows(task: Task, tokenizer: Any) -> tuple[Any, Any, Any]:
    """The same tokens in the same order for all: training samples, held-out samples, the plan of global batches."""
    from finerank.data.dataset import load_splits
    from finerank.data.loader import BatchPlan
    from finerank.data.templates import load_template

    settings = data_settings(task)
    splits = load_splits(settings, tokenizer, load_template(settings, tokenizer), seed=task.seed)
    plan = BatchPlan(splits.train, settings, seed=task.seed, num_steps=task.num_steps, pad_token_id=0)
    return splits.train, splits.valid, plan


def data_settings(task: Task) -> Any:
    """finerank's settings of the data."""
    from finerank.data.settings import DataSettings

    return DataSettings(
        data_path=[task.data],
        val_set_size=float(task.held_out),
        seq_length=task.seq_length,
        global_batch_size=task.global_batch_size,
    )


def held_out_loss(model: Any, dataset: Any) -> float:
    """Mean cross-entropy per trained token by transformers alone, row by row."""
    import torch
    from torch.nn import functional as F

    total, tokens = 0.0, 0
    model.eval()
    with torch.no_grad():
        for i in range(len(dataset)):
            ids = torch.from_numpy(dataset.ids(i).astype("int64"))[None]
            labels = torch.from_numpy(dataset.labels(i).astype("int64"))[None]
            logits = model(input_ids=ids).logits[0, :-1].float()
            total += F.cross_entropy(logits, labels[0, 1:], ignore_index=-100, reduction="sum").item()
            tokens += int((labels[0, 1:] != -100).sum())
    return total / tokens
