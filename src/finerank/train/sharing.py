"""Whether a run computes prompts once that several rows of a pack begin with; see `data.shared_prompts`.

    settings = dataclasses.replace(settings, share_prompts=choose_sharing(settings, model))

What is computed stays the same, up to rounding, unless something draws random numbers for each token or counts tokens.
On a GPU the gain is not measured yet, so it is off there unless asked for.
"""

from typing import Protocol

from transformers import PreTrainedModel

from finerank.errors import ConfigError
from finerank.models.attention import can_share_prompts

_COUNTING_RULES = ("mindspeed", "oja")
"""Local rules that learn from every token of every row."""


class SharingSettings(Protocol):
    """The settings that decide."""

    share_prompts: bool | None
    pack: bool
    lora_dropout: float
    lu_lora_final_layer_index: int | None
    lu_lora_rule: str
    cache_boundary: bool


def choose_sharing(settings: SharingSettings, model: PreTrainedModel) -> bool:
    """The value of `--share-prompts`, or the best one where it is not given.

    Raises:
        ConfigError: asked for, and not possible.
    """
    if settings.share_prompts is False or (settings.share_prompts is None and model.device.type != "cpu"):
        return False
    obstacle = _obstacle(settings, model)
    if obstacle and settings.share_prompts:
        raise ConfigError(f"--share-prompts is not possible: {obstacle}; leave it out.")
    return obstacle is None


def _obstacle(settings: SharingSettings, model: PreTrainedModel) -> str | None:
    if not settings.pack:
        return "with --no-pack every row is computed by itself"
    attention_dropout: float = getattr(model.config.get_text_config(), "attention_dropout", 0.0)
    if settings.lora_dropout > 0 or attention_dropout > 0:
        return "dropout is drawn for each row by itself"
    if settings.cache_boundary:
        return "--cache-boundary stores whole rows"
    if settings.lu_lora_final_layer_index is not None and settings.lu_lora_rule in _COUNTING_RULES:
        return f"--lu-lora-rule {settings.lu_lora_rule} learns from every token of every row"
    if not can_share_prompts(model):
        return f"{type(model).__name__} gives other hidden states then"
    return None
