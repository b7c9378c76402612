"""Other ranks for adapters that are in place, and adapters shaped as a checkpoint has them."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from finerank.adapters.adapter_set import FILE_PREFIX, AdapterSet
from finerank.adapters.initial._factors import add_start, by_lora_A
from finerank.adapters.inject import join_shared_inputs
from finerank.adapters.shapes import by_pattern, shape_of
from finerank.adapters.targets import Target, matches_suffix, peft_target_modules


def set_ranks(adapters: AdapterSet, ranks: Mapping[str, int]) -> None:
    """Give layers other ranks, with factors of zeros; layers of rank 0 lose their adapter.

    `alpha` changes with the rank, so that `alpha / r` stays as it was, as in PEFT's EVA (`adjust_scaling_factors`).

    Args:
        adapters: changed in place, its config too.
        ranks: by layer name; layers that share a lora_A have one rank.
    """
    config = adapters.config
    alphas = {}
    for name, rank in ranks.items():
        old = shape_of(config, name).rank
        alpha = by_pattern(config["alpha_pattern"], name, config["lora_alpha"])
        alphas[name] = alpha if rank == old else alpha * (rank / old)
    for layers in by_lora_A(adapters):
        rank = ranks[layers[0][0]]
        shared = nn.Parameter(layers[0][1].lora_A.new_zeros(rank, layers[0][1].in_features))
        for name, layer in layers:
            if layer.shared_input is not None:
                layer.shared_input.dissolve()
            if rank == 0:
                adapters.remove_layer(name)
            elif rank != layer.rank:
                layer.lora_A = shared
                layer.lora_B = nn.Parameter(layer.lora_B.new_zeros(layer.out_features, rank))
    kept = {name: ranks[name] for name in adapters.layers}
    config["rank_pattern"] = {name: rank for name, rank in kept.items() if rank != config["r"]}
    config["alpha_pattern"] = {name: alphas[name] for name in kept if alphas[name] != config["lora_alpha"]}
    if len(kept) < len(ranks):
        before = config["target_modules"]
        others = [name for name in adapters.parts if any(matches_suffix(name, target) for target in before)]
        config["target_modules"] = [*peft_target_modules(adapters.model, [Target(name) for name in kept]), *others]
    for name, layer in adapters.layers.items():
        layer.scale = shape_of(config, name).scale
    join_shared_inputs(adapters.layers)


def shape_as(adapters: AdapterSet, tensors: Mapping[str, Tensor]) -> None:
    """Give fresh adapters the ranks and the (empty) starts of saved parameters, whose values can then be loaded.

    Args:
        adapters: with the settings of the run that saved them.
        tensors: parameters by their names in `AdapterSet.named_parameters`.
    """

    def saved(name: str, part: str) -> Tensor | None:
        return tensors.get(f"{FILE_PREFIX}{name}.{part}")

    ranks = {}
    for name, layer in adapters.layers.items():
        b_OR = saved(name, "lora_B.weight")
        ranks[name] = 0 if b_OR is None else b_OR.shape[1] if b_OR.dim() == 2 else layer.rank
    if any(ranks.values()) and ranks != {name: layer.rank for name, layer in adapters.layers.items()}:
        set_ranks(adapters, ranks)
    with torch.no_grad():
        for layers in by_lora_A(adapters):
            if saved(layers[0][0], "start_A") is not None:
                add_start(layers)
