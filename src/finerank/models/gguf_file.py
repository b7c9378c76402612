"""A GGUF file as a Hugging Face folder: same numbers, same token ids.

    from finerank.models.gguf_file import convert_gguf
    convert_gguf(Path("SmolLM2-135M-Instruct.Q4_1.gguf"), folder)

writes `config.json`, `generation_config.json`, `model*.safetensors` and the tokenizer. Every tensor is what the `gguf`
package dequantises, in fp32, rounded once to bf16; files that hold F16 or F32 matrices are kept in fp32, because bf16
would lose their bits. Three things in a GGUF file are not as in the Hugging Face checkpoint it came from, and are
undone here:

* llama's `attn_q` and `attn_k` rows: llama.cpp rotates neighbouring pairs, transformers the two halves of a head;
* shapes are listed innermost dimension first;
* llama 3's rope scaling is stored as one frequency factor per rotary pair, not as its four parameters.

Only architectures whose whole config can be told from the file are read (`ARCHITECTURES`). Source of the layout:
ggml's docs/gguf.md and llama.cpp's convert_hf_to_gguf.py.
"""

import contextlib
import json
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, ReaderTensor, dequantize
from gguf.constants import MODEL_ARCH_NAMES
from gguf.tensor_mapping import get_tensor_name_map

from finerank.errors import FinerankError, ModelError
from finerank.models.gguf_tokenizer import build_tokenizer

logger = logging.getLogger(__name__)

ARCHITECTURES = {"llama": "LlamaConfig", "qwen2": "Qwen2Config", "qwen3": "Qwen3Config"}
"""GGUF architecture -> transformers' config class."""

SHARD_BYTES = 2 << 30
"""Largest safetensors file: what conversion holds in memory at once."""


class BoundedReader(GGUFReader):
    """The package's reader, with an end: past the end of the file it would read nothing, for as long as a damaged
    array length says."""

    def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
        if int(offset) + np.dtype(dtype).itemsize * int(count) > self.data.nbytes:
            raise ValueError("it ends before what its header announces")
        return super()._get(offset, dtype, count, override_order)


class GGUFFile:
    """A GGUF file opened for reading; tensors stay on the disk until asked for. Raises ModelError."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with open(path, "rb") as file:
            if file.read(4) != b"GGUF":
                raise ModelError(f"{path} is not a GGUF file: it does not begin with the bytes 'GGUF'.")
        try:
            self._reader = BoundedReader(path)
        except Exception as error:  # the package raises whatever a torn header makes numpy or struct raise
            raise ModelError(f"{path} is a torn or damaged GGUF file ({error}); download it again.") from error
        self._tensors = {t.name: t for t in self._reader.tensors}
        end = max((int(t.data_offset) + int(t.n_bytes) for t in self._reader.tensors), default=0)
        if end > path.stat().st_size:
            raise ModelError(f"{path} is torn: {path.stat().st_size} bytes of {end}; download it again.")
        with damage_named(path):
            self.architecture = str(self.value("general.architecture", "unknown"))
        if self.architecture not in ARCHITECTURES:
            raise ModelError(
                f"{path} holds a '{self.architecture}' model; GGUF files are read for {', '.join(ARCHITECTURES)}. "
                "Give the model's Hugging Face folder or hub id instead."
            )

    def value(self, key: str, default: Any = None) -> Any:
        """The metadata value `key` as a Python value; `{arch}` stands for the architecture."""
        key = key.replace("{arch}", getattr(self, "architecture", ""))
        field = self._reader.get_field(key)
        if field is None:
            return default
        value = field.contents()
        if isinstance(value, float):  # stored as fp32: 9.999999747378752e-06 was written as 1e-05
            return float(str(np.float32(value)))
        return value

    def need(self, key: str) -> Any:
        """The metadata value `key`; ModelError when it is not there."""
        value = self.value(key)
        if value is None:
            raise ModelError(
                f"{self.path} does not say {key.replace('{arch}', self.architecture)}; the file is damaged."
            )
        return value

    def has(self, name: str) -> bool:
        return name in self._tensors

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor in the order torch has it."""
        return tuple(int(n) for n in reversed(self._tensors[name].shape))

    def read(self, name: str) -> torch.Tensor:
        """A tensor dequantised to fp32, as the file holds it (llama's q and k rows still permuted)."""
        tensor: ReaderTensor = self._tensors[name]
        with damage_named(self.path), np.errstate(all="ignore"):
            values = dequantize(tensor.data, tensor.tensor_type)
            return torch.from_numpy(np.array(values, dtype=np.float32)).reshape(self.shape(name))

    def names(self) -> list[str]:
        return list(self._tensors)

    def storage_dtype(self) -> torch.dtype:
        """bf16, unless a matrix is stored with more mantissa bits than bf16 has."""
        wide = {GGMLQuantizationType.F16, GGMLQuantizationType.F32, GGMLQuantizationType.F64}
        matrices = [t for t in self._reader.tensors if len(t.shape) > 1]
        return torch.float32 if any(t.tensor_type in wide for t in matrices) else torch.bfloat16


