"""GGUF files of llama.cpp: a base model read and written, a LoRA adapter read and written.

    adapter   general.type = adapter, adapter.type = lora, adapter.lora.alpha = 32.0
              blk.0.attn_q.weight.lora_a [R, I], blk.0.attn_q.weight.lora_b [O, R]
    model     llama, qwen2 and qwen3; matrices keep their dtype (bf16, fp16, fp32), norms and biases are fp32

llama.cpp multiplies each module's product by `alpha / rank of that module` with one alpha for the file, so other
scales (rsLoRA, alpha patterns) are folded into lora_b. Llama's q and k rows (and their lora_b) go from Hugging Face's
halves to neighbouring pairs, as in `finerank.models.gguf_file`, which reads base models. Source: llama.cpp's
convert_lora_to_gguf.py and convert_hf_to_gguf.py.
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf.constants import MODEL_ARCH_NAMES
from gguf.tensor_mapping import TensorNameMap, get_tensor_name_map
from torch import Tensor

from finerank.checkpoints.formats import hf
from finerank.checkpoints.formats.meta import from_pairs, to_pairs
from finerank.checkpoints.lora import Adapter, Factors
from finerank.checkpoints.regroup import lora_config
from finerank.checkpoints.weights import HEAD, BaseModel, TensorInfo
from finerank.errors import AdapterError, CheckpointError, ConfigError
from finerank.models.cache import gguf_folder
from finerank.models.families import Dims, dims_of, family_of
from finerank.models.gguf_file import ARCHITECTURES, BoundedReader

HOLDS = ("base", "adapter")
MODEL, ADAPTER = "model.gguf", "adapter.gguf"
_TYPES = {
    torch.bfloat16: gguf.GGMLQuantizationType.BF16,
    torch.float16: gguf.GGMLQuantizationType.F16,
    torch.float32: gguf.GGMLQuantizationType.F32,
}
_FILE_TYPES = {
    torch.bfloat16: gguf.LlamaFileType.MOSTLY_BF16,
    torch.float16: gguf.LlamaFileType.MOSTLY_F16,
    torch.float32: gguf.LlamaFileType.ALL_F32,
}


def matches(folder: Path) -> bool:
    """True for a folder with one .gguf file and no Hugging Face model."""
    return len(list(folder.glob("*.gguf"))) == 1 and not any(folder.glob("*.safetensors"))


def _only_file(folder: Path) -> Path:
    files = [folder] if folder.is_file() else sorted(folder.glob("*.gguf"))
    if len(files) != 1:
        raise CheckpointError(f"{folder} holds {len(files)} .gguf files; name the one to read.")
    return files[0]


def read(folder: Path, **options: Any) -> BaseModel:
    """A base model, converted once into the cache folder. Raises ModelError."""
    assert not options, options
    return hf.read(gguf_folder(_only_file(Path(folder))))


def write(model: BaseModel, folder: Path, *, dtype: torch.dtype | None = None) -> None:
    """Write a base model as one file, tensor by tensor. Raises ConfigError for what GGUF cannot hold here."""
    from finerank.checkpoints.gguf_metadata import add_metadata, rope_factors

    architecture, name_map, dims = _architecture(model.config)
    names = {name: _gguf_name(name_map, name) for name in model.weights if not name.endswith("inv_freq")}
    matrix = dtype or model.dtype
    if matrix not in _TYPES:
        raise ConfigError(f"GGUF is written in bf16, fp16 or fp32, not {matrix}; give --params-dtype.")
    writer = gguf.GGUFWriter(None, architecture)
    add_metadata(writer, model, dims, file_type=int(_FILE_TYPES[matrix]))
    factors = rope_factors(model.config, dims)
    if factors is not None:
        _announce(writer, "rope_freqs.weight", TensorInfo(tuple(factors.shape), torch.float32))
    for name, target in names.items():
        info = model.weights.info(name)
        _announce(writer, target, TensorInfo(info.shape, _stored_dtype(info, matrix)))
    writer.write_header_to_file(folder / MODEL)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if factors is not None:
        writer.write_tensor_data(factors.numpy())
    for name in names:
        tensor = _permuted(model.weights[name], name, architecture, dims)
        writer.write_tensor_data(_as_array(tensor.to(_stored_dtype(model.weights.info(name), matrix))))
    writer.close()


def _stored_dtype(info: TensorInfo, matrix: torch.dtype) -> torch.dtype:
    return torch.float32 if len(info.shape) == 1 else matrix  # llama.cpp computes norms and biases in fp32


def _announce(writer: gguf.GGUFWriter, name: str, info: TensorInfo) -> None:
    kind = _TYPES[info.dtype]
    # the package takes the shape of a byte array for 16-bit types that numpy lacks
    is_bf16 = info.dtype == torch.bfloat16
    shape = (*info.shape[:-1], info.shape[-1] * 2) if is_bf16 else info.shape
    kinds = {torch.bfloat16: np.uint8, torch.float16: np.float16, torch.float32: np.float32}
    writer.add_tensor_info(name, shape, np.dtype(kinds[info.dtype]), info.nbytes, raw_dtype=kind if is_bf16 else None)


def _as_array(tensor: Tensor) -> np.ndarray:
    tensor = tensor.contiguous()
    return tensor.view(torch.uint8).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


def _architecture(config: dict[str, Any]) -> tuple[str, TensorNameMap, Dims]:
    family = family_of(config)
    known = {"mistral": "llama", **{name: name for name in ARCHITECTURES}}
    if family.name not in known:
        raise ConfigError(f"GGUF is written for {', '.join(known)} models, not {family.name}; use hf or mg.")
    architecture = known[family.name]
    number = next(a for a, name in MODEL_ARCH_NAMES.items() if name == architecture)
    dims = dims_of(config)
    return architecture, get_tensor_name_map(number, dims.num_layers), dims


def _gguf_name(name_map: TensorNameMap, name: str) -> str:
    stem, _, suffix = name.rpartition(".")
    found = name_map.get_name(stem)
    if found is None:
        raise ConfigError(f"GGUF has no name for {name}; use hf or mg.")
    return f"{found}.{suffix}"


def _heads(name: str, dims: Dims) -> int | None:
    """Heads whose rows are permuted, for q and k projections."""
    if ".q_proj" in name:
        return dims.num_attention_heads
    return dims.num_key_value_heads if ".k_proj" in name else None


def _permuted(tensor: Tensor, name: str, architecture: str, dims: Dims) -> Tensor:
    heads = _heads(name, dims)
    if architecture != "llama" or heads is None:
        return tensor
    return to_pairs(tensor.reshape(tensor.shape[0], -1), heads).reshape(tensor.shape)


def write_adapter(adapter: Adapter, folder: Path, *, base: BaseModel) -> tuple[str, ...]:
    """Write a LoRA adapter for llama.cpp; returns what the user should know.

    Raises:
        AdapterError: what llama.cpp cannot apply; the message says how to fold it.
    """
    architecture, name_map, dims = _architecture(base.config)
    beside = adapter.is_dora or adapter.whole or adapter.rows
    if beside or any(f.is_embedding or f.is_transposed or f.num_experts for f in adapter.factors.values()):
        raise AdapterError(
            f"{adapter.source} has parts that are no plain LoRA (DoRA, embeddings, new tokens, fused experts, modules "
            "saved whole), which llama.cpp would ignore; merge it and export --to gguf."
        )
    alpha = Counter(f.scale * f.rank for f in adapter.factors.values()).most_common(1)[0][0]
    writer = gguf.GGUFWriter(None, architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(alpha))
    writer.add_name(Path(adapter.source).name)
    writer.add_string("finerank.lora_config", json.dumps(adapter.config, sort_keys=True))
    stored_alpha, num_folded = float(np.float32(alpha)), 0
    for module, f in adapter.factors.items():
        name = f"{module}.weight"
        if name != HEAD and name not in base.weights:
            raise AdapterError(f"{adapter.source} adapts {module}, which the base does not have; give the right base.")
        b = _permuted(f.b_OR.float(), name, architecture, dims)
        ratio = f.scale / (stored_alpha / f.rank)
        if ratio != 1:
            b = (b.double() * ratio).float()
            num_folded += 1
        writer.add_tensor(f"{_gguf_name(name_map, name)}.lora_a", f.a_RI.float().contiguous().numpy())
        writer.add_tensor(f"{_gguf_name(name_map, name)}.lora_b", b.contiguous().numpy())
    writer.write_header_to_file(folder / ADAPTER)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return (f"the scale of {num_folded} modules is folded into lora_b",) if num_folded else ()


def read_adapter(folder: Path, *, hf_config: dict[str, Any] | None = None, **flags: Any) -> Adapter:
    """Read a LoRA adapter of llama.cpp; its base's config tells the heads. Raises AdapterError, CheckpointError."""
    path = _only_file(Path(folder))
    if hf_config is None:
        raise AdapterError(f"{path} does not describe its base model; give the base with --load.")
    architecture, name_map, dims = _architecture(hf_config)
    reader = _open(path)
    if _value(reader, "general.type") != "adapter" or _value(reader, gguf.Keys.Adapter.TYPE) != "lora":
        raise AdapterError(f"{path} is no LoRA adapter.")
    alpha = float(_value(reader, gguf.Keys.Adapter.LORA_ALPHA) or 0.0)
    parts: dict[str, dict[str, Tensor]] = {}
    for tensor in reader.tensors:
        stem, _, kind = tensor.name.rpartition(".lora_")
        values = np.array(gguf.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        parts.setdefault(stem, {})[kind] = torch.from_numpy(values.reshape([int(n) for n in reversed(tensor.shape)]))
    factors = {}
    for module in _modules(hf_config, dims):
        part = parts.pop(_gguf_name(name_map, f"{module}.weight"), None)
        if part is not None:
            factors[module] = _factors(part, module, alpha, architecture, dims, path)
    if parts or not factors:
        raise AdapterError(f"{path} adapts {next(iter(parts), 'nothing')}, which is not understood.")
    rank = max(f.rank for f in factors.values())
    patterns = {m: f.rank for m, f in factors.items() if f.rank != rank}
    config = lora_config(rank, alpha, factors, rank_pattern=patterns)
    for flag, stored in (("lora_r", rank), ("lora_alpha", alpha)):
        if flags.get(flag) not in (None, stored):
            name = f"--{flag.replace('_', '-')}"
            raise AdapterError(f"{name} {flags[flag]} disagrees with {path}, which has {stored}; leave it out.")
    return Adapter(config=config, factors=factors, source=str(path))


def _factors(part: dict[str, Tensor], module: str, alpha: float, architecture: str, dims: Dims, path: Path) -> Factors:
    a, b = part.get("a"), part.get("b")
    if a is None or b is None or a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:
        raise AdapterError(f"{path}: the factors of {module} do not fit each other; the file is damaged.")
    heads = _heads(module, dims)
    if architecture == "llama" and heads is not None:
        b = from_pairs(b, heads)
    return Factors(a, b, alpha / a.shape[0] if alpha else 1.0)


def _modules(config: dict[str, Any], dims: Dims) -> list[str]:
    rules = [r for r in family_of(config).layer_rules if r.split is not None and not r.is_expert]
    return [f"model.layers.{i}.{h}" for i in range(dims.num_layers) for r in rules for h in r.hf] + ["lm_head"]


def _open(path: Path) -> gguf.GGUFReader:
    try:
        with open(path, "rb") as file:
            if file.read(4) != b"GGUF":
                raise CheckpointError(f"{path} is no GGUF file.")
        return BoundedReader(path)
    except CheckpointError:
        raise
    except Exception as error:  # the package raises whatever a torn header makes numpy or struct raise
        raise CheckpointError(f"{path} is a torn or damaged GGUF file ({error}); get it again.") from error


def _value(reader: gguf.GGUFReader, key: str) -> Any:
    field = reader.get_field(key)
    return None if field is None else field.contents()
