"""Adapters in PEFT's file format: adapter_config.json and adapter_model.safetensors.

    save_adapter(adapters, folder, base_model_name="smollm2-135m")
    adapters = load_adapter(model, folder)                       # written by finerank or by PEFT

    base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight   fp32 [R, I]
    base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight   fp32 [O, R]

PEFT knows no shared lora_A: it is written once for each of its layers, and the safetensors metadata
`finerank_shared_lora_A` names the groups, so that training goes on with one. The same adapter gives the same bytes.
"""

import json
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from finerank.adapters.adapter_set import AdapterSet
from finerank.adapters.file_tensors import (
    CONFIG,
    TENSORS,
    check_tensors,
    drop_tied_head,
    grow_for,
    sort_tensors,
    take_experts,
)
from finerank.adapters.initial import check_base_unchanged
from finerank.adapters.inject import NEWER_KEYS, new_config, place_adapters
from finerank.adapters.new_tokens import rows_by_module
from finerank.adapters.parts import pair_names
from finerank.adapters.single_experts import join_single_experts
from finerank.adapters.targets import GROUPS, Target, linear_names
from finerank.errors import AdapterError
from finerank.files import replace_file
from finerank.models.find import TOKENIZER_FILES, whole_model_of

SHARED = "finerank_shared_lora_A"

# Features of LoraConfig that change what the tensors mean and are not offered for a running model.
_NEUTRAL: dict[str, Any] = {
    "bias": "none",
    "lora_bias": False,
    "layer_replication": None,
    "alora_invocation_tokens": None,
    "arrow_config": None,
    "use_qalora": False,
    "use_bdlora": None,
    "kasa_config": None,
    "monteclora_config": None,
    "velora_config": None,
}


def adapter_files(adapters: AdapterSet, *, base_model_name: str) -> dict[str, bytes]:
    """The adapter as file contents by name."""
    config = {**adapters.file_config(), "base_model_name_or_path": base_model_name}
    metadata = {"format": "pt"} | ({SHARED: " ".join(adapters.groups)} if adapters.groups else {})
    text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    return {CONFIG: text.encode(), TENSORS: _safetensors_bytes(adapters.state(), metadata)}


def save_adapter(adapters: AdapterSet, folder: Path, *, base_model_name: str) -> None:
    """Write both files into `folder`, each whole or not at all. Raises StorageError."""
    for name, content in adapter_files(adapters, base_model_name=base_model_name).items():
        with replace_file(Path(folder) / name) as aside:
            aside.write_bytes(content)


