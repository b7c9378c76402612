"""OLoRA: the adapter starts as orthonormal columns of the weight's QR decomposition.

    W = Q R        A0 = R[:r]        B0 = Q[:, :r]        change: scale * (B A - B0 A0)

Source: Bueyuekakyuez, "OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models", 2024;
`peft.tuners.lora.layer.LoraLayer.olora_init`.
"""

import torch

from finerank.adapters.adapter_set import AdapterSet
from finerank.adapters.initial import Options
from finerank.adapters.initial._factors import by_lora_A, set_start, stacked_weight


@torch.no_grad()
def start(adapters: AdapterSet, options: Options) -> None:
    """Set A0 and B0. Raises AdapterError for a rank above that of a weight."""
    for layers in by_lora_A(adapters):
        rank = layers[0][1].rank
        q, r = torch.linalg.qr(stacked_weight(layers))
        set_start(layers, r[:rank], q[:, :rank])
