"""A and B both random, their product zero: A's columns and B's rows lie in orthogonal halves of the rank.

    Q random orthogonal [R, R]     A = (G1 Q_even)^T / 10     B = G2 Q_odd / 10     G1 [I, R/2], G2 [O, R/2] normal

So both factors get gradients from the first step on, and the base is left as it is. PEFT's `orthogonal`; the rank must
be even.

Source: https://datta0.github.io/posts/rethink-lora-init/
"""

import torch

from finerank.adapters.adapter_set import AdapterSet
from finerank.adapters.initial import Options
from finerank.adapters.initial._factors import by_lora_A
from finerank.adapters.inject import named_generator
from finerank.errors import AdapterError


@torch.no_grad()
def start(adapters: AdapterSet, options: Options) -> None:
    """Draw the factors from the run's seed and the layers' names."""
    for layers in by_lora_A(adapters):
        name, first = layers[0]
        if first.rank % 2:
            raise AdapterError(f"--init-lora-weights orthogonal needs even ranks; {name} has {first.rank}.")
        generator = named_generator(options.seed, name)
        q_RR = torch.linalg.qr(torch.randn(first.rank, first.rank, generator=generator)).Q
        a_IR = torch.randn(first.in_features, first.rank // 2, generator=generator) @ q_RR[0::2]
        first.lora_A.copy_(a_IR.T / 10.0)
        for _, layer in layers:
            g_OH = torch.randn(layer.out_features, first.rank // 2, generator=generator)
            layer.lora_B.copy_(g_OH @ q_RR[1::2] / 10.0)
