"""The held-out loss: mean over all trained tokens of the held-out batches, by the same code as the training loss."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from finerank.data.types import Batch
from finerank.errors import DataError
from finerank.models.forward import loss_sum

LossFunction = Callable[[Any, Batch], Tensor]
"""(model, micro-batch on the model's device) -> differentiable fp32 sum of the loss over its trained tokens."""


def batch_loss_sum(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Cross-entropy summed over the trained tokens of one micro-batch; fp32 scalar."""
    return loss_sum(
        model,
        batch.input_ids,
        batch.target_ids,
        batch.position_ids,
        cu_seqlens=batch.cu_seqlens,
        attention_mask=batch.attention_mask,
    )


def evaluate_loss(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    loss_function: LossFunction = batch_loss_sum,
    before_each: Callable[[], None] = lambda: None,
) -> float:
    """Mean loss per trained token without dropout.

    Args:
        model: left in the mode (train or eval) it was in.
        batches: on any device.
        loss_function: sum of the loss over a batch.
        before_each: called before each batch; may raise to stop the evaluation.

    Raises:
        DataError: no token of the batches is trained.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    total, tokens = torch.zeros((), dtype=torch.float64, device=device), 0
    try:
        with torch.no_grad():
            for batch in batches:
                before_each()
                total += loss_function(model, batch.to(device)).double()
                tokens += batch.num_trained_tokens
    finally:
        model.train(was_training)
    if tokens == 0:
        raise DataError("The held-out rows hold no trained token; give other rows, or raise --seq-length.")
    return total.item() / tokens
