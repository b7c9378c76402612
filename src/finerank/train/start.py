"""How a run begins: what it trains, on what loss, and the values that its adapters start from.

trained = make_trained(loaded, settings, say=print)          adapters, fresh or of --lora-load; or all weights
local = begin(trained, settings, plan, checkpoint, ...)      their values, or only the shape that a checkpoint's have
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from finerank.adapters.adapter_set import AdapterSet
from finerank.adapters.initial import Pass, shape_adapters, start_adapters
from finerank.adapters.inject import inject_adapters
from finerank.adapters.lora_plus import speed_up_B
from finerank.adapters.lu_lora import LocalLearning, start_local_learning
from finerank.adapters.settings import AdapterSettings
from finerank.checkpoints.combine import described_runs
from finerank.checkpoints.native import Checkpoint
from finerank.checkpoints.place import lacks_alpha, place_adapter
from finerank.checkpoints.quantized_base import bits_of_run
from finerank.data.batch import Batch
from finerank.data.dataset import Splits
from finerank.data.loader import eval_batches
from finerank.data.pairs import PairDataset
from finerank.data.types import IGNORE_INDEX
from finerank.errors import ConfigError
from finerank.models.forward import verified_head
from finerank.models.load import LoadedModel
from finerank.train.held_out import LossFunction, batch_loss_sum
from finerank.train.origin import reference_of_run
from finerank.train.pair_loss import PairLoss
from finerank.train.reference import with_reference
from finerank.train.state import parameters_of
from finerank.train.whole_model import WholeModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from finerank.data.loader import BatchPlan


def choose_loss(settings: Any) -> LossFunction:
    """What `--stage` minimises. Raises ConfigError for settings of the loss that have no effect."""
    return PairLoss(settings) if settings.stage == "dpo" else batch_loss_sum


def held_out_batches(settings: Any, splits: Splits, pad_token_id: int) -> Callable[[], Iterable[Batch]] | None:
    """Makes the held-out batches anew; None without held-out rows. Raises ConfigError for what needs such rows."""
    valid = splits.valid
    if valid is not None:
        return lambda: eval_batches(valid, settings, max_batches=settings.eval_iters, pad_token_id=pad_token_id)
    for name in ("eval_interval", "eval_iters", "early_stopping_patience"):
        if getattr(settings, name) is not None:
            raise ConfigError(
                f"--{name.replace('_', '-')} needs held-out rows; add --val-set-size or --valid-data-path."
            )
    if settings.final_adapter == "best":
        raise ConfigError("--final-adapter best needs held-out rows; add --val-set-size or --valid-data-path.")
    return None


def make_trained(loaded: LoadedModel, settings: Any, *, say: Callable[[str], None]) -> "AdapterSet | WholeModel":
    """What the run trains, in the model. Raises ConfigError, AdapterError."""
    if settings.method == "full":
        return WholeModel(loaded.model)
    if settings.lora_load is None:
        return inject_adapters(loaded.model, settings, seed=settings.seed, token_ids=loaded.new_token_ids)
    folder = Path(settings.lora_load)
    used = {"lora_load", *(["lora_alpha"] if lacks_alpha(folder) else [])}
    for f in dataclasses.fields(AdapterSettings):
        default = f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
        keeps = f.name.startswith(("lu_lora", "cache_boundary", "loraplus")) and f.name != "lu_lora_r"
        if f.name not in used and not keeps and getattr(settings, f.name) != default:
            say(f"warning: --{f.name.replace('_', '-')} has no effect: the adapter of --lora-load has its own")
    trained_on = described_runs([folder])[0].base_digest
    if trained_on not in (None, loaded.source.digest):
        say(f"warning: {folder} was trained on other base weights than those of {loaded.source.name}")
    bits = bits_of_run(folder)
    if bits and trained_on in (None, loaded.source.digest) and not (settings.load_4bit or settings.load_8bit):
        say(
            f"warning: {folder} was trained over a base in {bits} bits; add --load-{bits}bit to go on over the same one"
        )
    if settings.add_tokens:
        raise ConfigError("--add-tokens starts new rows, and the adapter of --lora-load has none; leave one out.")
    return place_adapter(loaded.model, folder, trainable=True, lora_alpha=settings.lora_alpha)


def with_references(
    splits: Splits,
    settings: Any,
    loaded: LoadedModel,
    trained: AdapterSet | WholeModel,
    loss_function: LossFunction,
    *,
    pad_token_id: int,
    say: Callable[[str], None],
) -> Splits:
    """The same rows; pairs with the log-probabilities of the model before training, where the loss compares with them.

    To be called before a checkpoint is restored. Raises NumericsError.
    """
    if not isinstance(loss_function, PairLoss) or not loss_function.needs_reference:
        return splits

    def known(data: PairDataset) -> PairDataset:
        return with_reference(
            loaded.model,
            data,
            settings,
            # all weights, or what goes on from an adapter, are the reference as they are now
            adapters=trained if isinstance(trained, AdapterSet) and settings.lora_load is None else None,
            made_of=reference_of_run(settings, loaded),
            pad_token_id=pad_token_id,
            say=say,
        )

    assert isinstance(splits.train, PairDataset) and isinstance(splits.valid, PairDataset | None)
    return dataclasses.replace(
        splits, train=known(splits.train), valid=None if splits.valid is None else known(splits.valid)
    )


def begin(
    trained: AdapterSet | WholeModel, settings: Any, plan: "BatchPlan", checkpoint: Checkpoint | None
) -> LocalLearning | None:
    """Start what is trained in a new run; what a checkpoint will restore only gets the shape of the saved values.

    An adapter of `--lora-load` is left as it is, and so is a whole model. Returns what learns beside the optimizer, if
    anything does. Raises ConfigError, AdapterError: see `start_adapters`, `start_local_learning`, `speed_up_B`.
    """
    if isinstance(trained, WholeModel):
        return None
    is_fresh = checkpoint is None and settings.lora_load is None
    passes = lambda: forward_passes(trained.model, plan)  # type: ignore[arg-type]  # noqa: E731
    if is_fresh:
        start_adapters(trained, settings, seed=settings.seed, passes=passes)
    elif checkpoint is not None and settings.lora_load is None:
        shape_adapters(trained, settings, parameters_of(checkpoint.tensors))
    local = start_local_learning(trained, settings, lr=settings.lr, seed=plan.seed, passes=passes if is_fresh else None)
    speed_up_B(trained, settings, lr=settings.lr)
    return local


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
