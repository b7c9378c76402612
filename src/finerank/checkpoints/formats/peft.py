"""PEFT adapter folder: adapter_config.json and adapter_model.safetensors.

    base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight      [R, I]
    base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight      [O, R]
    base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector   [O]     DoRA
    base_model.model.model.embed_tokens.lora_embedding_A                [R, V]  (and _B [D, R])
    base_model.model.model.layers.0.mlp.experts.lora_A.weight           [E R, I]  fused experts (`target_parameters`)
    base_model.model.lm_head.weight                                     a module saved whole
    base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta    rows [number of ids, D]

Reference: `peft.utils.save_and_load.get_peft_model_state_dict`.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from finerank.adapters.experts import PARAMETERS, adapted_parameters, leaf
from finerank.adapters.initial import check_base_unchanged
from finerank.adapters.new_tokens import ROWS, rows_by_module
from finerank.adapters.shapes import shape_of
from finerank.checkpoints.formats.hf import read_json, write_json
from finerank.checkpoints.lora import Adapter, Factors, Rows
from finerank.checkpoints.safetensors_file import SafetensorsReader, SafetensorsWriter
from finerank.checkpoints.weights import TensorInfo
from finerank.errors import AdapterError, CheckpointError

HOLDS = ("adapter",)
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
_FACTOR = re.compile(
    r"(?P<module>.+)\.(?P<kind>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)(\.default)?(\.weight)?"
)


def matches(folder: Path) -> bool:
    """True for a folder with adapter_config.json."""
    return (folder / CONFIG).is_file()


def read_adapter(folder: Path) -> Adapter:
    """Read an adapter whole; adapters are small. Raises AdapterError for what merging would get wrong."""
    folder = Path(folder)
    config = read_json(folder / CONFIG)
    _refuse_unknown_kinds(config, folder)
    tensors = _read_tensors(folder)
    rows = _rows(config, tensors, folder)
    factors, whole = _assemble(config, tensors, folder)
    if not factors and not whole and not rows:
        raise AdapterError(f"{folder / TENSORS} holds no adapter tensor; train it again or give another adapter.")
    return Adapter(config=config, factors=factors, whole=whole, rows=rows, source=str(folder))


def _rows(config: dict[str, Any], tensors: dict[str, Tensor], folder: Path) -> dict[str, Rows]:
    """Take the trained rows out of `tensors`."""
    keys = [key for key in tensors if key.removesuffix(".default").endswith(f".{ROWS}")]
    names = {key.removesuffix(".default").removesuffix(f".{ROWS}").removeprefix(PREFIX): key for key in keys}
    embedding = next((name for name in names if name != "lm_head"), None)
    indices = config.get("trainable_token_indices")
    if isinstance(indices, dict) and "lm_head" not in names:  # a tied head, which has the embedding's rows
        indices = {suffix: ids for suffix, ids in indices.items() if suffix.rpartition(".")[2] != "lm_head"}
    ids = rows_by_module(indices, list(names), embedding=embedding, source=str(folder / CONFIG))
    if set(ids) != set(names) or any(tensors[names[n]].shape[:1] != (len(i),) for n, i in ids.items()):
        raise AdapterError(f"{folder}: trainable_token_indices in {CONFIG} and {TENSORS} disagree; copy it again.")
    return {name: Rows(ids[name], tensors.pop(key)) for name, key in names.items()}


def _refuse_unknown_kinds(config: dict[str, Any], folder: Path) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise AdapterError(f"{folder} is a {kind} adapter; only LORA (also DoRA, rsLoRA, LU-LoRA) is supported.")
    check_base_unchanged(config, folder)
    for key in ("layer_replication", "alora_invocation_tokens", "arrow_config", "use_bdlora"):
        if config.get(key):
            raise AdapterError(
                f"{folder} uses {key}, which cannot be folded into one weight; merge it with PEFT itself."
            )


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    path = folder / TENSORS
    if path.is_file():
        with SafetensorsReader(path) as reader:
            return {name: reader.read(name) for name in reader.entries}
    if (folder / "adapter_model.bin").is_file():
        raise CheckpointError(f"{folder} holds adapter_model.bin, a pickle; save it again as safetensors with PEFT.")
    raise CheckpointError(f"{path} is missing; give the folder of a PEFT adapter or of a run.")


def _assemble(
    config: dict[str, Any], tensors: dict[str, Tensor], folder: Path
) -> tuple[dict[str, Factors], dict[str, Tensor]]:
    parts: dict[str, dict[str, Tensor]] = {}
    whole: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        match = _FACTOR.fullmatch(name)
        if match:
            parts.setdefault(match["module"], {})[match["kind"]] = tensor
        elif "lora" in name or "trainable_tokens" in name:
            raise AdapterError(
                f"{folder}: tensor {key} is of a kind that is not understood; merge it with PEFT itself."
            )
        else:
            whole[_whole_name(name)] = tensor
    experts = _take_experts(config, parts)
    factors = {module: _factors(config, module, part, folder) for module, part in parts.items()}
    for name, part in experts.items():
        factors[name] = _expert_factors(config, name, part, folder)
    return dict(sorted(factors.items())), whole


def _take_experts(config: dict[str, Any], parts: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """Take the factors of fused experts out of `parts`; by parameter name."""
    found: dict[str, dict[str, Tensor]] = {}
    for module in sorted(
        {m.replace(".base_layer", "") for m in parts if m.replace(".base_layer", "").endswith(".experts")}
    ):
        pairs = [m for m in sorted(parts, key=len) if m.replace(".base_layer", "") == module]
        parameters = adapted_parameters(config, module, len(pairs))
        for pair, parameter in zip(pairs, reversed(parameters), strict=True):
            found[f"{module}.{parameter}"] = parts.pop(pair)
    return found


def _expert_factors(config: dict[str, Any], name: str, part: dict[str, Tensor], folder: Path) -> Factors:
    a, b = part.get("lora_A"), part.get("lora_B")
    shape = shape_of(config, name)
    if a is None or b is None or a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1] or a.shape[0] % shape.rank:
        raise AdapterError(
            f"{folder}: the factors of {name} do not fit each other, or not the rank {shape.rank} of {CONFIG}; copy it "
            "again."
        )
    return Factors(a, b, shape.scale, num_experts=a.shape[0] // shape.rank)


def _whole_name(name: str) -> str:
    """`lm_head.modules_to_save.default.weight` and `q_proj.base_layer.bias` -> the names in the base's file."""
    return re.sub(r"\.modules_to_save(\.default)?", "", name).replace(".base_layer.", ".")


