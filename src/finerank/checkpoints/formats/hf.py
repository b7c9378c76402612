"""Hugging Face folder: config.json, safetensors in one file or in shards with an index, tokenizer files.

    model = read(folder)                      headers only; tensors are read when asked for
    write(model, folder)                      streams tensor by tensor; shards of at most 5 GB

The caller makes the writing atomic (`finerank.files.replace_folder`).
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from finerank.checkpoints.safetensors_file import SafetensorsReader, SafetensorsWriter
from finerank.checkpoints.weights import BaseModel, CastWeights, LazyWeights, TensorInfo, Weights
from finerank.errors import CheckpointError

HOLDS = ("base",)
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
MAX_SHARD_BYTES = 5_000_000_000
_TEXT_FILES = ("*.json", "*.model", "*.jinja", "merges.txt", "vocab.txt", "*.tiktoken", "LICENSE*", "NOTICE*")
_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "vocab.json", "merges.txt", "vocab.txt"),
    "template.json",  # which prompt template a run was trained with: the merged model is asked in the same way
)
_NOT_COPIED = {INDEX, "config.json", "adapter_config.json", "results.json", "template.json", "receipt.json"} | {
    # what finerank says of the folder it copies from, which would be untrue of the new one
    "answers.json",
    "checksums.json",
    "conversion_report.json",
    "merge_report.json",
    "source.json",
}


def matches(folder: Path) -> bool:
    """True for a folder with config.json and safetensors files."""
    return (folder / "config.json").is_file() and ((folder / INDEX).is_file() or any(folder.glob("*.safetensors")))


def read(folder: Path) -> BaseModel:
    """Open a folder. Raises CheckpointError naming the file that is missing or damaged."""
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"There is no folder {folder}; give the folder of a Hugging Face model.")
    config = read_json(folder / "config.json")
    return BaseModel(config=config, weights=read_weights(folder), folder=folder, is_in_folder=True)


def read_weights(folder: Path) -> Weights:
    """Tensors of all safetensors files of a folder. Raises CheckpointError."""
    entries: dict[str, Any] = {}
    for path, names in _files(folder).items():
        with SafetensorsReader(path) as reader:
            found = reader.entries
        missing = sorted((names or set()) - set(found))
        if missing:
            raise CheckpointError(f"{path} lacks {missing[0]}, which the index names; get the file again.")
        for name in names if names is not None else found:
            entries[name] = (found[name], _reader(path, name))
    return LazyWeights({name: entries[name] for name in sorted(entries, key=natural_order)}, source=str(folder))


def _files(folder: Path) -> dict[Path, set[str] | None]:
    """Safetensors files and the tensors to take from each; None takes all."""
    index = folder / INDEX
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{index} has no weight_map; get the file again.")
        files: dict[Path, set[str] | None] = {}
        for name, file in weight_map.items():
            if not isinstance(file, str) or Path(file).name != file:  # an index may not lead out of its folder
                raise CheckpointError(f"{index} names the file {file!r}, which is not a plain file name.")
            if not (folder / file).is_file():
                raise CheckpointError(f"{folder / file} is missing, and {index.name} names it; get the file again.")
            names = files.setdefault(folder / file, set())
            assert names is not None
            names.add(name)
        return files
    if (folder / SINGLE).is_file():
        return {folder / SINGLE: None}
    found = sorted(p for p in folder.glob("*.safetensors") if not p.name.startswith("adapter_"))
    if not found:
        raise CheckpointError(f"{folder} has no *.safetensors file; convert the model to safetensors first.")
    return dict.fromkeys(found)


def _reader(path: Path, name: str) -> Any:
    def read_tensor() -> Any:
        with SafetensorsReader(path) as reader:
            return reader.read(name)

    return read_tensor


def write(
    model: BaseModel, folder: Path, *, max_shard_bytes: int = MAX_SHARD_BYTES, dtype: torch.dtype | None = None
) -> None:
    """Write config, weights and tokenizer files into an existing empty folder, one tensor at a time.

    `dtype` casts floating tensors; None keeps what the model has.
    """
    if dtype is not None:
        model = replace(model, weights=CastWeights(model.weights, dtype))
    copy_text_files(model.folder, folder)
    write_json(folder / "config.json", with_dtype(model))
    # in the order of the source, so that what a reader has to take apart is asked for in one go
    shards = _shards({name: model.weights.info(name) for name in model.weights}, max_shard_bytes)
    weight_map = {}
    for i, shard in enumerate(shards, start=1):
        file = SINGLE if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        with SafetensorsWriter(folder / file, shard) as writer:
            for name in shard:
                writer.write(name, model.weights[name])
                weight_map[name] = file
    if len(shards) > 1:
        total = sum(info.nbytes for shard in shards for info in shard.values())
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _shards(infos: dict[str, TensorInfo], max_bytes: int) -> list[dict[str, TensorInfo]]:
    shards: list[dict[str, TensorInfo]] = [{}]
    used = 0
    for name, info in infos.items():
        if shards[-1] and used + info.nbytes > max_bytes:
            shards.append({})
            used = 0
        shards[-1][name] = info
        used += info.nbytes
    return shards


def with_dtype(model: BaseModel) -> dict[str, Any]:
    """The config, saying the dtype that the weights have."""
    config = dict(model.config)
    dtype = str(model.dtype).removeprefix("torch.")
    config["dtype"] = dtype
    if "torch_dtype" in config:
        config["torch_dtype"] = dtype
    return config


def copy_text_files(source: Path | None, target: Path) -> None:
    """Copy tokenizer, chat template and generation config; never weights, code, or what `write` makes itself."""
    if source is None:
        return
    for pattern in _TEXT_FILES:
        for path in sorted(source.glob(pattern)):
            is_index = path.name.endswith(".index.json")
            if path.is_file() and not is_index and path.name not in _NOT_COPIED:
                shutil.copyfile(path, target / path.name)
    templates = source / "additional_chat_templates"
    if templates.is_dir():
        shutil.copytree(templates, target / templates.name)


def copy_tokenizer(source: Path, target: Path) -> None:
    """Let the tokenizer and prompt template that an adapter brings along take the place of the base's."""
    if (source / "tokenizer.json").is_file() or (source / "tokenizer.model").is_file():
        for name in _TOKENIZER_FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, target / name)


def natural_order(name: str) -> tuple[tuple[int, int, str], ...]:
    """Sort key in which layer 2 comes before layer 10, the embedding first and the head last."""
    place = 0 if "embed" in name else 2 if ".layers." not in name else 1
    parts = tuple((0, int(p), "") if p.isdigit() else (1, 0, p) for p in name.split("."))
    return ((place, 0, ""), *parts)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises CheckpointError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing; give a folder that has it.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {' '.join(str(error).split())}.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object.")
    return value


def write_json(path: Path, value: Any) -> None:
    """Write JSON with sorted keys, so that the same content gives the same bytes."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
