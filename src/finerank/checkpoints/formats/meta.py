"""Meta's own Llama files: `consolidated.NN.pth`, one a model-parallel rank, and `params.json`.

    layers.0.attention.wq.weight     q_proj, rows from half-rotation to neighbouring pairs
    layers.0.feed_forward.w1.weight  gate_proj (w2 down_proj, w3 up_proj)
    tok_embeddings.weight, norm.weight, output.weight

wq and wk: `[heads, 2, d/2, h] -> [heads, d/2, 2, h]`, because Meta's code rotates neighbouring channels where Hugging
Face's rotates halves. Ranks share the rows of wq wk wv w1 w3 output and the columns of wo w2; the embedding's columns
(Llama 2) or rows (Llama 3). `params.json` has the sizes; `config.json` and the tokenizer are written beside it.
Source: `llama/model.py` of the reference code, and transformers' `convert_llama_weights_to_hf.py`.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finerank.checkpoints.formats.hf import copy_text_files, read_json, with_dtype, write_json
from finerank.checkpoints.torch_file import StoredTensor, TorchFile, TorchWriter
from finerank.checkpoints.weights import HEAD, BaseModel, LazyWeights, TensorInfo, same_bits
from finerank.errors import CheckpointError, ConfigError
from finerank.models.families import Dims, dims_of, family_of

HOLDS = ("base",)
PARAMS = "params.json"
_FAMILIES = ("llama", "mistral")
_FILE = re.compile(r"consolidated\.(\d{2})\.pth")


@dataclass(frozen=True)
class _Place:
    """A tensor: its Hugging Face name, the dimension that ranks share, and whose heads its rows are."""

    hf: str
    dim: int | None
    heads: str | None = None


_LAYER = {
    "attention.wq.weight": _Place("self_attn.q_proj.weight", 0, "num_attention_heads"),
    "attention.wk.weight": _Place("self_attn.k_proj.weight", 0, "num_key_value_heads"),
    "attention.wv.weight": _Place("self_attn.v_proj.weight", 0),
    "attention.wo.weight": _Place("self_attn.o_proj.weight", 1),
    "feed_forward.w1.weight": _Place("mlp.gate_proj.weight", 0),
    "feed_forward.w2.weight": _Place("mlp.down_proj.weight", 1),
    "feed_forward.w3.weight": _Place("mlp.up_proj.weight", 0),
    "attention_norm.weight": _Place("input_layernorm.weight", None),
    "ffn_norm.weight": _Place("post_attention_layernorm.weight", None),
}


def _places(num_layers: int, embedding_dim: int) -> dict[str, _Place]:
    places = {"tok_embeddings.weight": _Place("model.embed_tokens.weight", embedding_dim)}
    for layer in range(num_layers):
        for name, p in _LAYER.items():
            places[f"layers.{layer}.{name}"] = _Place(f"model.layers.{layer}.{p.hf}", p.dim, p.heads)
    places["norm.weight"] = _Place("model.norm.weight", None)
    places["output.weight"] = _Place(HEAD, 0)
    return places


def matches(folder: Path) -> bool:
    """True for a folder with consolidated.00.pth and params.json."""
    return (folder / PARAMS).is_file() and any(_FILE.fullmatch(p.name) for p in folder.glob("consolidated.*.pth"))


def read(folder: Path, *, hf_config: dict[str, Any] | None = None, hf_folder: Path | None = None) -> BaseModel:
    """Open a folder. Raises CheckpointError naming the file that is missing, torn or does not fit."""
    folder = Path(folder)
    paths = sorted(p for p in folder.glob("consolidated.*.pth") if _FILE.fullmatch(p.name))
    if [p.name for p in paths] != [f"consolidated.{i:02d}.pth" for i in range(len(paths))] or not paths:
        raise CheckpointError(f"{folder} must hold consolidated.00.pth, .01.pth, ... without gaps.")
    files = [TorchFile(p) for p in paths]
    for file in files:
        if not isinstance(file.content, dict):
            raise CheckpointError(f"{file.path} holds no dict of tensors.")
    params = read_json(folder / PARAMS)
    shapes = {n: v.info.shape for n, v in files[0].content.items() if isinstance(v, StoredTensor)}
    if hf_config is None and (folder / "config.json").is_file():
        hf_config, hf_folder = read_json(folder / "config.json"), hf_folder or folder
    config = dict(hf_config) if hf_config is not None else _config(params, shapes, len(files), folder)
    dims = dims_of(config)
    is_split_by_rows = len(files) > 1 and shapes.get("tok_embeddings.weight", (0, 0))[1] == dims.hidden_size
    entries = {}
    for name, place in _places(dims.num_layers, 0 if is_split_by_rows else 1).items():
        entries[place.hf] = _entry(files, name, place, dims)
    weights = LazyWeights(entries, source=str(folder))
    if "tie_word_embeddings" not in config:
        same = weights.info(HEAD) == weights.info("model.embed_tokens.weight")
        config["tie_word_embeddings"] = same and same_bits(weights[HEAD], weights["model.embed_tokens.weight"])
    if config["tie_word_embeddings"]:
        del entries[HEAD]
        weights = LazyWeights(entries, source=str(folder))
    return BaseModel(config=config, weights=weights, folder=hf_folder)


def _entry(files: list[TorchFile], name: str, place: _Place, dims: Dims) -> tuple[TensorInfo, Callable[[], Tensor]]:
    stored = []
    for file in files:
        value = file.content.get(name)
        if not isinstance(value, StoredTensor):
            raise CheckpointError(f"{file.path} lacks {name}; it is no whole Llama model.")
        stored.append((file, value))

    def read_tensor() -> Tensor:
        shards = [file.read(value) for file, value in stored]
        whole = shards[0] if place.dim is None or len(shards) == 1 else torch.cat(shards, dim=place.dim)
        return whole if place.heads is None else from_pairs(whole, getattr(dims, place.heads))

    shape = list(stored[0][1].info.shape)
    if place.dim is not None:
        shape[place.dim] = sum(value.info.shape[place.dim] for _, value in stored)
    return TensorInfo(tuple(shape), stored[0][1].info.dtype), read_tensor


def to_pairs(weight: Tensor, heads: int) -> Tensor:
    """Rows from Hugging Face's half-rotation to Meta's neighbouring pairs: [heads * d, h]."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape).contiguous()


