"""All that a run knows besides its tensors, and the seeds of everything random.

A resumed run must go on as if it had never stopped. So nothing depends on how often something was called:

* the rows of a step come from `BatchPlan.rows(step)`, a function of the seed and the step;
* the learning rate is a function of the step;
* every random generator (dropout, and whatever else draws) is seeded anew from (seed, step, micro-batch), so there is
  no generator state to save, and a single micro-batch can be replayed exactly.

What is left is `TrainState`, plus the trained parameters and AdamW's moments.
"""

import dataclasses
import hashlib
import os
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from finerank.errors import CheckpointError


@dataclass(kw_only=True)
class TrainState:
    """Counters of a run; saved as JSON, whose floats come back exactly."""

    step: int = 0
    """Optimizer steps finished (skipped ones counted too)."""
    pending: dict[str, Any] | None = None
    """Metrics row of `step` when its evaluation is still to come: a run stopped in between evaluates first."""
    rows: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    seconds: float = 0.0
    """Time spent in steps and evaluations, over all pieces of the run."""
    first_eval_loss: float | None = None
    last_eval_loss: float | None = None
    last_loss: float | None = None
    best_eval_loss: float | None = None
    best_step: int | None = None
    num_evals_without_better: int = 0
    stopped_early: bool = False
    num_skipped_steps: int = 0
    num_skipped_in_a_row: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TrainState":
        """Back from JSON. Raises CheckpointError when fields are missing or unknown."""
        fields = {f.name for f in dataclasses.fields(cls)}
        if set(values) != fields:
            wrong = sorted(fields ^ set(values))
            raise CheckpointError(
                f"The checkpoint's state has other fields than this finerank ({', '.join(wrong)}); "
                "resume it with the version that wrote it."
            )
        wrong = sorted(f.name for f in dataclasses.fields(cls) if not _is_valid(values[f.name], f.type))
        if wrong:
            raise CheckpointError(
                f"The checkpoint's state has impossible values ({', '.join(wrong)}); resume from another checkpoint."
            )
        return cls(**values)


def _is_valid(value: Any, declared: Any) -> bool:
    """Whether a JSON value can be what a field of TrainState is declared as; counts are never negative."""
    annotation = declared.__name__ if isinstance(declared, type) else str(declared)
    if value is None:
        return "None" in annotation
    if annotation.startswith("dict"):
        return isinstance(value, dict) and type(value.get("step")) is int and value["step"] >= 0
    if annotation.startswith("float"):
        return type(value) in (int, float)
    expected = bool if annotation == "bool" else int
    return type(value) is expected and value >= 0


def parameters_of(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The trained parameters among a checkpoint's (or a replay file's) tensors, by their own names."""
    prefix = "parameter/"
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def load_parameters(parameters: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Copy saved values into trained parameters, by name. Raises CheckpointError when names or shapes differ."""
    if set(tensors) != set(parameters):
        wrong = min(set(tensors) ^ set(parameters))
        raise CheckpointError(f"The saved adapter has other layers than this one (first: {wrong}); use its targets.")
    with torch.no_grad():
        for name, parameter in parameters.items():
            if tensors[name].shape != parameter.shape:
                raise CheckpointError(
                    f"The saved {name} is {tuple(tensors[name].shape)}, here it is {tuple(parameter.shape)}; use the "
                    "--lora-r it was saved with."
                )
            parameter.copy_(tensors[name])


def use_deterministic_kernels(device: torch.device) -> None:
    """On a GPU, only kernels that give the same bits each time; a warning names an operation that has none.

    CPU kernels of torch do that anyway for a fixed number of threads.
    """
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # as torch's notes on randomness ask for
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def seed_everything(*numbers: int) -> None:
    """Seed torch (all devices), numpy and random from whole numbers, e.g. (seed, step, micro-batch)."""
    digest = hashlib.sha256(" ".join(map(str, numbers)).encode()).digest()
    seed = int.from_bytes(digest[:8], "little") >> 1
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
