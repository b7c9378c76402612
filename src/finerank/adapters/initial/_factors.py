"""What several starts need: layers by their lora_A, their weights, and setting A0 and B0.

Shapes: I in_features, O out_features (of all layers of a shared lora_A together), R rank.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from finerank.adapters.adapter_set import AdapterSet
from finerank.adapters.lora import LoRALinear
from finerank.adapters.low_rank import weight_OI
from finerank.errors import AdapterError

Layers = list[tuple[str, LoRALinear]]
"""Name and layer, in the model's order."""


def by_lora_A(adapters: AdapterSet) -> list[Layers]:
    """The layers in groups that share one lora_A; mostly groups of one."""
    groups: dict[int, Layers] = {}
    for name, layer in adapters.layers.items():
        groups.setdefault(id(layer.lora_A), []).append((name, layer))
    return list(groups.values())


def stacked_weight(layers: Layers) -> Tensor:
    """The weights of a group, one below the other, fp32 [O, I]. Raises AdapterError where the rank is above theirs."""
    weight = torch.cat([weight_OI(layer.base_layer).float() for _, layer in layers])
    name, first = layers[0]
    if first.rank > min(weight.shape):
        raise AdapterError(
            f"{name} has only {min(weight.shape)} components to start from, below the rank {first.rank}; lower its "
            "rank, or use --init-lora-weights default."
        )
    return weight


def set_start(layers: Layers, a_RI: Tensor, b_OR: Tensor) -> None:
    """Let a group start from `a_RI` and its rows of `b_OR`, so that only what training changes counts."""
    first = layers[0][1]
    pieces = b_OR.split([layer.out_features for _, layer in layers])
    add_start(layers)
    for (_, layer), piece in zip(layers, pieces, strict=True):
        assert layer.start_A is not None and layer.start_B is not None
        layer.start_A.data.copy_(a_RI)
        layer.start_B.data.copy_(piece * (first.scale / layer.scale))
        layer.lora_A.data.copy_(layer.start_A)
        layer.lora_B.data.copy_(layer.start_B)


def add_start(layers: Layers) -> None:
    """Give a group that shares a lora_A a start of zeros."""
    shared = nn.Parameter(torch.zeros_like(layers[0][1].lora_A), requires_grad=False)
    for _, layer in layers:
        layer.start_A = shared
        layer.start_B = nn.Parameter(torch.zeros_like(layer.lora_B), requires_grad=False)


@contextlib.contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Global random state from `seed` inside the block, and as it was afterwards."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
