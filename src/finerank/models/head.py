"""Cross-entropy at trained positions without ever holding all logits.

The vocabulary head is the largest matrix product of a small model, and its logits the largest tensor: 2,048 tokens of a
262,144-word vocabulary are 2 GiB in fp32. Here the head sees only positions that are trained, a chunk at a time; a
chunk's logits turn into its probabilities and then, in place, into its gradient, from which the gradient of the hidden
states is formed at once. Logits are computed once, and what backward keeps has the size of the hidden states. A head
that learns (trained whole, or with an adapter on it) gets its gradient in the same way, summed chunk by chunk.

Shapes: N trained positions, C positions of a chunk, D hidden, V vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

LOGITS_PER_CHUNK = 1 << 23
"""Most logits held at once (bf16: 16 MiB); a chunk has at least `MIN_CHUNK` positions all the same."""
LOGITS_PER_CHUNK_GPU = 1 << 27
"""The same on a GPU, which needs wide products to be busy (fp32: 512 MiB)."""
MIN_CHUNK = 16
LOGITS_IN_CACHE = 1 << 20
"""Logits of a chunk that a CPU turns into their gradient at once (fp32: 4 MiB)."""


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

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """[N, V] in the hidden states' dtype."""
        return self.finish(self.module(hidden_ND))

    def finish(self, logits: Tensor) -> Tensor:
        """Scale and cap what the module gave."""
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits


def cross_entropy_sum(head: Head, hidden_ND: Tensor, target_N: Tensor) -> Tensor:
    """Sum of `-log softmax(logits)[target]` over N positions, fp32 scalar (fp64 for fp64 input).

    Differentiable once in `hidden_ND` and in what the head's module learns.

    Args:
        head: see there.
        hidden_ND: final hidden states at trained positions.
        target_N: int64, the tokens to predict, all of them real ids.
    """
    learned = [p for p in head.module.parameters() if p.requires_grad] if torch.is_grad_enabled() else []
    if learned or type(head.module) is not nn.Linear:
        return _LearningCrossEntropySum.apply(hidden_ND, target_N, head, *learned)
    return _CrossEntropySum.apply(hidden_ND, target_N, head)


def chunks(hidden_ND: Tensor, head: Head) -> Iterator[slice]:
    """Positions whose logits are held at once."""
    limit = LOGITS_PER_CHUNK if hidden_ND.device.type == "cpu" else LOGITS_PER_CHUNK_GPU
    size = max(MIN_CHUNK, limit // head.weight_VD.shape[0])
    for start in range(0, hidden_ND.shape[0], size):
        yield slice(start, start + size)


def wide(hidden: Tensor) -> torch.dtype:
    """The dtype in which losses are computed: fp32, or fp64 for fp64."""
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


class _CrossEntropySum(torch.autograd.Function):
    """Under a frozen linear, whose gradient towards the hidden states is one product."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, target_N: Tensor, head: Head) -> Tensor:  # type: ignore[override]
        total = torch.zeros((), dtype=wide(hidden_ND), device=hidden_ND.device)
        gradient_ND = torch.empty_like(hidden_ND) if ctx.needs_input_grad[0] else None
        for chunk in chunks(hidden_ND, head):
            logits_CV = head.module(hidden_ND[chunk])
            needs_grad = gradient_ND is not None
            total += loss_into_gradient_(head, logits_CV, target_N[chunk], needs_grad=needs_grad).sum()
            if gradient_ND is not None:
                gradient_ND[chunk] = logits_CV @ head.weight_VD
        ctx.save_for_backward(gradient_ND)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        (gradient_ND,) = ctx.saved_tensors
        return gradient_ND * grad.to(gradient_ND.dtype), None, None


class _LearningCrossEntropySum(torch.autograd.Function):
    """Under any other module: autograd goes through the module alone, chunk by chunk, during forward."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, hidden_ND: Tensor, target_N: Tensor, head: Head, *learned: Tensor
    ) -> Tensor:
        total = torch.zeros((), dtype=wide(hidden_ND), device=hidden_ND.device)
        gradient_ND = torch.zeros_like(hidden_ND) if ctx.needs_input_grad[0] else None
        # in fp32: a bf16 sum would lose what a chunk adds to many before it
        gradients = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in learned]
        needs_grad = gradient_ND is not None or bool(learned)
        for chunk in chunks(hidden_ND, head):
            hidden_CD = hidden_ND[chunk].detach().requires_grad_(gradient_ND is not None)
            with torch.set_grad_enabled(needs_grad):
                logits_CV = head.module(hidden_CD)
            grad_CV = logits_CV.detach().clone()  # the module may want its output again
            total += loss_into_gradient_(head, grad_CV, target_N[chunk], needs_grad=needs_grad).sum()
            if not needs_grad:
                continue
            sums = [*gradients] if gradient_ND is None else [*gradients, gradient_ND[chunk]]
            inputs = [*learned] if gradient_ND is None else [*learned, hidden_CD]
            found = torch.autograd.grad(logits_CV, inputs, grad_CV, allow_unused=True)
            for total_grad, part in zip(sums, found, strict=True):
                if part is not None:
                    total_grad.add_(part)
        ctx.save_for_backward(gradient_ND, *gradients)
        ctx.dtypes = [p.dtype for p in learned]
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        gradient_ND, *sums = ctx.saved_tensors
        gradients = [(total * grad).to(dtype) for total, dtype in zip(sums, ctx.dtypes, strict=True)]
        gradient_ND = None if gradient_ND is None else gradient_ND * grad.to(gradient_ND.dtype)
        return gradient_ND, None, None, *gradients


