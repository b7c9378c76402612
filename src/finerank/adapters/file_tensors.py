"""The tensors of an adapter file, sorted by what they belong to, and checked against the model.

layers.0.self_attn.q_proj.lora_A.weight, .lora_B.weight, .lora_magnitude_vector      a linear
layers.0.mlp.experts.lora_A.weight, .base_layer.lora_A.weight, ...                   fused experts
embed_tokens.lora_embedding_A, .lora_embedding_B                                     an embedding
embed_tokens.base_layer.weight                                       what PEFT saves along with it
embed_tokens.token_adapter.trainable_tokens_delta                    trained rows
lm_head.weight                                                       a module saved whole
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from finerank.adapters.adapter_set import FILE_PREFIX
from finerank.adapters.embedding import check_embedding, is_tied
from finerank.adapters.experts import adapted_parameters, experts_modules, leaf
from finerank.adapters.low_rank import weight_OI
from finerank.adapters.new_tokens import ROWS
from finerank.adapters.parts import pair_names
from finerank.adapters.saved_modules import check_saved
from finerank.adapters.shapes import shape_of
from finerank.adapters.targets import Target, linear_names, short_names
from finerank.errors import AdapterError
from finerank.models.vocabulary import grow_vocabulary

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"

_FACTORS = {"lora_A": 2, "lora_B": 2, "lora_magnitude_vector": 1, "lora_embedding_A": 2, "lora_embedding_B": 2}
"""Number of dimensions by the last part of a name."""


@dataclass
class FileTensors:
    """By module name, then by part."""

    linears: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    embeddings: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    whole: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    bases: dict[str, Tensor] = field(default_factory=dict)
    """Base weights saved along with adapted embeddings."""
    rows: dict[str, Tensor] = field(default_factory=dict)
    """Trained rows of an embedding or of a head."""
    experts: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """Factors of fused experts, by the names of `LoRAExperts.trained`."""

    def of_part(self, name: str) -> Mapping[str, Tensor]:
        """What belongs to an adapted module that is no linear."""
        rows = {ROWS: self.rows[name]} if name in self.rows else {}
        return self.embeddings.get(name) or self.whole.get(name) or self.experts.get(name) or rows


def sort_tensors(tensors: Mapping[str, Tensor], folder: Path) -> FileTensors:
    """Sort by name alone. Raises AdapterError for what no adapter has, or only one half of a pair."""
    sorted_ = FileTensors()
    for key, tensor in tensors.items():
        name = key.removeprefix(FILE_PREFIX)
        module, _, part = name.removesuffix(".weight").rpartition(".")
        if part == "default":  # some programs keep PEFT's adapter name in the file
            module, _, part = module.rpartition(".")
        if part in _FACTORS:
            if _FACTORS[part] != tensor.dim():
                raise AdapterError(f"{folder / TENSORS}: {key} has {tensor.dim()} dimensions; copy the adapter again.")
            group = sorted_.embeddings if "embedding" in part else sorted_.linears
            group.setdefault(module, {})[part] = tensor
        elif name.removesuffix(".default").endswith(f".{ROWS}"):
            sorted_.rows[name.removesuffix(".default").removesuffix(f".{ROWS}")] = tensor
        elif "lora_" in name or "token_adapter" in name:
            raise AdapterError(
                f"{folder / TENSORS} holds {key}, which is of no kind that finerank knows; merge the adapter into the "
                "base with PEFT, and load the merged model."
            )
        elif name.endswith(".base_layer.weight"):
            sorted_.bases[name.removesuffix(".base_layer.weight")] = tensor
        else:
            module, _, part = name.replace(".modules_to_save.default", "").rpartition(".")
            sorted_.whole.setdefault(module, {})[part] = tensor
    if not (sorted_.linears or sorted_.embeddings or sorted_.whole or sorted_.rows):
        raise AdapterError(f"{folder / TENSORS} holds no adapter; train it again or give another folder.")
    for names, group in ((("lora_A", "lora_B"), sorted_.linears), (_EMBEDDING, sorted_.embeddings)):
        for module, parts in group.items():
            if not set(names) <= set(parts):
                raise AdapterError(
                    f"{folder / TENSORS} lacks the other half of {module}.{next(iter(parts))}; copy it again."
                )
    return sorted_


_EMBEDDING = ("lora_embedding_A", "lora_embedding_B")


def take_experts(model: nn.Module, found: FileTensors, config: Mapping[str, Any]) -> list[Target]:
    """Move the factors of fused experts out of the linears; the parameters that they belong to, as targets."""
    targets: list[Target] = []
    for module in experts_modules(model):
        names = sorted((n for n in found.linears if n.replace(".base_layer", "") == module), key=len)
        if not names:
            continue
        found.experts[module] = {
            f"{name.removeprefix(module)}.{part}.weight".removeprefix("."): tensor
            for name in names
            for part, tensor in found.linears.pop(name).items()
        }
        parameters = adapted_parameters(config, module, len(names))
        targets += [Target(f"{module}.{parameter}", kind="experts") for parameter in parameters]
    return targets


def grow_for(model: nn.Module, found: FileTensors, rows: Mapping[str, Sequence[int]], folder: Path) -> None:
    """Give the model the rows that the adapter brings, where it has fewer. Raises AdapterError for a gap between."""
    embedding, head = pair_names(model)
    if embedding is None:
        return
    weight: Tensor = model.get_submodule(embedding).weight  # type: ignore[assignment]
    now = weight.shape[0]
    whole = [found.whole.get(name or "", {}).get("weight") for name in (embedding, head)]
    sizes = [t.shape[0] for t in whole if t is not None]
    ids = {i for name in rows for i in rows[name]}
    wanted = max([now, *sizes, *(i + 1 for i in ids)])
    if wanted == now:
        return
    if not sizes and not set(range(now, wanted)) <= ids:
        raise AdapterError(
            f"{folder} trains token {max(ids)}, and this model has only {now} rows, which leaves a gap; load the base "
            "with the vocabulary that it was trained with."
        )
    assert isinstance(model, PreTrainedModel)
    grow_vocabulary(model, wanted, num_known=now)


def check_tensors(
    model: nn.Module,
    found: FileTensors,
    config: Mapping[str, Any],
    folder: Path,
    *,
    rows: Mapping[str, Sequence[int]],
) -> None:
    """Raise AdapterError for tensors that do not fit the model or the config."""
    base = config.get("base_model_name_or_path") or "the base it was trained on"
    linears = linear_names(model)
    modules = dict(model.named_modules())
    for name, parts in found.linears.items():
        if name not in linears:
            raise AdapterError(
                f"{folder} adapts {name}, which this model does not have (it has {short_names(linears)}); load {base}."
            )
        _check_linear(modules[name], name, parts, config, folder)
    for name, parts in found.experts.items():
        _check_experts(modules[name], name, parts, config, folder)
    for name, parts in found.embeddings.items():
        module = modules.get(name)
        if not isinstance(module, nn.Embedding):
            raise AdapterError(f"{folder} adapts the embedding {name}, which this model does not have; load {base}.")
        if config.get("use_dora"):
            raise AdapterError(f"{folder} puts DoRA on the embedding {name}; merge it with PEFT, and load the result.")
        a, b = (parts[part] for part in _EMBEDDING)
        _check_size(name, (a.shape[1], b.shape[0]), tuple(module.weight.shape), folder, base)
        _check_rank(name, a.shape[0], b.shape[1], config, folder)
    for name, parts in found.whole.items():
        if name not in modules:
            raise AdapterError(f"{folder} brings {name}, which this model does not have; load {base}.")
        check_saved(modules[name], name, flag=str(folder))
        own = modules[name].state_dict()
        if set(own) != set(parts):
            raise AdapterError(f"{folder}: {name} has {' '.join(sorted(parts))}, the model's {' '.join(sorted(own))}.")
        for part, tensor in parts.items():
            _check_size(f"{name}.{part}", tuple(tensor.shape), tuple(own[part].shape), folder, base)
    _, head = pair_names(model)
    own = {name for name in rows if not (name == head and is_tied(model))}  # PEFT may name a tied head too
    if set(found.rows) != own:
        raise AdapterError(f"{folder}: trainable_token_indices in {CONFIG} and {TENSORS} disagree; copy it again.")
    for name in own:
        size = (len(rows[name]), modules[name].weight.shape[1])  # type: ignore[union-attr, operator]
        _check_size(name, tuple(found.rows[name].shape), size, folder, base)
        if isinstance(modules[name], nn.Embedding):
            check_embedding(modules[name], name)
    for name, tensor in found.bases.items():
        weight = getattr(modules.get(name), "weight", None)
        if not isinstance(weight, Tensor) or not torch.equal(tensor.to(weight), weight):
            raise AdapterError(
                f"{folder} was trained on another {name} than this model's and brings it along; merge it with "
                "finerank merge, and load the merged model."
            )


def _check_linear(
    module: nn.Module, name: str, parts: Mapping[str, Tensor], config: Mapping[str, Any], folder: Path
) -> None:
    base = config.get("base_model_name_or_path") or "the base it was trained on"
    a, b, magnitude = parts["lora_A"], parts["lora_B"], parts.get("lora_magnitude_vector")
    if bool(config.get("use_dora")) != (magnitude is not None):
        raise AdapterError(f"{folder}: use_dora in {CONFIG} and the tensors of {name} disagree; copy it again.")
    if magnitude is not None and magnitude.shape[0] != b.shape[0]:
        raise AdapterError(f"{folder}: {name} has {magnitude.shape[0]} magnitudes for {b.shape[0]} features.")
    wanted = weight_OI(module).shape
    if (b.shape[0], a.shape[1]) != tuple(wanted):
        raise AdapterError(
            f"{folder} was trained on another base: its {name} maps {a.shape[1]} to {b.shape[0]} features, this "
            f"model's maps {wanted[1]} to {wanted[0]}; load {base}."
        )
    _check_rank(name, a.shape[0], b.shape[1], config, folder)


def _check_experts(
    module: nn.Module, name: str, parts: Mapping[str, Tensor], config: Mapping[str, Any], folder: Path
) -> None:
    base = config.get("base_model_name_or_path") or "the base it was trained on"
    adapted = adapted_parameters(config, name, len(parts) // 2)
    for parameter in adapted:
        rank = shape_of(config, f"{name}.{parameter}").rank
        E, O, I = getattr(module, parameter).shape  # noqa: E741
        for factor, size in (("lora_A", (E * rank, I)), ("lora_B", (O, rank * E))):
            key = f"{leaf(parameter, adapted)}{factor}.weight"
            if key not in parts:
                raise AdapterError(f"{folder / TENSORS} lacks {name}.{key}; copy the adapter again.")
            _check_size(f"{name}.{key}", tuple(parts[key].shape), size, folder, base)


def _check_size(name: str, has: tuple[int, ...], wanted: tuple[int, ...], folder: Path, base: str) -> None:
    if has != wanted:
        raise AdapterError(
            f"{folder} was trained on another base: its {name} is {' x '.join(map(str, has))}, this model's "
            f"{' x '.join(map(str, wanted))}; load {base}."
        )


def _check_rank(name: str, of_a: int, of_b: int, config: Mapping[str, Any], folder: Path) -> None:
    rank = shape_of(config, name).rank
    if of_a != rank or of_b != rank:
        raise AdapterError(f"{folder}: {name} has rank {of_a} in {TENSORS} and {rank} in {CONFIG}; correct {CONFIG}.")


def drop_tied_head(model: nn.Module, found: FileTensors, folder: Path) -> None:
    """With `ensure_weight_tying` the head follows the embedding: take its tensors out, which are the same."""
    embedding, head = pair_names(model)
    if embedding is None or head is None or not is_tied(model):
        return
    saved, low = found.whole.get(head), found.linears.get(head)
    if saved is not None and embedding in found.whole:
        is_same = torch.equal(saved["weight"], found.whole[embedding]["weight"])
        del found.whole[head]
    elif low is not None and embedding in found.embeddings:
        a, b = (found.embeddings[embedding][part] for part in _EMBEDDING)
        is_same = torch.equal(low["lora_A"], b.T) and torch.equal(low["lora_B"], a.T)
        del found.linears[head]
    else:
        return
    if not is_same:
        raise AdapterError(
            f"{folder} says ensure_weight_tying, but its {embedding} and {head} differ; set ensure_weight_tying to "
            f"false in {CONFIG} to keep both."
        )