def from_pairs(weight: Tensor, heads: int) -> Tensor:
    """The inverse of `to_pairs`."""
    return weight.reshape(heads, -1, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape).contiguous()


def _config(params: dict[str, Any], shapes: dict[str, Any], num_shards: int, folder: Path) -> dict[str, Any]:
    """A Llama config from params.json; sizes that it leaves out (vocab_size -1, the MLP's) come from the tensors."""
    try:
        heads = int(params["n_heads"])
        theta = float(params.get("rope_theta", 10000.0))
        config = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": int(params["dim"]),
            "num_hidden_layers": int(params["n_layers"]),
            "num_attention_heads": heads,
            "num_key_value_heads": int(params.get("n_kv_heads") or heads),
            "head_dim": int(params.get("head_dim") or int(params["dim"]) // heads),
            "rms_norm_eps": float(params["norm_eps"]),
            "intermediate_size": shapes["layers.0.feed_forward.w1.weight"][0] * num_shards,
            "vocab_size": shapes["output.weight"][0] * num_shards,
            "max_position_embeddings": int(params.get("max_seq_len") or 4096),
            "rope_parameters": {"rope_type": "default", "rope_theta": theta},
            "hidden_act": "silu",
        }
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise CheckpointError(f"{folder / PARAMS} lacks or garbles {error}; give --hf-cfg-dir instead.") from error
    if params.get("use_scaled_rope"):
        raise CheckpointError(
            f"{folder / PARAMS} uses scaled rope without its factors; give --hf-cfg-dir FOLDER with the config.json."
        )
    return config


def write(model: BaseModel, folder: Path, *, num_shards: int = 1, dtype: torch.dtype | None = None) -> None:
    """Write into an existing empty folder, all shards at once, tensor by tensor.

    Raises:
        ConfigError: not of a Llama-like family, or a size does not divide by `num_shards`.
    """
    family, dims = family_of(model.config), dims_of(model.config)
    if family.name not in _FAMILIES:
        raise ConfigError(
            f"Meta's format holds {' and '.join(_FAMILIES)} models only, not {family.name}; use hf or mg."
        )
    places = _places(dims.num_layers, 0 if dims.vocab_size > 100_000 else 1)
    used = {p.hf for p in places.values()}
    left = [n for n in model.weights if n not in used and not n.endswith("inv_freq")]
    if left:
        raise ConfigError(f"Meta's format has no place for {left[0]}; use --save-model-type hf or mg.")
    plans = [
        {name: _shard_info(model, place, num_shards, dtype) for name, place in places.items()}
        for _ in range(num_shards)
    ]
    with ExitStack() as stack:
        writers = [
            stack.enter_context(TorchWriter(folder / f"consolidated.{i:02d}.pth", plan)) for i, plan in enumerate(plans)
        ]
        for place in places.values():
            for writer, shard in zip(writers, _shards(model, place, dims, num_shards, dtype), strict=True):
                writer.write(shard)
    write_json(folder / PARAMS, params_of(model))
    copy_text_files(model.folder, folder)
    write_json(folder / "config.json", with_dtype(model))


