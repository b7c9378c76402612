"""Log-probabilities of given tokens without ever holding all logits; see `models.head`, whose rules hold here too.

    log_probs_N = token_log_probs(head, hidden_ND, target_N)
    sums_S, counts_S = sequence_log_probs(model, batch)

The cross-entropy weighs each position alike; losses over whole answers (preference tuning) do not, and their weights
are known only after the last position. What is kept for backward is therefore each position's own gradient towards its
hidden state, which is formed from the logits of its chunk at once: logits are computed once here, too.

Shapes: N trained positions, D hidden, V vocabulary, S sequences.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from finerank.models.forward import IGNORE_INDEX, decoder_of, model_inputs, verified_head
from finerank.models.head import Head, chunks, loss_into_gradient_, wide


def token_log_probs(head: Head, hidden_ND: Tensor, target_N: Tensor) -> Tensor:
    """`log softmax(logits)[target]` of each position, [N] in fp32 (fp64 for fp64 input).

    Differentiable once in `hidden_ND`; for a head that learns also in its parameters, at the price of computing its
    logits again in backward.
    """
    learns = torch.is_grad_enabled() and any(p.requires_grad for p in head.module.parameters())
    if not learns and type(head.module) is nn.Linear:
        return _TokenLogProbs.apply(hidden_ND, target_N, head)
    parts = [
        checkpoint(_learning_chunk, hidden_ND[chunk], target_N[chunk], head, use_reentrant=False)
        for chunk in chunks(hidden_ND, head)
    ]
    return torch.cat(parts) if parts else hidden_ND.new_zeros(0, dtype=wide(hidden_ND))


def _learning_chunk(hidden_CD: Tensor, target_C: Tensor, head: Head) -> Tensor:
    return _of_logits(head.logits(hidden_CD), target_C)


def _of_logits(logits_NV: Tensor, target_N: Tensor) -> Tensor:
    return torch.log_softmax(logits_NV, dim=1, dtype=wide(logits_NV)).gather(1, target_N[:, None]).squeeze(1)


class _TokenLogProbs(torch.autograd.Function):
    """Under a frozen linear."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, target_N: Tensor, head: Head) -> Tensor:  # type: ignore[override]
        log_probs_N = torch.empty(len(target_N), dtype=wide(hidden_ND), device=hidden_ND.device)
        gradient_ND = torch.empty_like(hidden_ND) if ctx.needs_input_grad[0] else None
        for chunk in chunks(hidden_ND, head):
            logits_CV = head.module(hidden_ND[chunk])
            needs_grad = gradient_ND is not None
            log_probs_N[chunk] = -loss_into_gradient_(head, logits_CV, target_N[chunk], needs_grad=needs_grad)
            if gradient_ND is not None:
                gradient_ND[chunk] = logits_CV @ head.weight_VD
        ctx.save_for_backward(gradient_ND)
        return log_probs_N

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        (gradient_ND,) = ctx.saved_tensors  # of the loss: minus the log-probability
        return gradient_ND * -grad_N.to(gradient_ND.dtype)[:, None], None, None


def sequence_log_probs(
    model: PreTrainedModel,
    input_ids: Tensor,
    target_ids: Tensor,
    position_ids: Tensor,
    cu_seqlens: Tensor | None = None,
    attention_mask: Tensor | None = None,
    parents: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probability of the trained tokens of each sequence: their sum, fp32 [S], and how many they are, int64 [S].

    Arguments as for `models.forward.loss_sum`. S counts the packed segments, or the rows of a padded batch.
    """
    inputs = model_inputs(input_ids, position_ids, cu_seqlens, attention_mask, parents)
    is_trained = (target_ids != IGNORE_INDEX).flatten()
    trained_N = is_trained.nonzero().squeeze(1)
    target_N = target_ids.flatten()[trained_N]
    head = verified_head(model)
    if head is not None:
        hidden = decoder_of(model)(**inputs).last_hidden_state.flatten(0, 1)
        log_probs_N = token_log_probs(head, hidden.index_select(0, trained_N), target_N)
    else:  # the model's own head, which does more than a linear
        log_probs_N = _of_logits(model(**inputs).logits.flatten(0, 1)[trained_N], target_N)
    if cu_seqlens is None:
        counts = is_trained.view_as(target_ids).sum(1)
    else:
        before = torch.nn.functional.pad(is_trained.cumsum(0), (1, 0))
        counts = before[cu_seqlens[1:].long()] - before[cu_seqlens[:-1].long()]
    # not index_add, whose order of summation a GPU does not keep
    return torch.stack([part.sum() for part in log_probs_N.split(counts.tolist())]), counts
