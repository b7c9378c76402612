"""The adapted linear as one autograd function: `y = x W^T + b + scale * (x A^T) B^T`.

It stands for one linear or for several that read the same input (q, k and v; gate and up), each with its own `lora_A`
or with a shared one. Compared with composing the same from `F.linear`:

- the input is kept once, and nothing else of the size of the activations; an input that says how to get it again from
  what is kept anyway (`models.fused.recompute`) is not kept at all;
- no weight gradient is formed for the frozen `W`, and no input gradient where nothing below is trained;
- the low-rank terms are added in place to the base's product, forward and backward;
- the factors of all members are multiplied with the input in one product.

Factors may have a higher precision than the activations (fp32 adapters over a bf16 base): they are rounded to the
activations' precision for the products, and their gradients are returned in their own precision.

Shapes: N tokens, I in_features, O out_features, R rank, S sum of the distinct A's ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from finerank.models.fused.recompute import Recipe, recipe_of


def weight_OI(base: nn.Module) -> Tensor:
    """The base weight as [out_features, in_features], whatever keeps it.

    A quantised base offers `dequantized_weight() -> Tensor`; transformers' Conv1D stores the transpose.
    """
    dequantize = getattr(base, "dequantized_weight", None)
    if dequantize is not None:
        return dequantize()
    weight: Tensor = base.weight  # type: ignore[assignment]
    return weight if isinstance(base, nn.Linear) else weight.T


def _product_weight_OI(base: nn.Module) -> Tensor:
    """`weight_OI` for one product: a quantised base dequantises it into memory that the next product uses again."""
    dequantize = getattr(base, "product_weight", None)
    return weight_OI(base) if dequantize is None else dequantize()


@dataclass(frozen=True)
class Member:
    """One linear of a call."""

    base: nn.Module
    """Keeps the frozen weight and bias; see `weight_OI`."""
    scale: float
    a: int
    """Which of the call's distinct lora_A it uses."""


def adapted_linear(
    x: Tensor, members: Sequence[Member], lora_A: Sequence[Tensor], lora_B: Sequence[Tensor], dropout: float = 0.0
) -> tuple[Tensor, ...]:
    """Outputs of all members for one input.

    Args:
        x: [..., I].
        members: the linears; `members[i]` goes with `lora_B[i]`.
        lora_A: the distinct A [R, I].
        lora_B: one B [O, R] for each member.
        dropout: probability with which an element of the input is dropped on its way to an A; each A draws its own
            mask, as separate PEFT layers do.

    Returns:
        One [..., O] for each member.
    """
    assert len(members) == len(lora_B)
    keep = [_keep_mask(x, dropout) for _ in lora_A] if dropout > 0.0 else []
    return _AdaptedLinear.apply(x, recipe_of(x), tuple(members), len(lora_A), dropout, *lora_A, *lora_B, *keep)


def _keep_mask(x: Tensor, dropout: float) -> Tensor:
    return torch.rand(x.shape[:-1].numel(), x.shape[-1], device=x.device) >= dropout


