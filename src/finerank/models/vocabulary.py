"""New tokens: once the tokenizer knows their names (`tokenizer.add_tokens`), the embeddings grow by rows for them.

    ids = add_tokens(tokenizer, ["<tool>", "</tool>"])
    grow_vocabulary(model, len(tokenizer), num_known=49152)

A new row starts as the mean of the rows that tokens had before, in the embedding and in the head, so a fresh token is
an average one, and the same in every run. Rows that a model already has beyond its tokenizer's ids (vocabularies are
often padded) are used first, and get the same start.
"""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from finerank.errors import ModelError


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