def loss_into_gradient_(head: Head, raw_CV: Tensor, target_C: Tensor, *, needs_grad: bool) -> Tensor:
    """Loss of each position, [C] in the dtype of `wide`.

    With `needs_grad`, `raw_CV`, which is what the head's module gave, turns into the gradient of their sum towards it.
    A CPU takes a few rows at a time, so that their probabilities never leave its cache.
    """
    loss_C = torch.empty(len(target_C), dtype=wide(raw_CV), device=raw_CV.device)
    num_rows = len(target_C) if raw_CV.is_cuda else max(1, LOGITS_IN_CACHE // raw_CV.shape[1])
    for start in range(0, len(target_C), num_rows):
        rows = slice(start, start + num_rows)
        loss_C[rows], gradient = _loss_and_gradient(head, raw_CV[rows], target_C[rows], needs_grad=needs_grad)
        if gradient is not None:
            raw_CV[rows] = gradient
    return loss_C


def _loss_and_gradient(
    head: Head, raw_CV: Tensor, target_C: Tensor, *, needs_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """Loss of each position [C], and their sum's gradient [C, V] towards what the head's module gave, in fp32."""
    wide_dtype = wide(raw_CV)
    logits_CV = head.finish(raw_CV)
    top_C = logits_CV.amax(dim=1)
    at_target_C = logits_CV.gather(1, target_C[:, None]).squeeze(1).to(wide_dtype)
    probs_CV = torch.softmax(logits_CV, dim=1, dtype=wide_dtype)
    # logsumexp = top - log p(top): p(top) is at least 1/V, so this is exact where log p(target) would underflow
    lse_C = top_C.to(wide_dtype) - probs_CV.amax(dim=1).log()
    loss_C = lse_C - at_target_C
    if not needs_grad:
        return loss_C, None
    grad_CV = probs_CV
    grad_CV[torch.arange(len(target_C), device=target_C.device), target_C] -= 1.0
    if head.softcap is not None:  # d tanh: 1 - (capped / softcap)^2
        grad_CV *= 1.0 - (logits_CV.to(wide_dtype) / head.softcap).square_()
    if head.scale != 1.0:
        grad_CV *= head.scale
    return loss_C, grad_CV
