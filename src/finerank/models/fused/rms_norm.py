"""RMSNorm with a backward pass in one step, and an output that need not be kept.

    y = rms_norm(x, weight, eps, AFTER_ROUNDING)

transformers' RMSNorm modules keep the hidden state in fp32 and the normalised one in the model's precision. Here only
the hidden state as it came and one number a token are kept.

Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019, equation 4.

Shapes: N tokens, D hidden.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from finerank.models.fused.recompute import Recipe, with_recipe


class Style(NamedTuple):
    """Where a model family multiplies the weight in; the families differ in what is rounded first."""

    finish: Callable[[Tensor, Tensor, torch.dtype], Tensor]
    """(normalised [N, D] in fp32, weight [D], dtype) -> output in dtype."""
    start_backward: Callable[[Tensor, Tensor, torch.dtype], Tensor]
    """(output's gradient, weight, fp32) -> gradient of the normalised hidden state."""


AFTER_ROUNDING = Style(
    finish=lambda n_ND, weight_D, dtype: weight_D * n_ND.to(dtype),
    start_backward=lambda dy_ND, weight_D, wide: (dy_ND * weight_D).to(wide),
)
"""Llama, Mistral, Qwen."""
BEFORE_ROUNDING = Style(
    finish=lambda n_ND, weight_D, dtype: (weight_D * n_ND).to(dtype),
    start_backward=lambda dy_ND, weight_D, wide: dy_ND.to(wide) * weight_D.to(wide),
)
"""OLMo 2, gpt-oss."""
ONE_PLUS = Style(
    finish=lambda n_ND, weight_D, dtype: (n_ND * (1.0 + weight_D.to(n_ND.dtype))).to(dtype),
    start_backward=lambda dy_ND, weight_D, wide: dy_ND.to(wide) * (1.0 + weight_D.to(wide)),
)
"""Gemma."""
STYLES = (AFTER_ROUNDING, BEFORE_ROUNDING, ONE_PLUS)


def rms_norm(x: Tensor, weight: Tensor, eps: float, style: Style) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight`, over the last dimension, computed in fp32 (in fp64 for fp64 input).

    Args:
        x: [..., D].
        weight: [D], frozen.
        eps: added to the mean square.
        style: the family's order of rounding.

    Returns:
        [..., D] with a recipe; see `models.fused.recompute`.
    """
    y, rstd_N1 = _RMSNorm.apply(x, weight, eps, style)
    x_ND = x.detach().reshape(-1, x.shape[-1])

    def again(x_ND: Tensor, rstd_N1: Tensor) -> Tensor:
        return style.finish(x_ND.to(rstd_N1.dtype) * rstd_N1, weight, x_ND.dtype)

    return with_recipe(y, Recipe((x_ND, rstd_N1.detach()), again))


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, weight: Tensor, eps: float, style: Style
    ) -> tuple[Tensor, Tensor]:
        x_ND = x.reshape(-1, x.shape[-1])
        wide_ND = x_ND.to(torch.promote_types(x.dtype, torch.float32))
        rstd_N1 = wide_ND.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        y_ND = style.finish(wide_ND * rstd_N1, weight, x.dtype)
        ctx.save_for_backward(x_ND, rstd_N1, weight)
        ctx.mark_non_differentiable(rstd_N1)
        ctx.style, ctx.shape = style, x.shape
        return y_ND.view(x.shape), rstd_N1

    @staticmethod
    def backward(ctx: Any, dy: Tensor, _: Any) -> tuple[Any, ...]:  # type: ignore[override]
        x_ND, rstd_N1, weight = ctx.saved_tensors
        n_ND = x_ND.to(rstd_N1.dtype) * rstd_N1
        dn_ND = ctx.style.start_backward(dy.reshape(x_ND.shape), weight, rstd_N1.dtype)
        along_N1 = torch.linalg.vecdot(dn_ND, n_ND).div_(x_ND.shape[1]).unsqueeze(1)
        dx_ND = (dn_ND - n_ND.mul_(along_N1)).mul_(rstd_N1)
        return dx_ND.to(x_ND.dtype).view(ctx.shape), None, None, None