class _AdaptedLinear(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,
        recipe: Recipe | None,
        members: tuple[Member, ...],
        num_a: int,
        dropout: float,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        lora_A, lora_B = tensors[:num_a], tensors[num_a : num_a + len(members)]
        keep = tensors[num_a + len(members) :]
        x_NI = x.reshape(-1, x.shape[-1])
        spans = _spans(lora_A)
        a_SI = _stack(lora_A, x.dtype)
        if keep:
            h_NS = torch.cat([_drop(x_NI, k, dropout) @ a_SI[s].T for k, s in zip(keep, spans, strict=True)], dim=1)
        else:
            h_NS = x_NI @ a_SI.T
        outputs = []
        for member, b in zip(members, lora_B, strict=True):
            y_NO = F.linear(x_NI, _product_weight_OI(member.base), member.base.bias)  # type: ignore[arg-type]
            y_NO.addmm_(h_NS[:, spans[member.a]], b.to(x.dtype).T, alpha=member.scale)
            outputs.append(y_NO.view(*x.shape[:-1], -1))
        kept, ctx.again = ((x_NI,), None) if recipe is None else recipe
        ctx.save_for_backward(h_NS, *tensors, *kept)
        ctx.num_tensors = len(tensors)
        ctx.members, ctx.num_a, ctx.dropout, ctx.x_shape = members, num_a, dropout, x.shape
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Any, ...]:  # type: ignore[override]
        h_NS, *tensors = ctx.saved_tensors
        tensors, kept = tensors[: ctx.num_tensors], tensors[ctx.num_tensors :]
        x_NI: Tensor = kept[0] if ctx.again is None else ctx.again(*kept)
        members, num_a = ctx.members, ctx.num_a
        lora_A, lora_B = tensors[:num_a], tensors[num_a : num_a + len(members)]
        keep = tensors[num_a + len(members) :]
        spans = _spans(lora_A)
        dh_NS = torch.empty_like(h_NS)
        written: set[int] = set()
        dbs: list[Tensor | None] = []
        dx_NI: Tensor | None = None
        for member, b, dy in zip(members, lora_B, dys, strict=True):
            if dy is None:
                dbs.append(None)
                continue
            dy_NO, span = dy.reshape(-1, dy.shape[-1]), spans[member.a]
            beta = 1 if member.a in written else 0
            dh_NS[:, span].addmm_(dy_NO, b.to(dy.dtype), beta=beta, alpha=member.scale)
            written.add(member.a)
            dbs.append((dy_NO.T @ h_NS[:, span]).to(b.dtype).mul_(member.scale))
            if ctx.needs_input_grad[0]:
                weight = _product_weight_OI(member.base)
                dx_NI = dy_NO @ weight if dx_NI is None else dx_NI.addmm_(dy_NO, weight)
        for i, span in enumerate(spans):
            if i not in written:
                dh_NS[:, span] = 0
        das, dx_NI = _input_side(x_NI, dh_NS, dx_NI, lora_A, keep, ctx.dropout)
        dx = None if dx_NI is None else dx_NI.view(ctx.x_shape)
        return dx, None, None, None, None, *das, *dbs, *([None] * len(keep))


def _input_side(
    x_NI: Tensor,
    dh_NS: Tensor,
    dx_NI: Tensor | None,
    lora_A: Sequence[Tensor],
    keep: Sequence[Tensor],
    dropout: float,
) -> tuple[list[Tensor], Tensor | None]:
    """Gradients of the A's, and the input's gradient with the low-rank part added in place."""
    spans = _spans(lora_A)
    a_SI = _stack(lora_A, x_NI.dtype)
    if not keep:
        da_SI = dh_NS.T @ x_NI
        das = [da_SI[s].to(a.dtype) for a, s in zip(lora_A, spans, strict=True)]
        return das, None if dx_NI is None else dx_NI.addmm_(dh_NS, a_SI)
    das = []
    for a, k, s in zip(lora_A, keep, spans, strict=True):
        das.append((dh_NS[:, s].T @ _drop(x_NI, k, dropout)).to(a.dtype))
        if dx_NI is not None:
            dx_NI.add_(_drop(dh_NS[:, s] @ a_SI[s], k, dropout))
    return das, dx_NI


def _drop(x: Tensor, keep: Tensor, dropout: float) -> Tensor:
    return x * keep.to(x.dtype).div_(1.0 - dropout)


def _spans(lora_A: Sequence[Tensor]) -> list[slice]:
    spans, start = [], 0
    for a in lora_A:
        spans.append(slice(start, start + a.shape[0]))
        start += a.shape[0]
    return spans


def _stack(lora_A: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    return (lora_A[0] if len(lora_A) == 1 else torch.cat(list(lora_A))).to(dtype)
