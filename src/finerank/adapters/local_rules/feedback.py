"""Broadcast-error learning: a three-factor rule of finerank, and LU-LoRA's default.

The residual stream carries an error down almost unchanged. So the gradient g of the loss with respect to the hidden
state above the local layers, which the upper part computes anyway, stands in for the gradient at every linear below
that writes into the stream (o_proj, down_proj):

    u = scale * A x          kept: R numbers per token and linear, nothing else
    dB = g^T u               the gradient of B if the layers between were the identity
    B by the run's AdamW     summed over micro-batches, clipped with the rest

A is set by the data: for the first `PCA_STEPS` steps it follows the leading components of its inputs by block power
iteration, `A <- orthonormal rows of sum(A x x^T)` (Oja's subspace rule with the largest step), while B stays zero.

The other linears of the local layers have no adapter under this rule: nothing tells them their error.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from finerank.adapters.local_rules._rule import LocalRule
from finerank.adapters.lora import LoRALinear
from finerank.errors import AdapterError

PCA_STEPS = 3
"""Steps in which A is found."""


class RULE(LocalRule):
    """See the module's docstring."""

    needs_error = True
    learns_by_optimizer = True
    only_into_residual = True
    default_ratio = 0.75  # with alpha = 2 r, 3 is worse than frozen layers; see docs/methods/lu_lora.md

    def begin_step(self, step: int) -> None:
        """Start new sums."""
        self.finds_components = step < PCA_STEPS
        self.sums: dict[nn.Parameter, Tensor] = {}
        self.signals: dict[LoRALinear, Tensor] = {}
        for layer in self.layers:
            layer.lora_B.grad = None

    def gather(self, layer: LoRALinear, x_BTI: Tensor, u_BTR: Tensor) -> None:
        """While A is sought, its inputs' products; afterwards u."""
        if not self.finds_components:
            self.signals[layer] = u_BTR
            return
        product_RI = (u_BTR.flatten(0, -2).T @ x_BTI.flatten(0, -2)).to(layer.lora_A.dtype)
        if layer.lora_A in self.sums:
            self.sums[layer.lora_A].add_(product_RI)
        else:
            self.sums[layer.lora_A] = product_RI

    def take_signals(self) -> dict[LoRALinear, Tensor]:
        """The u of this micro-batch."""
        taken, self.signals = self.signals, {}
        return taken

    @torch.no_grad()
    def receive(self, error_BTD: Tensor, signals: Mapping[LoRALinear, Tensor]) -> None:
        """Add `dB = g^T u` to the gradient of each B."""
        for layer, u_BTR in signals.items():
            if u_BTR.shape[:-1] != error_BTD.shape[:-1]:
                raise AdapterError(
                    f"--lu-lora-rule feedback: a local linear saw {tuple(u_BTR.shape[:-1])} tokens where the hidden "
                    f"state has {tuple(error_BTD.shape[:-1])}, so it cannot learn; use --lu-lora-rule frozen."
                )
            gradient_OR = feedback_gradient(error_BTD, u_BTR).to(layer.lora_B.dtype)
            if layer.lora_B.grad is None:
                layer.lora_B.grad = gradient_OR
            else:
                layer.lora_B.grad.add_(gradient_OR)

    @torch.no_grad()
    def update(self, *, lr_a: float, lr_b: float) -> None:
        """Set the A's while they are sought; the B's are the optimizer's."""
        for lora_A, product_RI in self.sums.items():
            lora_A.copy_(orthonormal_rows(product_RI))


def feedback_gradient(error_BTD: Tensor, u_BTR: Tensor) -> Tensor:
    """`g^T u` [D, R]: the gradient of `lora_B` when the error at its output is g."""
    return error_BTD.flatten(0, -2).T @ u_BTR.flatten(0, -2)


def orthonormal_rows(product_RI: Tensor) -> Tensor:
    """An orthonormal basis [R, I] of the rows' span, leading rows first; equal for equal arguments, sign included."""
    q_IR, triangle_RR = torch.linalg.qr(product_RI.T.float())
    return (q_IR * torch.where(triangle_RR.diagonal() < 0, -1.0, 1.0)).T.to(product_RI.dtype)
