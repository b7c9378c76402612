"""What a run is made of: the contents it starts from, by digest, and the environment that computes.

A checkpoint carries it (`train.resume` compares), and reference log-probabilities are kept under it.
"""

from pathlib import Path
from typing import Any, Protocol

import torch

from finerank import config
from finerank.checkpoints.place import adapter_digest
from finerank.data.dataset import Splits
from finerank.data.templates import Template
from finerank.models.load import LoadedModel
from finerank.train import run_folder
from finerank.train.resume import origin_of


class _Settings(Protocol):
    lora_load: str | None


def origin_of_run(settings: Any, loaded: LoadedModel, template: Template, splits: Splits) -> dict[str, Any]:
    """Settings that decide the result, digests and environment, as JSON values; see `resume.origin_of`."""
    digests = {
        "data": splits.train.digest,
        "held-out data": splits.valid.digest if splits.valid is not None else None,
        "template": template.digest,
        **_start(settings, loaded),
    }
    return origin_of(config.to_dict(settings), digests=digests, environment=_environment(loaded))


def reference_of_run(settings: Any, loaded: LoadedModel) -> dict[str, Any]:
    """What decides the numbers of the model before training, beside the rows and how they are laid out."""
    quantised = {name: getattr(settings, name) for name in ("load_4bit", "load_8bit", "fused")}
    return {**_start(settings, loaded), **_environment(loaded), **quantised}


def _start(settings: _Settings, loaded: LoadedModel) -> dict[str, str | None]:
    adapter = adapter_digest(Path(settings.lora_load)) if settings.lora_load else None
    return {"base model": loaded.source.digest, "starting adapter": adapter}


def _environment(loaded: LoadedModel) -> dict[str, str | int]:
    device = loaded.model.device
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        **run_folder.versions(),
    }
