"""Cross-entropy at trained positions without ever holding all logits.

The vocabulary head is the largest matrix product of a small model, and its logits the largest tensor: 2,048 tokens of a
262,144-word vocabulary are 2 GiB in fp32. Here the head sees only positions that are trained, a chunk at a time; a
chunk's logits turn into its probabilities and then, in place, into its gradient, from which the gradient of the hidden
states is formed at once. Logits are computed once, and what backward keeps has the size of the hidden states.

Shapes: N trained positions, C positions of a chunk, D hidden, V vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

LOGITS_PER_CHUNK = 1 << 24
"""Most logits held at once (fp32: 64 MiB); a chunk has at least `MIN_CHUNK` positions all the same."""
LOGITS_PER_CHUNK_GPU = 1 << 27
"""The same on a GPU, which needs wide products to be busy (fp32: 512 MiB)."""
MIN_CHUNK = 16


@dataclass(frozen=True)
class Head:
    """What turns final hidden states into logits: `softcap * tanh(scale * module(h) / softcap)`."""

    module: nn.Module
    """The model's output embeddings: a linear, perhaps with an adapter on it."""
    scale: float = 1.0
    """Cohere's `logit_scale`, one over Granite's `logits_scaling`."""
    softcap: float | None = None
    """Gemma's `final_logit_softcapping`."""

    @property
    def weight_VD(self) -> Tensor:
        """The vocabulary matrix."""
        return self.module.weight  # type: ignore[return-value]

    @property
    def is_frozen_linear(self) -> bool:
        """Nothing in it learns, and its weight is at hand."""
        return type(self.module) is nn.Linear and not any(p.requires_grad for p in self.module.parameters())

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """[N, V] in the hidden states' dtype."""
        logits = self.module(hidden_ND)
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits


def cross_entropy_sum(head: Head, hidden_ND: Tensor, target_N: Tensor) -> Tensor:
    """Sum of `-log softmax(logits)[target]` over N positions, fp32 scalar (fp64 for fp64 input).

    Differentiable in `hidden_ND`; for a head that learns (an adapter sits on it) also in its parameters, at the price
    of computing its logits again in backward.

    Args:
        head: see there.
        hidden_ND: final hidden states at trained positions.
        target_N: int64, the tokens to predict, all of them real ids.
    """
    if head.is_frozen_linear:
        return _CrossEntropySum.apply(hidden_ND, target_N, head)
    total = hidden_ND.new_zeros((), dtype=_wide(hidden_ND))
    for chunk in _chunks(hidden_ND, head):
        total = total + checkpoint(_learning_chunk, hidden_ND[chunk], target_N[chunk], head, use_reentrant=False)
    return total


def _learning_chunk(hidden_CD: Tensor, target_C: Tensor, head: Head) -> Tensor:
    return F.cross_entropy(head.logits(hidden_CD).to(_wide(hidden_CD)), target_C, reduction="sum")


def _chunks(hidden_ND: Tensor, head: Head) -> Iterator[slice]:
    limit = LOGITS_PER_CHUNK if hidden_ND.device.type == "cpu" else LOGITS_PER_CHUNK_GPU
    size = max(MIN_CHUNK, limit // head.weight_VD.shape[0])
    for start in range(0, hidden_ND.shape[0], size):
        yield slice(start, start + size)


def _wide(hidden: Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


class _CrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, target_N: Tensor, head: Head) -> Tensor:  # type: ignore[override]
        total = torch.zeros((), dtype=_wide(hidden_ND), device=hidden_ND.device)
        needs_grad = ctx.needs_input_grad[0]
        gradient_ND = torch.empty_like(hidden_ND) if needs_grad else None
        for chunk in _chunks(hidden_ND, head):
            loss, grad_CD = _chunk(hidden_ND[chunk], target_N[chunk], head, needs_grad)
            total += loss
            if gradient_ND is not None and grad_CD is not None:
                gradient_ND[chunk] = grad_CD
        ctx.save_for_backward(gradient_ND)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        (gradient_ND,) = ctx.saved_tensors
        return gradient_ND * grad.to(gradient_ND.dtype), None, None


def _chunk(hidden_CD: Tensor, target_C: Tensor, head: Head, needs_grad: bool) -> tuple[Tensor, Tensor | None]:
    """Loss sum of a chunk, and the gradient of its hidden states."""
    wide = _wide(hidden_CD)
    logits_CV = head.logits(hidden_CD)
    top_C = logits_CV.amax(dim=1)
    at_target_C = logits_CV.gather(1, target_C[:, None]).squeeze(1).to(wide)
    probs_CV = torch.softmax(logits_CV, dim=1, dtype=wide)
    # logsumexp = top - log p(top): p(top) is at least 1/V, so this is exact where log p(target) would underflow
    lse_C = top_C.to(wide) - probs_CV.amax(dim=1).log()
    loss = (lse_C - at_target_C).sum()
    if not needs_grad:
        return loss, None
    grad_CV = probs_CV
    grad_CV[torch.arange(len(target_C), device=target_C.device), target_C] -= 1.0
    if head.softcap is not None:  # d tanh: 1 - (capped / softcap)^2
        grad_CV *= 1.0 - (logits_CV.to(wide) / head.softcap).square_()
    if head.scale != 1.0:
        grad_CV *= head.scale
    return loss, grad_CV.to(hidden_CD.dtype) @ head.weight_VD