def _factors(config: dict[str, Any], module: str, part: dict[str, Tensor], folder: Path) -> Factors:
    is_embedding = "lora_embedding_A" in part
    a, b = (part.get(f"lora_embedding_{s}" if is_embedding else f"lora_{s}") for s in "AB")
    if a is None or b is None:
        raise AdapterError(f"{folder}: {module} has only one of lora_A and lora_B; the adapter file is incomplete.")
    if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:
        raise AdapterError(f"{folder}: {module} has lora_A {list(a.shape)} and lora_B {list(b.shape)}; ranks differ.")
    shape = shape_of(config, module)
    if shape.rank != a.shape[0]:
        raise AdapterError(
            f"{folder}: {module} has rank {a.shape[0]} in {TENSORS} and {shape.rank} in {CONFIG}; correct {CONFIG}."
        )
    magnitude = part.get("lora_magnitude_vector")
    if bool(config.get("use_dora")) != (magnitude is not None):
        raise AdapterError(f"{folder}: use_dora in {CONFIG} and the tensors of {module} disagree; correct {CONFIG}.")
    if magnitude is not None and is_embedding:
        raise AdapterError(f"{folder}: {module} is an embedding with DoRA, which is not supported; merge it with PEFT.")
    transposed = bool(config.get("fan_in_fan_out")) and not is_embedding
    return Factors(a, b, shape.scale, magnitude, is_embedding=is_embedding, is_transposed=transposed)


def write_adapter(adapter: Adapter, folder: Path, *, metadata: Mapping[str, str] | None = None) -> None:
    """Write an adapter into an existing folder: keys sorted, the same content gives the same bytes."""
    tensors: dict[str, Tensor] = {PREFIX + name: tensor for name, tensor in adapter.whole.items()}
    fused = {name for name, f in adapter.factors.items() if f.num_experts}
    for module, f in adapter.factors.items():
        if f.num_experts:
            owner, _, parameter = module.rpartition(".")
            where = leaf(parameter, [p for p in PARAMETERS if f"{owner}.{p}" in fused])
            tensors[f"{PREFIX}{owner}.{where}lora_A.weight"] = f.a_RI
            tensors[f"{PREFIX}{owner}.{where}lora_B.weight"] = f.b_OR
            continue
        infix, suffix = ("lora_embedding_", "") if f.is_embedding else ("lora_", ".weight")
        tensors[f"{PREFIX}{module}.{infix}A{suffix}"] = f.a_RI
        tensors[f"{PREFIX}{module}.{infix}B{suffix}"] = f.b_OR
        if f.magnitude_O is not None:
            tensors[f"{PREFIX}{module}.lora_magnitude_vector"] = f.magnitude_O
    tensors |= {f"{PREFIX}{module}.{ROWS}": rows.values_ND for module, rows in adapter.rows.items()}
    tensors = dict(sorted(tensors.items()))
    infos = {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in tensors.items()}
    with SafetensorsWriter(folder / TENSORS, infos, metadata={"format": "pt", **(metadata or {})}) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    write_json(folder / CONFIG, adapter.config)
