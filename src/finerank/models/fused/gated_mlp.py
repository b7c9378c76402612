"""The product in a gated MLP, `act(gate) * up`, with nothing kept but gate and up.

    h = gated_product(gate, up, SILU)

Autograd would also keep `act(gate)` and, as the input of the linear below, the product: four tensors of the MLP's width
in place of two.

Source: Shazeer, "GLU Variants Improve Transformer", 2020, equation 6.

Shapes: N tokens, I the MLP's width.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from finerank.models.fused.recompute import Recipe, with_recipe


class Activation(NamedTuple):
    """An activation and its derivative."""

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]
    """(output's gradient, input) -> input's gradient."""


SILU = Activation(F.silu, torch.ops.aten.silu_backward)
GELU = Activation(F.gelu, torch.ops.aten.gelu_backward)
GELU_TANH = Activation(
    partial(F.gelu, approximate="tanh"),
    lambda dy, x: torch.ops.aten.gelu_backward(dy, x, approximate="tanh"),
)
ACTIVATIONS = (SILU, GELU_TANH, GELU)


def gated_product(gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
    """`act(gate) * up`, each step rounded to the tensors' precision as in transformers' MLPs.

    Args:
        gate, up: [..., I].
        activation: of the gate.

    Returns:
        [..., I] with a recipe; see `models.fused.recompute`.
    """
    y = _GatedProduct.apply(gate, up, activation)
    kept = tuple(t.detach().reshape(-1, t.shape[-1]) for t in (gate, up))
    return with_recipe(y, Recipe(kept, lambda gate_NI, up_NI: activation.forward(gate_NI).mul_(up_NI)))


class _GatedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: Activation) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return activation.forward(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        gate, up = ctx.saved_tensors
        dup = ctx.activation.forward(gate).mul_(dy)
        return ctx.activation.backward(dy * up, gate), dup, None
