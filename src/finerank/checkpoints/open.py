"""Open a base model or an adapter of any format: the formats folder is asked whose it is.

base = open_base("smollm2-135m")            alias, folder of any format, hub id or .gguf file
adapter = open_adapter(Path("run"))         PEFT folder, run folder or Megatron LoRA checkpoint
"""

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from finerank import registry
from finerank.adapters.files import check_holds_adapter
from finerank.checkpoints.checksums import check_checksums
from finerank.checkpoints.formats import hf, peft
from finerank.checkpoints.lora import Adapter
from finerank.checkpoints.weights import BaseModel
from finerank.errors import AdapterError, CheckpointError
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
    """A base model by alias, folder, hub id or .gguf file. Raises CheckpointError or ModelError.

    `options` go to the reader of a Megatron or Meta folder.
    """
    from finerank.models.find import find_model, whole_model_of

    folder = Path(name).expanduser()
    folder = whole_model_of(folder) or folder
    check_checksums(folder)
    if folder.is_dir() and (found := format_of(folder, "base")) not in (None, hf):
        assert found is not None
        return found.read(folder, **options)
    return hf.read(find_model(ModelSettings(load=name)).folder)


def named_base(folder: Path) -> str:
    """The base model that a PEFT or run folder names. Raises CheckpointError when it names none."""
    check_holds_adapter(Path(folder).expanduser())
    path = Path(folder).expanduser() / peft.CONFIG
    if not path.is_file():
        raise CheckpointError(f"{folder} holds no {peft.CONFIG} that names its base model; give the base with --load.")
    name = hf.read_json(path).get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise CheckpointError(f"{path} does not name its base model; give it with --load.")
    return name


def open_adapter(
    folder: Path,
    *,
    hf_config: dict[str, Any] | None = None,
    lora_r: int | None = None,
    lora_alpha: float | None = None,
    lora_target_modules: Sequence[str] | None = None,
) -> Adapter:
    """An adapter of any format. Raises CheckpointError or AdapterError.

    Args:
        hf_config: of the base model; a Megatron LoRA checkpoint needs it where its args do not describe the model.
        lora_r, lora_alpha, lora_target_modules: must agree with the adapter; alpha is used where it records none.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise CheckpointError(f"There is no folder {folder}; give the folder of an adapter or of a run.")
    check_holds_adapter(folder)
    check_checksums(folder)
    found = format_of(folder, "adapter")
    if found is None:
        raise CheckpointError(f"{folder} holds no adapter: {peft.CONFIG} is missing; give a PEFT or a run folder.")
    if found is peft:
        adapter = peft.read_adapter(folder)
        _check_flags(adapter, lora_r, lora_alpha, lora_target_modules)
        return adapter
    flags = {"lora_r": lora_r, "lora_alpha": lora_alpha, "lora_target_modules": lora_target_modules}
    return found.read_adapter(folder, hf_config=hf_config, **flags)


def _check_flags(adapter: Adapter, r: int | None, alpha: float | None, targets: Sequence[str] | None) -> None:
    """A flag that disagrees with what the adapter records is an error, so nobody merges with a wrong alpha."""
    stored_targets = adapter.config.get("target_modules")
    stored = {
        "--lora-r": (r, adapter.config.get("r")),
        "--lora-alpha": (alpha, adapter.config.get("lora_alpha")),
        "--lora-target-modules": (
            sorted(targets) if targets is not None else None,
            sorted(stored_targets) if isinstance(stored_targets, list) else stored_targets,
        ),
    }
    for flag, (given, recorded) in stored.items():
        if given is not None and given != recorded:
            raise AdapterError(f"{flag} {given} disagrees with {adapter.source}, which has {recorded}; leave it out.")
