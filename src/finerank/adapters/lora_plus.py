"""LoRA+: `lora_B` learns faster than `lora_A`.

    finerank tune ... --loraplus-lr-ratio 16

B starts at zero and A does not, so with one learning rate B's updates are too small for wide layers. The ratio
multiplies the run's learning rate for every backpropagated `lora_B`; PEFT's `create_loraplus_optimizer` groups the same
way. Under the feedback rule of LU-LoRA local B's have a ratio of their own.

Source: Hayou, Ghosh and Yu, "LoRA+: Efficient Low Rank Adaptation of Large Models", 2024, section 4.
"""

import math
from typing import TYPE_CHECKING

from finerank.errors import ConfigError

if TYPE_CHECKING:
    from finerank.adapters.inject import AdapterSet


def speed_up_B(adapters: "AdapterSet", ratio: float | None) -> None:
    """Give each trained `lora_B` the learning-rate ratio, unless it has one. Raises ConfigError for a useless ratio."""
    if ratio is None:
        return
    if not (math.isfinite(ratio) and ratio > 0):
        raise ConfigError(f"--loraplus-lr-ratio must be above 0, not {ratio:g}; 16 is the authors' value.")
    for layer in adapters.layers.values():
        if layer.lora_B.requires_grad:
            adapters.lr_ratios.setdefault(layer.lora_B, ratio)