@contextlib.contextmanager
def damage_named(path: Path) -> Iterator[None]:
    """Whatever a value of the wrong kind makes numpy, transformers or tokenizers raise becomes a ModelError."""
    try:
        yield
    except (FinerankError, MemoryError, OSError):
        raise
    except Exception as error:  # tokenizers raises plain Exception
        what = " ".join(str(error).split())[:200] or type(error).__name__
        raise ModelError(f"{path} is a damaged GGUF file ({what}); download it again.") from error


def convert_gguf(path: Path, folder: Path) -> None:
    """Write the Hugging Face folder of a GGUF file into the existing `folder`. Raises ModelError."""
    file = GGUFFile(path)
    with damage_named(path):
        config = read_config(file)
        tokenizer = build_tokenizer(file)  # before the long part, so that an unknown tokenizer fails at once
    config.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    generation = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
    if config.pad_token_id is not None:
        generation["pad_token_id"] = config.pad_token_id
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")
    _write_weights(file, config, folder)


def read_config(file: GGUFFile) -> Any:
    """The transformers config that a GGUF file describes."""
    import transformers

    heads = file.need("{arch}.attention.head_count")
    hidden = file.need("{arch}.embedding_length")
    if file.value("{arch}.expert_count"):
        raise ModelError(f"{file.path} holds experts, which are not read from GGUF; give the Hugging Face folder.")
    vocab_size = file.shape("token_embd.weight")[0] if file.has("token_embd.weight") else 0
    values: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "intermediate_size": file.need("{arch}.feed_forward_length"),
        "num_hidden_layers": file.need("{arch}.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": file.value("{arch}.attention.head_count_kv", heads),
        "max_position_embeddings": file.need("{arch}.context_length"),
        "rms_norm_eps": file.need("{arch}.attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": not file.has("output.weight"),
        "bos_token_id": file.value("tokenizer.ggml.bos_token_id"),
        "eos_token_id": file.value("tokenizer.ggml.eos_token_id"),
        "pad_token_id": file.value("tokenizer.ggml.padding_token_id"),
        "rope_parameters": _rope(file, head_dim=file.value("{arch}.attention.key_length", hidden // heads)),
        "dtype": str(file.storage_dtype()).removeprefix("torch."),
    }
    if file.architecture != "qwen2":  # Qwen2Config has no head_dim: it is always hidden_size / heads
        values["head_dim"] = file.value("{arch}.attention.key_length", hidden // heads)
    if file.architecture in ("llama", "qwen3"):
        values["attention_bias"] = file.has("blk.0.attn_q.bias")
    if file.architecture == "llama":
        values["mlp_bias"] = file.has("blk.0.ffn_up.bias")
    config_class = getattr(transformers, ARCHITECTURES[file.architecture])
    config = config_class(**values)
    config.architectures = [ARCHITECTURES[file.architecture].replace("Config", "ForCausalLM")]
    return config


def _rope(file: GGUFFile, *, head_dim: int) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": file.value("{arch}.rope.freq_base", 10000.0)}
    kind = file.value("{arch}.rope.scaling.type", "none")
    if kind == "linear":
        rope |= {"rope_type": "linear", "factor": file.need("{arch}.rope.scaling.factor")}
    elif kind == "yarn":
        rope |= {
            "rope_type": "yarn",
            "factor": file.need("{arch}.rope.scaling.factor"),
            "original_max_position_embeddings": file.need("{arch}.rope.scaling.original_context_length"),
        }
    elif kind != "none":
        raise ModelError(f"{file.path} scales rope by '{kind}', which is not read from GGUF; give the HF folder.")
    if file.has("rope_freqs.weight"):
        rope |= _llama3_rope(file, rope["rope_theta"], head_dim)
    return rope


def _llama3_rope(file: GGUFFile, theta: float, head_dim: int) -> dict[str, Any]:
    """The llama3 rope parameters whose frequency factors are those stored; only the published ones are tried."""
    stored = file.read("rope_freqs.weight").double()
    frequencies = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    low, high, original = 1.0, 4.0, 8192
    for factor in (8.0, 32.0):
        turns = original * frequencies / (2 * math.pi)
        smooth = ((turns - low) / (high - low)).clamp(0, 1)
        factors = 1 / ((1 - smooth) / factor + smooth)
        if factors.shape == stored.shape and torch.allclose(factors, stored, rtol=1e-5, atol=0):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": original,
            }
    raise ModelError(f"{file.path} has rope factors that match no published rope scaling; give the HF folder.")


def _write_weights(file: GGUFFile, config: Any, folder: Path) -> None:
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    dtype = file.storage_dtype()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    wanted = model.state_dict()
    if config.tie_word_embeddings:
        wanted.pop("lm_head.weight", None)
    sources = _match_names(file, wanted, config.num_hidden_layers)
    plan = split_torch_state_dict_into_shards(
        {name: wanted[name] for name in sources},
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=SHARD_BYTES,
    )
    for number, (filename, names) in enumerate(plan.filename_to_tensors.items(), start=1):
        logger.info("dequantising %s: file %d of %d", file.path.name, number, len(plan.filename_to_tensors))
        tensors = dict(_convert(file, config, {name: sources[name] for name in names}, wanted))
        save_file(tensors, folder / filename, metadata={"format": "pt"})
        (folder / filename).chmod(0o644)  # the library makes it for its owner alone; a cache may be shared
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _match_names(file: GGUFFile, wanted: dict[str, torch.Tensor], num_layers: int) -> dict[str, str]:
    """Transformers' tensor name -> the file's name. Raises ModelError unless both lists are used up."""
    architecture = next(arch for arch, name in MODEL_ARCH_NAMES.items() if name == file.architecture)
    names = get_tensor_name_map(architecture, num_layers)
    sources: dict[str, str] = {}
    for name in wanted:
        stem, _, suffix = name.rpartition(".")
        found = names.get_name(stem)
        if found is None or not file.has(f"{found}.{suffix}"):
            raise ModelError(
                f"{file.path} has no tensor for {name}; the file is incomplete or of another architecture."
            )
        sources[name] = f"{found}.{suffix}"
    unused = set(file.names()) - set(sources.values()) - {"rope_freqs.weight"}
    if unused:
        raise ModelError(
            f"{file.path} holds tensors that no {file.architecture} model has, e.g. {min(unused)}; "
            "give the Hugging Face folder."
        )
    return sources


def _convert(
    file: GGUFFile, config: Any, sources: dict[str, str], wanted: dict[str, torch.Tensor]
) -> Iterator[tuple[str, torch.Tensor]]:
    for name, source in sources.items():
        value = file.read(source)
        if file.architecture == "llama" and ".attn_q." in source:
            value = unpermute(value, config.num_attention_heads)
        elif file.architecture == "llama" and ".attn_k." in source:
            value = unpermute(value, config.num_key_value_heads)
        if value.shape != wanted[name].shape:
            raise ModelError(
                f"{file.path}: {source} is {tuple(value.shape)}, the config needs {tuple(wanted[name].shape)}."
            )
        yield name, value.to(wanted[name].dtype).contiguous()


def unpermute(rows: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Rows of a q or k projection: from llama.cpp's neighbouring pairs back to transformers' two halves of a head."""
    shape = rows.shape
    return rows.reshape(num_heads, shape[0] // num_heads // 2, 2, *shape[1:]).transpose(1, 2).reshape(shape)
