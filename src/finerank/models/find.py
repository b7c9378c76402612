"""From what the user named to a folder that holds a model, checked before anything heavy starts.

    smollm2-135m                     the model that is always there (models/default_model.py)
    ./model, /data/model             a Hugging Face folder
    model.Q8_0.gguf                  a GGUF file, converted once into the cache folder
    Qwen/Qwen3-0.6B                  a hub id; HF_HOME, HF_HUB_OFFLINE, HF_ENDPOINT and HF_TOKEN are honoured
    runs/whole                       a run of `--method full`, whose model lies in its folder `model`

A name that is an alias means the alias; write ./name for a folder of that name.
"""

import json
import os
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finerank.errors import ConfigError, ModelError, first_line
from finerank.models.settings import SourceSettings

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
"""Any one of these makes a folder hold a tokenizer."""

WHOLE_MODEL = "model"
"""Folder within a run that `--method full` writes."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_SMALL_FILES = ["*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken"]
_NOT_WANTED = ["original/*", "onnx/*", "consolidated*", "*/*.safetensors", "*/*.bin"]


@dataclass(frozen=True)
class FoundModel:
    """Where a model lies, and the name it is to be known by in adapter files."""

    folder: Path
    name: str


def find_model(settings: SourceSettings, *, weights: bool = True) -> FoundModel:
    """The folder of `--load`, fetched or converted if needed. `weights=False` fetches only its small files.

    Raises:
        ModelError: there is no such model, or what is there is no whole causal language model.
        StorageError: the cache folder cannot be written.
    """
    assert settings.load is not None
    found = _locate(settings.load, settings, weights=weights)
    if weights:
        check_folder(found.folder, settings.load)
    return found


def find_tokenizer(settings: SourceSettings) -> FoundModel:
    """The tokenizer's folder, under the name it was given: `--tokenizer-name-or-path`, else the model's.

    Raises ConfigError, ModelError.
    """
    if (named := settings.tokenizer_name_or_path) is not None:
        own = SourceSettings(trust_remote_code=settings.trust_remote_code)  # a revision is the model's
        return FoundModel(_locate(named, own, weights=False).folder, named)
    if settings.load is not None:
        return FoundModel(find_model(settings, weights=False).folder, settings.load)
    return FoundModel(config_folder(settings), str(settings.model_config))


def config_folder(settings: SourceSettings) -> Path:
    """The folder of `--model-config`. Raises ConfigError when there is none."""
    if settings.model_config is None:
        raise ConfigError("No model is named: give --load smollm2-135m (or a folder, hub id or .gguf file).")
    path = Path(settings.model_config).expanduser()
    folder = path.parent if path.is_file() else path
    if not folder.is_dir() or (path.is_file() and path.name != "config.json"):
        raise ConfigError(f"--model-config {path} is no config.json and no folder that holds one.")
    return folder


def _locate(name: str, settings: SourceSettings, *, weights: bool) -> FoundModel:
    from finerank.models import cache, default_model

    path = Path(name).expanduser()
    if name in default_model.ALIASES:
        folder = default_model.alias_folder(name)
        return FoundModel(folder, str(folder))
    if path.is_dir():
        folder = whole_model_of(path) or path
        return FoundModel(folder, str(folder.resolve()))
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelError(f"{name} is a file, not a model: give a Hugging Face folder, a .gguf file or a hub id.")
        folder = cache.gguf_folder(path)
        return FoundModel(folder, str(folder))
    if path.name in default_model.ALIASES and path.parent.name == "models":
        # the folder of an alias on the machine where an adapter was trained; here it may lie elsewhere
        return _locate(path.name, settings, weights=weights)
    if not _HUB_ID.fullmatch(name) or path.suffix == ".gguf":
        raise ModelError(
            f"There is no model at {name}: give an existing folder or .gguf file, a hub id, or "
            f"{', '.join(default_model.ALIASES)}."
        )
    return FoundModel(fetch_from_hub(name, settings.revision, weights=weights, code=settings.trust_remote_code), name)


def fetch_from_hub(name: str, revision: str | None, *, weights: bool = True, code: bool = False) -> Path:
    """The local snapshot of a hub repository; only safetensors weights, or `.bin` where there are none.

    Raises ModelError with the reason: offline and not cached, unknown id or revision, or no permission.
    """
    small = _SMALL_FILES + (["*.py"] if code else [])
    folder = _snapshot(name, revision, small + (["*.safetensors"] if weights else []))
    if weights and not any(folder.glob("*.safetensors")):
        folder = _snapshot(name, revision, [*small, "*.bin"])
    return folder


def _snapshot(name: str, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import constants, errors, snapshot_download

    fix = "give an existing folder, or smollm2-135m, which needs no hub"
    try:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                allow_patterns=patterns,
                ignore_patterns=_NOT_WANTED,
                endpoint=os.environ.get("HF_ENDPOINT"),
            )
        )
    except errors.GatedRepoError as error:
        raise ModelError(
            f"The hub model {name} is gated: accept its terms on its page and set HF_TOKEN to your token."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ModelError(f"The hub model {name} has no revision '{revision}'; give another --revision.") from error
    except errors.RepositoryNotFoundError as error:
        raise ModelError(
            f"There is no folder and no hub model {name} (if it is private, set HF_TOKEN); check the name, or {fix}."
        ) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        if constants.HF_HUB_OFFLINE:
            raise ModelError(
                f"{name} is no folder, and HF_HUB_OFFLINE is set while it is not in the hub cache; unset it, or {fix}."
            ) from error
        raise ModelError(
            f"{name} is no folder, and the hub cannot be reached; check the network and HF_ENDPOINT, or {fix}."
        ) from error
    except Exception as error:  # the hub library's HTTP client, which it has changed before, has errors of its own
        raise ModelError(f"Cannot fetch {name} from the hub: {first_line(error)}; {fix}.") from error


def whole_model_of(run: Path) -> Path | None:
    """The model folder in a run folder of `--method full`; None for any other folder."""
    inner = run / WHOLE_MODEL
    is_run = (inner / "config.json").is_file() and not (run / "config.json").is_file()
    return inner if is_run and not (run / "adapter_config.json").is_file() else None


def check_folder(folder: Path, name: str) -> None:
    """Raise ModelError unless `folder` holds a config and whole weight files; reads headers only."""
    read_config_json(folder, name)
    for path in weight_files(folder, name):
        if path.suffix == ".safetensors":
            read_safetensors_header(path)


def read_config_json(folder: Path, name: str) -> dict[str, Any]:
    """The folder's config.json. Raises ModelError that says what the folder is instead."""
    path = folder / "config.json"
    if not path.is_file():
        raise ModelError(f"{name} {_what_is_it(folder)}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not readable JSON ({first_line(error)}); restore the file.") from error
    if not isinstance(config, dict) or "model_type" not in config:
        raise ModelError(f"{path} names no model_type, so it is no Hugging Face model config; restore the file.")
    quantization = config.get("quantization_config")
    if isinstance(quantization, dict) and (method := quantization.get("quant_method")):
        raise ModelError(f"{name} is stored quantised ({method}), which cannot be tuned; give the unquantised model.")
    return config


