"""The parts that a run of tune is made of, found, loaded and put together in the order in which they need each other.

parts = prepare(settings, folder, say=print)
parts.loaded.model, parts.trained, parts.plan
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finerank.adapters.adapter_set import AdapterSet
from finerank.adapters.files import brings_tokens
from finerank.adapters.local_learning import LocalLearning
from finerank.adapters.lu_lora import sample_share
from finerank.checkpoints.native import Checkpoint
from finerank.data.dataset import Splits, load_splits
from finerank.data.loader import BatchPlan
from finerank.data.templates import Template, load_template
from finerank.errors import ConfigError
from finerank.models.attention import use_packed_attention
from finerank.models.forward import verified_head
from finerank.models.fused.fuse import fuse
from finerank.models.load import LoadedModel, load_model
from finerank.models.quantized import num_weights
from finerank.train import resume, start
from finerank.train.fit import choose_split
from finerank.train.held_out import LossFunction, batch_loss_sum, evaluate_loss
from finerank.train.micro_batches import choose_at_once
from finerank.train.sharing import choose_sharing
from finerank.train.state import use_deterministic_kernels
from finerank.train.whole_model import WholeModel

if TYPE_CHECKING:
    from finerank.recipes.tune import Settings


@dataclass(frozen=True, kw_only=True)
class Parts:
    """A run, ready for its first step or for a checkpoint to be restored."""

    settings: "Settings"
    """With what was left open (prompts shared or not, micro-batches) filled in."""
    folder: Path
    loaded: LoadedModel
    num_base_weights: int
    trained: AdapterSet | WholeModel
    local: LocalLearning | None
    """What learns beside the optimizer."""
    loss_function: LossFunction
    template: Template
    splits: Splits
    plan: BatchPlan
    checkpoint: Checkpoint | None
    """What `--resume` found."""
    base_loss: float | None
    """Held-out loss of the base, where the run starts from an adapter and so does not see it."""
    pad_token_id: int


def prepare(settings: "Settings", folder: Path, *, say: Callable[[str], None]) -> Parts:
    """Load everything, and put in place what is trained. Raises the errors of each part."""
    loss_function = start.choose_loss(settings)
    loaded = load_base(settings)
    pad = loaded.tokenizer.pad_token_id or 0  # never attended to nor trained, so any id does
    settings = _speed_up(settings, loaded)
    checkpoint = resume.find_checkpoint(settings.resume, folder, say=say) if settings.resume else None
    template = load_template(settings, loaded.tokenizer)
    splits = load_splits(settings, loaded.tokenizer, template, seed=settings.seed)
    longest = int(splits.train.lengths.max(initial=0))
    at_once = choose_at_once(settings, loaded.model, longest=longest)
    settings = dataclasses.replace(settings, micro_batches_at_once=at_once)
    base_loss = _base_loss(settings, loaded, splits, pad) if loss_function is batch_loss_sum else None
    num_base_weights = num_weights(loaded.model)
    trained = start.make_trained(loaded, settings, say=say)
    # before weights are restored: the head is chosen by comparing outputs, and a resumed run must choose the same
    verified_head(loaded.model)
    if settings.micro_batch_size == "auto":
        own: dict[str, Any] = {"folder": folder, "pad_token_id": pad, "loss_function": loss_function, "say": say}
        own["parameters"] = [p for p in trained.parameters() if p.requires_grad]
        found = choose_split(settings, loaded.model, splits.train, checkpoint, **own)
        settings = dataclasses.replace(settings, **found)
    splits = start.with_references(splits, settings, loaded, trained, loss_function, pad_token_id=pad, say=say)
    plan = BatchPlan(
        splits.train,
        settings,
        seed=settings.seed,
        **_length(settings),
        pad_token_id=pad,
        sample_share=sample_share(settings),
        num_sampled_steps=settings.lu_lora_freeze_after,
    )
    return Parts(
        settings=settings,
        folder=folder,
        loaded=loaded,
        num_base_weights=num_base_weights,
        trained=trained,
        local=start.begin(trained, settings, plan, checkpoint),
        loss_function=loss_function,
        template=template,
        splits=splits,
        plan=plan,
        checkpoint=checkpoint,
        base_loss=base_loss,
        pad_token_id=pad,
    )


def load_base(settings: "Settings") -> LoadedModel:
    """The base model, with new tokens where they are asked for, or those that the starting adapter brings."""
    if settings.lora_load is None or not brings_tokens(Path(settings.lora_load)):
        return load_model(settings, seed=settings.seed, new_tokens=settings.add_tokens)
    if settings.add_tokens:
        raise ConfigError("--add-tokens has no effect: the adapter of --lora-load brings its own tokens; leave it out.")
    own = dataclasses.replace(settings, tokenizer_name_or_path=settings.tokenizer_name_or_path or settings.lora_load)
    return load_model(own, seed=settings.seed, may_grow=True)


def _speed_up(settings: "Settings", loaded: LoadedModel) -> "Settings":
    """Attention, prompts and modules as the run computes them; all but the kernels before anything is put on them."""
    if settings.deterministic:
        use_deterministic_kernels(loaded.model.device)
    if settings.pack:
        use_packed_attention(loaded.model)
    settings = dataclasses.replace(settings, share_prompts=choose_sharing(settings, loaded.model))
    if settings.fused:
        fuse(loaded.model)
    return settings


def _base_loss(settings: "Settings", loaded: LoadedModel, splits: Splits, pad_token_id: int) -> float | None:
    if not settings.lora_load:
        return None
    if settings.micro_batch_size == "auto":  # before the split is found: small ones
        settings = dataclasses.replace(settings, micro_batch_size=None)
    held_out = start.held_out_batches(settings, splits, pad_token_id)
    return evaluate_loss(loaded.model, held_out()) if held_out else None


def _length(settings: "Settings") -> dict[str, Any]:
    if settings.train_iters is not None:
        return {"num_steps": settings.train_iters}
    return {"num_epochs": 1.0 if settings.num_epochs is None else settings.num_epochs}