def _safetensors_bytes(tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> bytes:
    """The library writes metadata in an order that changes from run to run; here it is sorted."""
    content = safetensors.torch.save({k: t.cpu().contiguous().clone() for k, t in tensors.items()}, metadata)
    (size,) = struct.unpack_from("<Q", content)
    header = json.loads(content[8 : 8 + size])
    header["__metadata__"] = dict(sorted(metadata.items()))
    text = json.dumps(header, separators=(",", ":"), sort_keys=True).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + content[8 + size :]


def check_holds_adapter(folder: Path) -> None:
    """Raise AdapterError for a run of `--method full`, which trained no adapter."""
    if (model := whole_model_of(folder)) is not None:
        raise AdapterError(
            f"{folder} was trained with --method full and holds a whole model, no adapter: there is nothing to merge, "
            f"put on a base or export as one; use it as a model (it is in {model})."
        )


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """The content of adapter_config.json. Raises AdapterError when there is none, or it is no LoRA's."""
    check_holds_adapter(Path(folder))
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise AdapterError(f"{folder} holds no {CONFIG}; give the folder of a PEFT adapter or of a run.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(f"{path} cannot be read ({error}); copy the adapter again.") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise AdapterError(f"{path} describes a {kind} adapter; only LORA can be loaded.")
    check_base_unchanged(config, folder)
    if wrong := _wrong_value(config):
        raise AdapterError(f"{path}: {wrong} has no usable value; copy the adapter again.")
    return config


def brings_tokens(folder: Path) -> bool:
    """The adapter has tokens that its base may lack: it trains rows, or whole matrices, and has its own tokenizer."""
    if not (folder / CONFIG).is_file() or not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return False
    config = read_adapter_config(folder)
    return bool(config.get("trainable_token_indices") or config.get("modules_to_save"))


def _wrong_value(config: Mapping[str, Any]) -> str | None:
    """The first key whose value is not of the kind that PEFT writes; rank and alpha are looked at by layer."""
    for key in ("base_model_name_or_path", "revision"):
        if not isinstance(config.get(key), str | None):
            return key
    targets = config.get("target_modules")
    if not isinstance(targets, str | list | None) or not all(isinstance(t, str) for t in targets or ()):
        return "target_modules"
    dropout = config.get("lora_dropout", 0.0)
    if not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        return "lora_dropout"
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(key)
        if not isinstance(patterns, dict | None):
            return key
        for pattern in patterns or ():
            try:
                re.compile(rf"(.*\.)?({pattern})$")
            except (re.error, RecursionError, OverflowError):
                return key
    return None


def load_adapter(model: nn.Module, folder: Path, *, trainable: bool = False) -> AdapterSet:
    """Put an adapter folder's adapter into a model.

    Args:
        model: the base it was trained on; its linears are replaced in place.
        folder: with adapter_config.json and adapter_model.safetensors, by finerank or PEFT.
        trainable: whether the factors get gradients.

    Raises:
        AdapterError: files missing or damaged, features that are not supported, or layers that the model lacks.
    """
    folder = Path(folder)
    config = read_adapter_config(folder)
    for key, neutral in _NEUTRAL.items():
        if (config.get(key) or neutral) != neutral:
            raise AdapterError(
                f"{folder} uses {key} = {json.dumps(config[key])}, which finerank cannot run as an adapter; merge it "
                "into the base with PEFT, and load the merged model."
            )
    tensors, metadata = _read_tensors(folder / TENSORS)
    found = sort_tensors(tensors, folder)
    config = join_single_experts(model, found, config, folder)
    experts = take_experts(model, found, config)
    embedding, _ = pair_names(model)
    modules = [name for name, _ in model.named_modules()]
    indices = config.get("trainable_token_indices")
    rows = rows_by_module(indices, modules, embedding=embedding, source=str(folder / CONFIG))
    grow_for(model, found, rows, folder)
    check_tensors(model, found, config, folder, rows=rows)
    rows = {name: ids for name, ids in rows.items() if name in found.rows}
    if config.get("ensure_weight_tying"):
        drop_tied_head(model, found, folder)
    names = [name for name in linear_names(model) if name in found.linears]
    targets = _with_groups(names, found.linears, metadata.get(SHARED, "").split())
    # in the model's order, as a new adapter's: a file's tensors come in any
    targets += [*experts, *(Target(name, kind="embedding") for name in modules if name in found.embeddings)]
    saved = [name for name in modules if name in found.whole]
    adapters = place_adapters(model, targets, _normal(config), saved=saved, rows=rows, seed=0, trainable=trainable)
    with torch.no_grad():
        for name, layer in adapters.layers.items():
            layer.lora_A.copy_(found.linears[name]["lora_A"])
            layer.lora_B.copy_(found.linears[name]["lora_B"])
            if layer.lora_magnitude_vector is not None:
                layer.lora_magnitude_vector.copy_(found.linears[name]["lora_magnitude_vector"])
        for name, part in adapters.parts.items():
            part.load_(found.of_part(name))
    return adapters


def _read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if not path.is_file():
        pickled = path.with_suffix(".bin").name
        found = f"only {pickled}, a pickle, which is never opened: save it again with PEFT"
        missing = found if path.with_suffix(".bin").is_file() else "copy the adapter again"
        raise AdapterError(f"{path} is missing; {missing}.")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise AdapterError(f"{path} is damaged ({error}); copy the adapter again.") from error


def _with_groups(names: list[str], layers: Mapping[str, Mapping[str, Tensor]], groups: list[str]) -> list[Target]:
    """Targets that share a lora_A again, where the file says so and the copies are still equal."""
    targets = []
    first: dict[str, str] = {}
    for name in names:
        parent, _, last = name.rpartition(".")
        group = next((f"{parent}:{g}" for g in groups if last in GROUPS.get(g, ())), None)
        if group is not None:
            leader = first.setdefault(group, name)
            if not torch.equal(layers[leader]["lora_A"], layers[name]["lora_A"]):
                group = None  # another program trained them apart
        targets.append(Target(name, group))
    return targets


def _normal(config: Mapping[str, Any]) -> dict[str, Any]:
    """What `AdapterSet.config` promises, from a config that may lack keys of other PEFT versions."""
    known = {*new_config(), *NEWER_KEYS}
    return new_config(**{key: value for key, value in config.items() if key in known} | {"inference_mode": True})
