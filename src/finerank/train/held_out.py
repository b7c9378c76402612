"""The held-out loss: mean over what the loss counts (trained tokens, or pairs), by the code of the training loss."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from finerank.data.batch import Batch
from finerank.errors import DataError
from finerank.models.forward import loss_sum
from finerank.train.memory import if_it_fits, out_of_memory

LossFunction = Callable[[Any, Batch], Tensor]
"""(model, micro-batch on the model's device) -> differentiable fp32 sum of the loss over its trained tokens."""


class MeasuredLoss(ABC):
    """A loss that counts something else than trained tokens, and measures more than its own value."""

    @abstractmethod
    def __call__(self, model: Any, batch: Batch) -> Tensor:
        """Sum over what it counts; see `LossFunction`."""

    @abstractmethod
    def count(self, batch: Batch) -> int:
        """What the sum is divided by."""

    @abstractmethod
    def begin(self) -> None:
        """Forget what was measured."""

    @abstractmethod
    def measures(self) -> dict[str, float]:
        """Further numbers for the metrics, since `begin`."""


def count_of(loss_function: LossFunction, batch: Batch) -> int:
    """What the loss of a batch is divided by: its trained tokens, unless the loss counts otherwise."""
    return loss_function.count(batch) if isinstance(loss_function, MeasuredLoss) else batch.num_trained_tokens


def measures_of(loss_function: LossFunction, prefix: str = "") -> dict[str, float]:
    """What a loss measured besides its value."""
    found = loss_function.measures() if isinstance(loss_function, MeasuredLoss) else {}
    return {prefix + name: value for name, value in found.items()}


def begin_measuring(loss_function: LossFunction) -> None:
    """Let a loss forget what it measured."""
    if isinstance(loss_function, MeasuredLoss):
        loss_function.begin()


def batch_loss_sum(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Cross-entropy summed over the trained tokens of one micro-batch; fp32 scalar."""
    return loss_sum(model, **batch.inputs)


def evaluate_loss(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    loss_function: LossFunction = batch_loss_sum,
    before_each: Callable[[], None] = lambda: None,
) -> float:
    """Mean loss per trained token (or whatever else the loss counts) without dropout.

    Args:
        model: left in the mode (train or eval) it was in.
        batches: on any device.
        loss_function: sum of the loss over a batch.
        before_each: called before each batch; may raise to stop the evaluation.

    Raises:
        DataError: no token of the batches is trained.
        OutOfMemoryError: a batch does not fit.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    total, tokens = torch.zeros((), dtype=torch.float64, device=device), 0
    begin_measuring(loss_function)
    try:
        with torch.no_grad():
            for batch in batches:
                before_each()
                loss = if_it_fits(loss_function, model, batch.to(device))
                if loss is None:
                    raise out_of_memory(model, batch, device=device)
                total += loss.double()
                tokens += count_of(loss_function, batch)
    finally:
        model.train(was_training)
    if tokens == 0:
        raise DataError("The held-out rows hold no trained token; give other rows, or raise --seq-length.")
    return total.item() / tokens
