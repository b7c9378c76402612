"""Open a base model or an adapter of any format: the formats folder is asked whose it is.

base = open_base("smollm2-135m")            alias, folder of any format, hub id or .gguf file
adapter = open_adapter(Path("run"))         PEFT folder, run folder or Megatron LoRA checkpoint
"""

from pathlib import Path
from types import ModuleType
from typing import Any

from finerank import registry
from finerank.checkpoints.formats import hf, peft
from finerank.checkpoints.lora import Adapter
from finerank.checkpoints.weights import BaseModel
from finerank.errors import CheckpointError
from finerank.models.settings import ModelSettings

FORMATS = "finerank.checkpoints.formats"


def formats() -> dict[str, ModuleType]:
    """Every format by name."""
    return {name: registry.load(FORMATS, name, "checkpoint format") for name in registry.names(FORMATS)}


def format_of(folder: Path, holds: str) -> ModuleType | None:
    """The format whose folder this is, among those that hold a `base` or an `adapter`; None when none says so."""
    found = [m for m in formats().values() if holds in m.HOLDS and m.matches(folder)]
    return found[0] if found else None


def open_base(name: str, **options: Any) -> BaseModel:
    """A base model by alias, folder, hub id or .gguf file. Raises CheckpointError or ModelError."""
    from finerank.models.find import find_model

    folder = Path(name).expanduser()
    if folder.is_dir() and (found := format_of(folder, "base")) not in (None, hf):
        assert found is not None
        return found.read(folder, **options)
    return hf.read(find_model(ModelSettings(load=name)).folder)


def open_adapter(folder: Path, **options: Any) -> Adapter:
    """An adapter of any format. Raises CheckpointError or AdapterError."""
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise CheckpointError(f"There is no folder {folder}; give the folder of an adapter or of a run.")
    found = format_of(folder, "adapter")
    if found is None:
        raise CheckpointError(f"{folder} holds no adapter: {peft.CONFIG} is missing; give a PEFT or a run folder.")
    return found.read_adapter(folder, **options) if found is not peft else peft.read_adapter(folder)
