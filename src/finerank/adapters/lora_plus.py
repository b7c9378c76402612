"""LoRA+: `lora_B` learns faster than `lora_A`.

    finerank tune ... --loraplus-lr-ratio 16

B starts at zero and A does not, so with one learning rate B's updates are too small for wide layers. Parameters are
grouped as PEFT's `create_loraplus_optimizer` groups them:

    lora_B, and vectors (DoRA's magnitudes, norms that are saved whole)      ratio * lr
    factors of an embedding                                                  --loraplus-lr-embedding, 1e-6
    everything else                                                          lr

The embedding's rate follows the run's schedule like the others. Under LU-LoRA's feedback rule local B's have a ratio of
their own.

Source: Hayou, Ghosh and Yu, "LoRA+: Efficient Low Rank Adaptation of Large Models", 2024, section 4.
"""

import math
from typing import TYPE_CHECKING

from finerank.adapters.embedding import LoRAEmbedding
from finerank.errors import ConfigError

if TYPE_CHECKING:
    from finerank.adapters.inject import AdapterSet
    from finerank.adapters.settings import AdapterSettings

LR_EMBEDDING = 1e-6


def speed_up_B(adapters: "AdapterSet", settings: "AdapterSettings", *, lr: float) -> None:
    """Give the parameters their learning rates over the run's `lr`, unless they have one.

    Raises ConfigError for a useless ratio, and for a rate that has no effect.
    """
    ratio, of_embedding = settings.loraplus_lr_ratio, settings.loraplus_lr_embedding
    embeddings = [part for part in adapters.parts.values() if isinstance(part, LoRAEmbedding)]
    if of_embedding is not None and (ratio is None or not embeddings):
        why = "without --loraplus-lr-ratio" if ratio is None else "where no embedding has a low-rank adapter"
        raise ConfigError(f"--loraplus-lr-embedding has no effect {why}; leave it out.")
    if ratio is None:
        return
    if not (math.isfinite(ratio) and ratio > 0):
        raise ConfigError(f"--loraplus-lr-ratio must be above 0, not {ratio:g}; 16 is the authors' value.")
    if of_embedding is not None and not (math.isfinite(of_embedding) and of_embedding > 0):
        raise ConfigError(f"--loraplus-lr-embedding must be above 0, not {of_embedding:g}; 1e-6 is the authors' value.")
    for part in embeddings:
        for factor in part.trained().values():
            adapters.lr_ratios[factor] = (LR_EMBEDDING if of_embedding is None else of_embedding) / lr if lr else 1.0
    for name, parameter in adapters.named_parameters():
        is_fast = name.endswith(".lora_B.weight") or parameter.ndim == 1
        if is_fast and parameter.requires_grad:
            adapters.lr_ratios.setdefault(parameter, ratio)
