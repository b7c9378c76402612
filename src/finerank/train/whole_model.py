"""`--method full`: every weight of the base model is trained, the baseline that adapters are compared with.

    trained = WholeModel(loaded.model)
    loop = TrainLoop(loaded.model, trained, ..., after_write=trained.after_write)
    save_whole_model(trained, run, source=loaded.source.path, write_more=tokenizer.save_pretrained)

A model in bf16 keeps an fp32 master of each weight, as its updates are mostly smaller than bf16 can add. The optimizer,
the gradient norm and checkpoints see the masters; after each step they are rounded into the model, which computes as it
will after saving. A weight hands its gradient to its master as soon as backward has it, so micro-batches are summed in
fp32. Two gradients would be sums in bf16 already when autograd gives them, and are taken apart:

* an embedding's, over all tokens of a kind: it is asked for as a sparse one, which lists the tokens' rows;
* a tied embedding's and head's: they are two parameters in the same memory while training.

What a run leaves is an ordinary Hugging Face folder, `RUN/model`, in the base's precision.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from finerank.adapters.embedding import embedding_and_head, is_tied
from finerank.checkpoints.checksums import FILE_NAME, write_checksums
from finerank.checkpoints.formats import hf
from finerank.checkpoints.weights import BaseModel, in_memory
from finerank.files import replace_folder, sha256_file
from finerank.models.find import WHOLE_MODEL


class WholeModel:
    """All weights of a model as what is trained; see the module's docstring."""

    def __init__(self, model: PreTrainedModel):
        """`model`: frozen and in training's precision; its weights get gradients and, in bf16, fp32 masters."""
        self.model = model.requires_grad_(True)
        self.lr_ratios: Mapping[Tensor, float] = {}
        """As an adapter's; no weight has a learning rate of its own."""
        self._weights = dict(model.named_parameters())  # tied ones once
        self._masters = {name: _master(weight) for name, weight in self._weights.items()}
        self._tied_head: nn.Module | None = None
        _, head = embedding_and_head(model)
        if head is not None and is_tied(model) and _needs_master(shared := head.weight):
            (master,) = (self._masters[name] for name, weight in self._weights.items() if weight is shared)
            self._tied_head, head.weight = head, nn.Parameter(shared.detach())  # type: ignore[operator, union-attr]
            _hand_over_to(master, head.weight)
        for module in model.modules():
            if isinstance(module, nn.Embedding) and _needs_master(module.weight):
                module.sparse = module.weight.device.type in ("cpu", "cuda")

    def named_parameters(self) -> list[tuple[str, Tensor]]:
        """What the optimizer changes, in fp32, by the model's own names."""
        return list(self._masters.items())

    def parameters(self) -> list[Tensor]:
        """The same without names."""
        return list(self._masters.values())

    @property
    def num_parameters(self) -> int:
        """Trained numbers."""
        return sum(master.numel() for master in self._masters.values())

    @torch.no_grad()
    def after_write(self) -> None:
        """Round the masters into the model."""
        for name, weight in self._weights.items():
            if self._masters[name] is not weight:
                weight.copy_(self._masters[name])

    def tensors(self) -> dict[str, Tensor]:
        """The model's weights and buffers under the names of a file, in its precision; what is tied comes once."""
        tied = {id(self._tied_head.weight)} if self._tied_head is not None else set()
        known = {id(weight) for weight in self._weights.values()}
        named = self.model.state_dict(keep_vars=True)
        own: dict[str, Tensor] = {}
        for name, tensor in named.items():
            is_copy = id(tensor) in tied or (id(tensor) in known and name not in self._weights)
            if not is_copy:
                own[name] = tensor.detach()
        return revert_weight_conversion(self.model, own)


def _needs_master(weight: Any) -> bool:
    return torch.finfo(weight.dtype).bits < 32


def _master(weight: nn.Parameter) -> Tensor:
    if not _needs_master(weight):
        return weight
    master = weight.detach().float().requires_grad_()
    _hand_over_to(master, weight)
    return master


def _hand_over_to(master: Tensor, weight: Any) -> None:
    """Let a weight add each gradient that it gets to its master's, and keep none."""

    def hand_over(weight: Tensor) -> None:
        grad, weight.grad = weight.grad, None
        assert grad is not None
        if master.grad is None:
            master.grad = torch.zeros_like(master)
        if grad.is_sparse:  # as backward made it: a row for each token, with repetitions
            master.grad.index_add_(0, grad._indices()[0], grad._values().float())
        else:
            master.grad.add_(grad)

    weight.register_post_accumulate_grad_hook(hand_over)


def save_whole_model(
    trained: WholeModel, run: Path, *, source: Path | None, write_more: Callable[[Path], Any]
) -> tuple[Path, str]:
    """Write the model as a Hugging Face folder into the run folder, whole or not at all.

    Args:
        trained: what is written, in the model's precision.
        run: the run folder.
        source: folder of the base, whose generation settings and other text files go with the result.
        write_more: writes tokenizer and template into the folder.

    Returns:
        The folder, and the SHA-256 of its weight file (of several: of `checksums.json`, which lists theirs).

    Raises StorageError.
    """
    config = trained.model.config.to_diff_dict() | {"architectures": [type(trained.model).__name__]}
    base = BaseModel(config=config, weights=in_memory(trained.tensors()), folder=source, is_in_folder=False)
    target = run / WHOLE_MODEL
    with replace_folder(target) as aside:
        hf.write(base, aside)
        write_more(aside)
        write_checksums(aside)
    single = target / hf.SINGLE
    return target, sha256_file(single if single.is_file() else target / FILE_NAME)