def _source(model: BaseModel, place: _Place) -> str:
    return "model.embed_tokens.weight" if place.hf == HEAD and model.is_tied else place.hf


def _shard_info(model: BaseModel, place: _Place, num_shards: int, dtype: torch.dtype | None) -> TensorInfo:
    info = model.weights.info(_source(model, place))
    shape = list(info.shape)
    if place.dim is not None:
        if shape[place.dim] % num_shards:
            raise ConfigError(f"{place.hf} ({shape}) does not divide into {num_shards} shards.")
        shape[place.dim] //= num_shards
    return TensorInfo(tuple(shape), dtype or info.dtype)


def _shards(
    model: BaseModel, place: _Place, dims: Dims, num_shards: int, dtype: torch.dtype | None
) -> Iterator[Tensor]:
    whole = model.weights[_source(model, place)]
    whole = whole.to(dtype) if dtype is not None else whole
    if place.heads is not None:
        if getattr(dims, place.heads) % num_shards:
            raise ConfigError(f"{place.heads} ({getattr(dims, place.heads)}) does not divide into {num_shards} shards.")
        whole = to_pairs(whole, getattr(dims, place.heads))
    yield from [whole] * num_shards if place.dim is None else whole.chunk(num_shards, dim=place.dim)


def params_of(model: BaseModel) -> dict[str, Any]:
    """params.json of a model, its sizes as they are; `multiple_of` and `ffn_dim_multiplier` give its MLP size."""
    config, dims = model.config, dims_of(model.config)
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    params: dict[str, Any] = {
        "dim": dims.hidden_size,
        "n_layers": dims.num_layers,
        "n_heads": dims.num_attention_heads,
        "vocab_size": dims.vocab_size,
        "norm_eps": config.get("rms_norm_eps", 1e-5),
        "rope_theta": rope.get("rope_theta") or config.get("rope_theta") or 10000.0,
        **_ffn_params(dims.hidden_size, model.weights.info("model.layers.0.mlp.gate_proj.weight").shape[0]),
    }
    if dims.num_key_value_heads != dims.num_attention_heads:
        params["n_kv_heads"] = dims.num_key_value_heads
    if dims.head_dim * dims.num_attention_heads != dims.hidden_size:
        raise ConfigError(
            "Meta's format has no head size of its own: heads x head_dim must be hidden_size; use hf or mg."
        )
    if rope.get("rope_type", "default") == "llama3":
        params["use_scaled_rope"] = True
    return params


def _ffn_params(dim: int, ffn: int) -> dict[str, Any]:
    """`multiple_of` (and a multiplier) with which Meta's code computes `ffn`; see `ffn_size`."""
    multiples = [m for m in (4096, 2048, 1024, 512, 256, 128, 64, 32, 16, 8, 4, 2, 1) if ffn % m == 0]
    for multiple in multiples:
        if ffn_size(dim, multiple, None) == ffn:
            return {"multiple_of": multiple}
    for multiple in multiples:
        multiplier = round((ffn + 1 - multiple / 2) / int(8 * dim / 3), 6)
        if ffn_size(dim, multiple, multiplier) == ffn:
            return {"multiple_of": multiple, "ffn_dim_multiplier": multiplier}
    raise ConfigError(
        f"No multiple_of gives an MLP of size {ffn} at hidden size {dim}; use --save-model-type hf or mg."
    )


def ffn_size(dim: int, multiple_of: int, ffn_dim_multiplier: float | None) -> int:
    """The MLP's size as Meta's `FeedForward` computes it."""
    size = int(2 * (4 * dim) / 3)
    if ffn_dim_multiplier is not None:
        size = int(ffn_dim_multiplier * size)
    return multiple_of * ((size + multiple_of - 1) // multiple_of)
