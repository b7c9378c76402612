"""What the training loop is given: which rows a step takes, what is trained, what learns beside the optimizer."""

from collections.abc import Collection, Iterable, Sequence
from typing import Protocol

from torch import Tensor

from finerank.data.batch import Batch


class Plan(Protocol):
    """Which rows a step takes in; see `finerank.data.loader.BatchPlan`."""

    num_steps: int

    def rows(self, step: int) -> list[int]: ...

    def micro_batches(self, step: int) -> list[Batch]: ...


class Trainable(Protocol):
    """What is trained; see `finerank.adapters.inject.AdapterSet`."""

    def named_parameters(self) -> Iterable[tuple[str, Tensor]]: ...


class LocalUpdate(Protocol):
    """What learns by a rule of its own, or at rates of its own; see `finerank.adapters.local_learning`."""

    @property
    def parameters(self) -> Collection[Tensor]: ...

    @property
    def lr_decay_style(self) -> str | None: ...

    @property
    def freeze_after(self) -> int | None: ...

    def begin_step(self, step: int, *, sampled: Sequence[bool], num_rows: Sequence[int]) -> None: ...

    def begin_micro_batch(self, number: int) -> None: ...

    def apply_local_update(self, *, lr_factor: float) -> None: ...