def _what_is_it(folder: Path) -> str:
    if (folder / "adapter_config.json").is_file():
        return "is an adapter, not a base model: give --load BASE --lora-load ADAPTER."
    if (folder / "latest_checkpointed_iteration.txt").is_file() or any(folder.glob("**/model_optim_rng.pt")):
        return "is a Megatron checkpoint: convert it to a Hugging Face folder with finerank convert."
    if (folder / "manifest.json").is_file() and (folder / "state.safetensors").is_file():
        return "holds the state of a run of --method full, not a model: give the run's folder once it is finished."
    if any(folder.glob("consolidated.*.pth")):
        return "is a Meta checkpoint: convert it to a Hugging Face folder with finerank convert."
    if files := sorted(folder.glob("*.gguf")):
        return f"has no config.json but a GGUF file: give --load {files[0]}."
    return "is no model folder: it has no config.json; give a folder with config.json and *.safetensors."


def weight_files(folder: Path, name: str) -> list[Path]:
    """The folder's weight files, whole list. Raises ModelError when there are none or one of them is missing."""
    for kind in ("model.safetensors", "pytorch_model.bin"):
        if (folder / kind).is_file():
            return [folder / kind]
        index = folder / f"{kind}.index.json"
        if not index.is_file():
            continue
        try:
            files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            if strange := [file for file in files if Path(file).name != file or "\0" in file]:
                raise ValueError(f"it names {strange[0]!r}, which is no file of this folder")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ModelError(f"{index} is damaged ({first_line(error)}); restore the file.") from error
        missing = [file for file in files if not (folder / file).is_file()]
        if missing:
            raise ModelError(
                f"{name} lacks {len(missing)} of {len(files)} weight files, e.g. {missing[0]}; copy them too."
            )
        return [folder / file for file in files]
    raise ModelError(f"{name} has a config.json but no weights (model.safetensors); copy them too.")


def read_safetensors_header(path: Path) -> bytes:
    """The header of a safetensors file, held against the file's size. Raises ModelError for a torn file."""
    size = path.stat().st_size
    try:
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(size, 100 << 20):
                raise ValueError("its header is longer than the file")
            header = file.read(length)
        tensors = {k: v for k, v in json.loads(header).items() if k != "__metadata__"}
        end = 8 + length + max((t["data_offsets"][1] for t in tensors.values()), default=0)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, struct.error) as error:
        raise ModelError(f"{path} is no safetensors file or is torn ({first_line(error)}); copy it again.") from error
    if end != size:
        raise ModelError(f"{path} is torn: {size} bytes, but its header promises {end}; copy it again.")
    return header
