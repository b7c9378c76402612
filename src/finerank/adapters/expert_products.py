"""The experts of a layer with low-rank changes, forward and backward, expert by expert.

    y_t = sum over the experts e of token t of  w_te * down_e(gate(up_e(x_t)))
    up_e(x) = (W1_e + s1 B1_e A1_e) x        down_e(a) = (W2_e + s2 B2_e A2_e) a

Tokens are taken in the order of their experts, as `transformers` groups them, and each expert is computed on
its own rows. No sum of weights and change is formed, no gradient of the experts' weights, and what is kept for the
backward pass is the input, which others keep too, the result of the first product and the rank-sized ones. The
router's gradient needs no second product: with a' the gradient of the gated rows before their weight, dw = <a', a>.

Shapes: T tokens, K experts of a token, S = T K rows in the order of their experts, E experts, D hidden, F feed-forward,
U features of the first product (2 F), R rank.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class Change:
    """A low-rank change of one product of all experts."""

    a_ERI: Tensor
    b_EOR: Tensor
    scale: float


def experts_output(
    x_TD: Tensor,
    index_TK: Tensor,
    weights_TK: Tensor,
    *,
    first_EUD: Tensor,
    second_EDF: Tensor,
    gate: Callable[[Tensor], Tensor],
    first: Change | None,
    second: Change | None,
) -> Tensor:
    """What the experts add to the residual stream, [T, D] in the precision of `x_TD`.

    Args:
        x_TD: the layer's input.
        index_TK: the experts of each token, each at most once.
        weights_TK: how much each counts.
        first_EUD: frozen weights of gate and up; second_EDF: of down.
        gate: [*, U] -> [*, F], differentiable.
        first: change of the first product; second: of the second; None for none. Factors in the precision of `x_TD`.
    """
    factors = [f for change in (first, second) for f in ((change.a_ERI, change.b_EOR) if change else (None, None))]
    scales = (first.scale if first else 0.0, second.scale if second else 0.0)
    return _Experts.apply(x_TD, weights_TK, index_TK, (first_EUD, second_EDF), gate, scales, *factors)


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x_TD: Tensor,
        weights_TK: Tensor,
        index_TK: Tensor,
        bases: tuple[Tensor, Tensor],
        gate: Callable[[Tensor], Tensor],
        scales: tuple[float, float],
        *factors: Tensor | None,
    ) -> Tensor:
        a1, b1, a2, b2 = factors
        K, (first, second) = index_TK.shape[1], bases
        experts_S, order_S = index_TK.reshape(-1).sort(stable=True)
        counts = torch.bincount(experts_S, minlength=len(first)).tolist()
        u_SU = x_TD.new_empty(len(order_S), first.shape[1])
        ranks = [0 if a is None else a.shape[1] for a in (a1, a2)]
        h1_SR, h2_SR = (x_TD.new_empty(len(order_S), rank) for rank in ranks)
        y_TD = torch.zeros_like(x_TD, dtype=torch.promote_types(x_TD.dtype, torch.float32))
        w_S = weights_TK.reshape(-1)[order_S, None]
        for e, rows in _by_expert(counts):
            token_N = order_S[rows] // K
            u_SU[rows] = _product(x_TD[token_N], first, a1, b1, scales[0], e, h1_SR[rows])
            d_ND = _product(gate(u_SU[rows]), second, a2, b2, scales[1], e, h2_SR[rows])
            # a token has an expert once, so no row is added twice in one call: the sum is the same in every run
            y_TD.index_add_(0, token_N, (d_ND * w_S[rows]).to(y_TD.dtype))
        ctx.save_for_backward(x_TD, weights_TK, order_S, u_SU, h1_SR, h2_SR, *bases, *factors)
        ctx.counts, ctx.gate, ctx.scales = counts, gate, scales
        return y_TD.to(x_TD.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        x_TD, weights_TK, order_S, u_SU, h1_SR, h2_SR, first, second, a1, b1, a2, b2 = ctx.saved_tensors
        K = weights_TK.shape[1]
        w_S = weights_TK.reshape(-1)[order_S, None]
        dw_S = torch.zeros_like(w_S)
        wide = torch.promote_types(x_TD.dtype, torch.float32)
        dx_TD = torch.zeros_like(x_TD, dtype=wide) if ctx.needs_input_grad[0] else None
        grads = [None if f is None else torch.zeros_like(f) for f in (a1, b1, a2, b2)]
        for e, rows in _by_expert(ctx.counts):
            token_N = order_S[rows] // K
            dy_ND = dy_TD[token_N]
            with torch.enable_grad():
                u_NU = u_SU[rows].detach().requires_grad_()
                gated_NF = ctx.gate(u_NU)
            d_ND = (dy_ND * w_S[rows]).to(x_TD.dtype)
            _factor_grads(gated_NF.detach(), d_ND, a2, b2, ctx.scales[1], e, h2_SR[rows], *grads[2:])
            before_NF = _input_grad(dy_ND, second, a2, b2, ctx.scales[1], e)
            dw_S[rows] = (before_NF.to(wide) * gated_NF.detach()).sum(-1, keepdim=True).to(dw_S.dtype)
            (du_NU,) = torch.autograd.grad(gated_NF, u_NU, (before_NF * w_S[rows]).to(x_TD.dtype))
            _factor_grads(x_TD[token_N], du_NU, a1, b1, ctx.scales[0], e, h1_SR[rows], *grads[:2])
            if dx_TD is not None:
                dx_TD.index_add_(0, token_N, _input_grad(du_NU, first, a1, b1, ctx.scales[0], e).to(wide))
        dx = None if dx_TD is None else dx_TD.to(x_TD.dtype)
        dw = torch.empty_like(dw_S).index_copy_(0, order_S, dw_S).view_as(weights_TK)
        return dx, dw, None, None, None, None, *grads


def _by_expert(counts: list[int]) -> Iterator[tuple[int, slice]]:
    """(expert, its rows) for each expert that has any."""
    start = 0
    for e, count in enumerate(counts):
        if count:
            yield e, slice(start, start + count)
        start += count


def _product(
    x_NI: Tensor, w_EOI: Tensor, a_ERI: Tensor | None, b_EOR: Tensor | None, scale: float, e: int, h_NR: Tensor
) -> Tensor:
    """`(W_e + scale B_e A_e) x`; writes `A_e x` into `h_NR`."""
    y_NO = x_NI @ w_EOI[e].T
    if a_ERI is not None and b_EOR is not None:
        torch.mm(x_NI, a_ERI[e].T, out=h_NR)
        y_NO.addmm_(h_NR, b_EOR[e].T, alpha=scale)
    return y_NO


def _input_grad(
    dy_NO: Tensor, w_EOI: Tensor, a_ERI: Tensor | None, b_EOR: Tensor | None, scale: float, e: int
) -> Tensor:
    dx_NI = dy_NO @ w_EOI[e]
    if a_ERI is not None and b_EOR is not None:
        dx_NI.addmm_(dy_NO @ b_EOR[e], a_ERI[e], alpha=scale)
    return dx_NI


def _factor_grads(
    x_NI: Tensor,
    dy_NO: Tensor,
    a_ERI: Tensor | None,
    b_EOR: Tensor | None,
    scale: float,
    e: int,
    h_NR: Tensor,
    da_ERI: Tensor | None,
    db_EOR: Tensor | None,
) -> None:
    """Write the gradients of one expert's factors."""
    if a_ERI is None or b_EOR is None or da_ERI is None or db_EOR is None:
        return
    torch.mm((dy_NO @ b_EOR[e]).mul_(scale).T, x_NI, out=da_ERI[e])
    torch.mm(dy_NO.T, h_NR, out=db_EOR[e]).mul_(scale)
