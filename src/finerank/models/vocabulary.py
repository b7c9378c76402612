"""New tokens: the tokenizer learns their names, and the embeddings grow by rows for them.

    ids = add_tokens(tokenizer, ["<tool>", "</tool>"])
    grow_vocabulary(model, len(tokenizer))

A new row starts as the mean of the rows that tokens had before, in the embedding and in the head, so a fresh token is
an average one, and the same in every run. Rows that a model already has beyond its tokenizer's ids (vocabularies are
often padded) are used first, and get the same start.
"""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import AddedToken
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from finerank.errors import ConfigError, ModelError

logger = logging.getLogger(__name__)


def add_tokens(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> list[int]:
    """Put tokens into a tokenizer and give their ids; one that it has already keeps its id.

    They are ordinary tokens, so answers show them, and they are found anywhere in a text.

    Raises ConfigError for a token that is empty, blank or named twice.
    """
    for token in tokens:
        if not token.strip() or list(tokens).count(token) > 1:
            raise ConfigError(f"--add-tokens: {token!r} is blank or given twice; name each new token once.")
    known = tokenizer.get_vocab()
    if old := [token for token in tokens if token in known]:
        logger.warning("%s is in the vocabulary already: its row is trained, and no new one is made", ", ".join(old))
    fresh = [AddedToken(token, normalized=False, special=False) for token in tokens if token not in known]
    tokenizer.add_tokens(fresh)  # type: ignore[arg-type]
    ids: Any = tokenizer.convert_tokens_to_ids(list(tokens))
    if any(i is None or tokenizer.convert_ids_to_tokens(i) != t for t, i in zip(tokens, ids, strict=True)):
        raise ConfigError(f"--add-tokens: this model's tokenizer does not take {' '.join(tokens)}; use other names.")
    return [int(i) for i in ids]


def grow_vocabulary(model: PreTrainedModel, num_tokens: int, *, num_known: int) -> None:
    """Give every id from `num_known` to `num_tokens` a mean row, in the embedding and in the head.

    Args:
        model: frozen; its embeddings are made longer where they have fewer than `num_tokens` rows, as is its config.
        num_tokens: ids that must have a row.
        num_known: ids that have a row that means something.

    Raises:
        ModelError: the model's head or embedding is of a kind that cannot grow.
    """
    matrices = _matrices(model)
    old = [weight[:num_known].float().mean(dim=0) for weight in matrices]
    if num_tokens > matrices[0].shape[0]:
        with torch.random.fork_rng(devices=[]):  # the library draws rows, which are replaced below
            model.resize_token_embeddings(num_tokens, mean_resizing=False)
        model.requires_grad_(False)
    for weight, mean in zip(_matrices(model), old, strict=True):
        if weight.shape[0] < num_tokens:
            raise ModelError(f"{type(model).__name__} cannot take new tokens: its output layer does not grow.")
        with torch.no_grad():
            weight[num_known:num_tokens] = mean.to(weight.dtype)


def _matrices(model: PreTrainedModel) -> list[Tensor]:
    """Embedding and head, the head only when it has weights of its own."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not isinstance(embedding, nn.Embedding) or not isinstance(head, nn.Linear):
        raise ModelError(f"{type(model).__name__} cannot take new tokens: its vocabulary is no plain matrix.")
    return [embedding.weight] if head.weight is embedding.weight else [embedding.weight, head.weight]
