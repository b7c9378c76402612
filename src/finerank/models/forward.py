"""The forward pass of training: decoder, then the loss at trained positions only.

    loss = loss_sum(model, batch.input_ids, batch.target_ids, batch.position_ids, cu_seqlens=batch.cu_seqlens)
    (loss / num_trained_tokens).backward()

The decoder is the model's own; its head is taken over by `models.head` after it was seen, once for each model, to give
the model's own logits. A head that does otherwise is called as the model calls it, and the log says so.
"""

import logging
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from finerank.errors import ModelError
from finerank.models.head import Head, cross_entropy_sum
from finerank.models.spans import packed_mask

logger = logging.getLogger(__name__)

IGNORE_INDEX = -100

_heads: "weakref.WeakKeyDictionary[nn.Module, Head | None]" = weakref.WeakKeyDictionary()
"""What `verify_head` found, by model; None for a head that only the model itself can call."""


def loss_sum(
    model: PreTrainedModel,
    input_ids: Tensor,
    target_ids: Tensor,
    position_ids: Tensor,
    cu_seqlens: Tensor | None = None,
    attention_mask: Tensor | None = None,
    parents: Tensor | None = None,
) -> Tensor:
    """Cross-entropy summed over the trained positions, fp32 scalar.

    Args:
        model: a transformers causal LM; packed batches need `use_packed_attention(model)` before.
        input_ids: int64 [B, T].
        target_ids: int64 [B, T], the token to predict from each position (shifted already), -100 where not trained.
        position_ids: int64 [B, T], restarting in each packed sequence.
        cu_seqlens: int32 [S + 1], borders of the packed segments; then B = 1.
        attention_mask: int64 [B, T], 1 for real tokens of a padded batch.
        parents: int32 [S], which segment each one continues; see `models.spans`.

    Raises:
        ModelError: the model does not keep its decoder apart from its head.
    """
    inputs = model_inputs(input_ids, position_ids, cu_seqlens, attention_mask, parents)
    trained = (target_ids != IGNORE_INDEX).flatten().nonzero().squeeze(1)
    targets = target_ids.flatten()[trained]
    head = verified_head(model)
    if head is None:
        return _own_loss_sum(model, inputs, trained, targets)
    hidden = decoder_of(model)(**inputs).last_hidden_state.flatten(0, 1)
    return cross_entropy_sum(head, hidden.index_select(0, trained), targets)


def model_inputs(
    input_ids: Tensor,
    position_ids: Tensor,
    cu_seqlens: Tensor | None,
    attention_mask: Tensor | None,
    parents: Tensor | None = None,
) -> dict[str, Any]:
    """What a model or its decoder is called with; see `loss_sum`."""
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask if cu_seqlens is None else packed_mask(cu_seqlens, parents),
        "position_ids": position_ids,
        "use_cache": False,
    }


def _own_loss_sum(model: PreTrainedModel, inputs: dict, trained: Tensor, targets: Tensor) -> Tensor:
    """The same through the model's own head: at trained positions of a packed batch, at all of a padded one."""
    if inputs["input_ids"].shape[0] == 1:
        logits = model(**inputs, logits_to_keep=trained).logits[0]
    else:
        logits = model(**inputs).logits.flatten(0, 1)[trained]
    return F.cross_entropy(logits.float(), targets, reduction="sum")


def decoder_of(model: PreTrainedModel) -> nn.Module:
    """The part of a causal LM below its head. Raises ModelError when there is none."""
    decoder = model.base_model
    if decoder is model or model.get_output_embeddings() is None:
        raise ModelError(f"{type(model).__name__} does not keep its decoder apart from its head; give a causal LM.")
    return decoder


def verified_head(model: PreTrainedModel) -> Head | None:
    """The model's head as `models.head` computes it; None when that would not be the model's own logits.

    Tried on a few tokens the first time a model is seen (and when its head module was replaced since).
    """
    known = _heads.get(model)
    if model in _heads and (known is None or known.module is model.get_output_embeddings()):
        return known
    decoder, config = decoder_of(model), model.config.get_text_config()
    module = model.get_output_embeddings()
    assert module is not None
    head = Head(module, scale=_logit_scale(model, config), softcap=getattr(config, "final_logit_softcapping", None))
    ids = torch.arange(8, device=model.device)[None] % config.vocab_size
    was_training = model.training
    model.eval()  # dropout would make the two differ, and another run choose otherwise
    with torch.no_grad():
        hidden = decoder(input_ids=ids, use_cache=False).last_hidden_state
        wanted = model(input_ids=ids, use_cache=False).logits
        got = head.logits(hidden)
    model.train(was_training)
    tolerance = 16 * torch.finfo(got.dtype).eps * wanted.abs().max().item()
    if got.shape != wanted.shape or (got - wanted).abs().max().item() > tolerance:
        logger.info("the loss goes through %s's own head, which does more than a linear", type(model).__name__)
        head = None  # type: ignore[assignment]
    _heads[model] = head
    return head


def _logit_scale(model: PreTrainedModel, config: object) -> float:
    """Factor on the logits: Cohere multiplies, Granite divides."""
    scale = getattr(model, "logit_scale", None)
    if isinstance(scale, int | float):
        return float(scale)
    scaling = getattr(config, "logits_scaling", None)
    return 1.0 / scaling if isinstance(scaling, int | float) else 1.0
