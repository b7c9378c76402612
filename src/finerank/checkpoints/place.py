"""An adapter of any format put into a running model: PEFT's, a run's, or a Megatron LoRA checkpoint.

    adapters = place_adapter(model, Path("megatron_lora"), trainable=True)

What comes from Megatron becomes PEFT's form on the way; modules that shared a `lora_A` there share it here.
"""

import hashlib
import logging
import tempfile
from collections import Counter
from pathlib import Path

from torch import nn

from finerank.adapters.adapter_set import AdapterSet
from finerank.adapters.files import SHARED, load_adapter
from finerank.adapters.targets import GROUPS
from finerank.checkpoints.formats import legacy, mcore, peft
from finerank.checkpoints.lora import Adapter
from finerank.checkpoints.megatron_read import MegatronCheckpoint
from finerank.errors import CheckpointError
from finerank.files import sha256_file

logger = logging.getLogger(__name__)


def place_adapter(
    model: nn.Module, folder: Path, *, trainable: bool = False, lora_alpha: float | None = None
) -> AdapterSet:
    """Put an adapter folder's adapter into a model.

    Args:
        model: the base it was trained on.
        folder: of any format that holds adapters.
        trainable: whether it gets gradients.
        lora_alpha: used where a Megatron checkpoint does not record its own.

    Raises:
        AdapterError: files missing or damaged, or that do not fit the model.
        CheckpointError: a torn Megatron checkpoint.
    """
    folder = Path(folder)
    if not is_megatron(folder):
        return load_adapter(model, folder, trainable=trainable)
    found = mcore if mcore.matches(folder) else legacy
    if not found.holds_adapter(folder):
        raise CheckpointError(f"{folder} holds no adapter, only a base model; give it with --load.")
    alpha = lora_alpha if lacks_alpha(folder) else None
    if alpha is not None:
        logger.warning("%s does not record its alpha; %g is used, as --lora-alpha says", folder, alpha)
    adapter = found.read_adapter(folder, hf_config=model.config.to_dict(), lora_alpha=alpha)  # type: ignore[union-attr, operator]
    with tempfile.TemporaryDirectory(prefix="finerank-adapter-") as scratch:
        peft.write_adapter(adapter, Path(scratch), metadata=_sharing(adapter))
        return load_adapter(model, Path(scratch), trainable=trainable)


def _sharing(adapter: Adapter) -> dict[str, str]:
    """The note of a file in which the copies of one `lora_A` are to be one again; `load_adapter` compares them."""
    parents = Counter((name.rpartition(".")[0], g) for g in GROUPS for name in adapter.factors if _in(name, g))
    groups = dict.fromkeys(group for (_, group), number in parents.items() if number > 1)
    return {SHARED: " ".join(groups)} if groups else {}


def _in(name: str, group: str) -> bool:
    return group.startswith("linear_") and name.rpartition(".")[2] in GROUPS[group]


def is_megatron(folder: Path) -> bool:
    """A Megatron checkpoint, not an adapter in PEFT's form."""
    return folder.is_dir() and not peft.matches(folder) and (mcore.matches(folder) or legacy.matches(folder))


def lacks_alpha(folder: Path) -> bool:
    """A Megatron checkpoint that does not say its alpha."""
    return is_megatron(folder) and not isinstance(MegatronCheckpoint.open(folder).args.get("lora_alpha"), int | float)


def adapter_digest(folder: Path) -> str:
    """sha256 of the adapter's weights: of one file, or of all tensor files of a Megatron checkpoint by name."""
    if not is_megatron(folder):
        return sha256_file(folder / peft.TENSORS)
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.pt")):
        digest.update(f"{path.relative_to(folder).as_posix()} {sha256_file(path)}\n".encode())
    return digest.hexdigest()
