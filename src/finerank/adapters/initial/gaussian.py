"""A normal with standard deviation `1 / r`, B zero: PEFT's `gaussian`."""

import torch

from finerank.adapters.adapter_set import AdapterSet
from finerank.adapters.initial import Options
from finerank.adapters.initial._factors import by_lora_A
from finerank.adapters.inject import named_generator


@torch.no_grad()
def start(adapters: AdapterSet, options: Options) -> None:
    """Draw each A from the run's seed and the name of its first layer."""
    for layers in by_lora_A(adapters):
        name, first = layers[0]
        a_RI = torch.randn(first.lora_A.shape, generator=named_generator(options.seed, name))
        first.lora_A.copy_(a_RI / first.rank)
