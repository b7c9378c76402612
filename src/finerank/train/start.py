"""How the adapters of a run begin: fresh, by `--init-lora-weights`, or with the shape that a checkpoint's have."""

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from finerank.adapters.adapter_set import AdapterSet
from finerank.adapters.initial import Pass, shape_adapters, start_adapters
from finerank.adapters.lu_lora import LocalLearning, start_local_learning
from finerank.adapters.settings import AdapterSettings
from finerank.checkpoints.native import Checkpoint
from finerank.data.types import IGNORE_INDEX, Batch
from finerank.models.forward import verified_head
from finerank.train.held_out import batch_loss_sum

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from finerank.data.loader import BatchPlan


def begin(
    adapters: AdapterSet, settings: AdapterSettings, plan: "BatchPlan", checkpoint: Checkpoint | None, *, seed: int
) -> None:
    """Start the adapters of a new run; those of a run to be resumed only get the shape of the saved ones.

    An adapter of `--lora-load` is left as it is.
    """
    if settings.lora_load is not None:
        return
    if checkpoint is not None:
        prefix = "parameter/"
        saved = {k.removeprefix(prefix): t for k, t in checkpoint.tensors.items() if k.startswith(prefix)}
        shape_adapters(adapters, settings, saved)
        return
    start_adapters(adapters, settings, seed=seed, passes=lambda: forward_passes(adapters.model, plan))  # type: ignore[arg-type]


def begin_local(
    adapters: AdapterSet, settings: AdapterSettings, plan: "BatchPlan", checkpoint: Checkpoint | None, *, lr: float
) -> LocalLearning | None:
    """Local learning of a new or a resumed run; only a new one's fresh factors start from the rows.

    Raises ConfigError, AdapterError: see `start_local_learning`.
    """
    is_fresh = checkpoint is None and settings.lora_load is None
    passes = (lambda: forward_passes(adapters.model, plan)) if is_fresh else None  # type: ignore[arg-type]
    return start_local_learning(adapters, settings, lr=lr, seed=plan.seed, passes=passes)


def forward_passes(model: "PreTrainedModel", plan: "BatchPlan") -> Iterator[Pass]:
    """The run's micro-batches, over and over."""
    verified_head(model)  # or else the first pass would begin with its trial
    device = next(model.parameters()).device
    for step in itertools.cycle(range(plan.num_steps)):
        for batch in plan.micro_batches(step):
            on_device = batch.to(device)
            yield Pass(
                trained_BT=trained_tokens(on_device),
                run=lambda b=on_device: batch_loss_sum(model, b),  # type: ignore[misc]
                real_BT=None if on_device.attention_mask is None else on_device.attention_mask.bool(),
            )


def trained_tokens(batch: Batch) -> Tensor:
    """bool [B, T]: tokens whose prediction is trained, at their own place (`target_ids` has them one to the left)."""
    is_target = batch.target_ids != IGNORE_INDEX
    return torch.cat([torch.zeros_like(is_target[:, :1]), is_target[:, :-1]], dim=1)
