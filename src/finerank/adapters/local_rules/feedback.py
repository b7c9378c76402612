"""Broadcast-error learning: a three-factor rule of finerank, without any backpropagation through local layers.

The residual stream carries an error down almost unchanged. So the gradient g of the loss with respect to the hidden
state above the local layers, which the upper part computes anyway, stands in for the gradient at every linear below
that writes into the stream (o_proj, down_proj):

    u = scale * A x          kept: R numbers per token and linear, nothing else
    dB = g^T u               the gradient of B if the layers between were the identity
    B by the run's AdamW     summed over micro-batches, clipped with the rest

The further below, the less g says (the cosine with the true gradient falls from about 0.5 to 0.1 over a dozen layers),
so B's learning rate falls with the depth d below layer K, `exp(-0.1 d)`.

A is set by the data and fixed: before the first step, the run's first rows pass through the local layers, and the
leading components of each linear's inputs become its A (orthonormal rows). Checkpoints hold A, so a resumed run has no
such pass. What a random A wins back is much less; see docs/methods/lu_lora.md.

The other linears of the local layers have no adapter under this rule: nothing tells them their error.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from finerank.adapters.initial import Pass
from finerank.adapters.local_rules._components import InputSketch
from finerank.adapters.local_rules._rule import LocalRule, Signal, Signals
from finerank.adapters.lora import LoRALinear
from finerank.errors import AdapterError

MIN_TOKENS_PER_COMPONENT = 128
"""Tokens that A is made of, for each of its rows."""
MIN_PASSES = 4
"""Micro-batches, so that a single long row does not decide."""


class RULE(LocalRule):
    """See the module's docstring."""

    needs_error = True
    learns_by_optimizer = True
    only_into_residual = True
    default_rank = 64
    default_ratio = 3.0
    decay_by_depth = 0.1

    @torch.no_grad()
    def start(self, passes: Iterator[Pass]) -> None:
        """Set each A to the leading components of its linear's inputs; one that nothing passes through stays random."""
        sketches = {
            layer: InputSketch(layer.rank, layer.in_features, device=layer.lora_A.device) for layer in self.layers
        }
        num_needed = MIN_TOKENS_PER_COMPONENT * max((layer.rank for layer in self.layers), default=0)
        num_tokens = num_passes = 0
        while num_passes < MIN_PASSES or num_tokens < num_needed:
            one = next(passes)
            _look(one, sketches)
            num_tokens += one.trained_BT.numel() if one.real_BT is None else int(one.real_BT.sum())
            num_passes += 1
        for layer, sketch in sketches.items():
            if sketch.num_tokens:
                layer.lora_A.copy_(sketch.components())

    def gather(self, layer: LoRALinear, x_BTI: Tensor, u_BTR: Tensor) -> Signal:
        """Keep u."""
        return (u_BTR,)

    def gradients(self, error_BTD: Tensor, signals: Signals) -> list[Tensor]:
        """`dB = g^T u`"""
        found = []
        for layer, (u_BTR,) in signals:
            if u_BTR.shape[:-1] != error_BTD.shape[:-1]:
                raise AdapterError(
                    f"--lu-lora-rule feedback: a local linear saw {tuple(u_BTR.shape[:-1])} tokens where the hidden "
                    f"state has {tuple(error_BTD.shape[:-1])}, so it cannot learn; use --lu-lora-rule frozen."
                )
            found.append(feedback_gradient(error_BTD, u_BTR).to(layer.lora_B.dtype))
        return found


def _look(one: Pass, sketches: Mapping[LoRALinear, InputSketch]) -> None:
    """Run a pass and show each sketch what its linear reads; tokens that are padding are left out."""

    def look(layer: Any, args: tuple[Tensor, ...]) -> None:
        x, real_BT = args[0], one.real_BT
        sketches[layer].add(x[real_BT] if real_BT is not None and real_BT.shape == x.shape[:-1] else x.flatten(0, -2))

    handles = [layer.register_forward_pre_hook(look) for layer in sketches]
    try:
        one.run()
    finally:
        for handle in handles:
            handle.remove()


def feedback_gradient(error_BTD: Tensor, u_BTR: Tensor) -> Tensor:
    """`g^T u` [D, R]: the gradient of `lora_B` when the error at its output is g."""
    return error_BTD.flatten(0, -2).T @ u_BTR.flatten(0, -2)
