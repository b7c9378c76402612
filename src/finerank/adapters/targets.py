"""Which modules get an adapter, and which of them share a `lora_A`.

    all-linear                                         every linear but the output head, as PEFT has it
    q_proj v_proj                                      Hugging Face names: the last parts of a module's name
    layers.0.self_attn.q_proj                          ... as many parts as are given
    embed_tokens lm_head                               embedding and output head, where they are named
    gate_up_proj down_proj                             the fused experts of a layer, where they are named
    .*layers\\.(0|1)\\..*_proj                           a regular expression for whole names
    linear_qkv linear_proj linear_fc1 linear_fc2       Megatron names: groups whose members share one lora_A
    query_key_value dense dense_h_to_4h dense_4h_to_h  the same, legacy names

A name that the model itself has (GPT-NeoX has a `query_key_value`, Phi a `dense`) means that module, not the group.
Names and patterns match as PEFT matches them, so the same setting selects the same modules there.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from finerank.adapters.experts import parameter_names
from finerank.errors import AdapterError, unknown_name

ALL_LINEAR = "all-linear"

_QKV, _PROJ = ("q_proj", "k_proj", "v_proj", "qkv_proj", "c_attn"), ("o_proj", "out_proj")
_FC1, _FC2 = ("gate_proj", "up_proj", "gate_up_proj", "c_fc"), ("down_proj",)

GROUPS: dict[str, tuple[str, ...]] = {
    "linear_qkv": _QKV,
    "linear_proj": _PROJ,
    "linear_fc1": _FC1,
    "linear_fc2": _FC2,
    "query_key_value": _QKV,
    "dense": _PROJ,
    "dense_h_to_4h": _FC1,
    "dense_4h_to_h": _FC2,
}
"""Megatron and legacy names -> the Hugging Face names of the linears that such a module holds."""

SHARED_INPUTS: tuple[tuple[str, ...], ...] = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Linears of one parent module that read the same input."""


@dataclass(frozen=True)
class Target:
    """A module that gets an adapter, or a parameter of fused experts that does."""

    name: str
    group: str | None = None
    """Name of the shared `lora_A`'s group, e.g. `model.layers.0.self_attn:linear_qkv`; None with an own one."""
    kind: Literal["linear", "embedding", "experts"] = "linear"


def linear_names(model: nn.Module) -> list[str]:
    """Full names of the linears an adapter can sit on, in the model's order; the output head is one of them."""
    return [name for name, module in model.named_modules() if is_linear(module)]


def is_linear(module: nn.Module) -> bool:
    """A plain linear, transformers' Conv1D (GPT-2), or a quantised linear."""
    return isinstance(module, nn.Linear | Conv1D) or hasattr(module, "dequantized_weight")


def find_targets(model: nn.Module, targets: Sequence[str]) -> list[Target]:
    """The modules that `targets` names, in the model's order. Raises AdapterError for a name that matches none."""
    modules = dict(model.named_modules())
    names = [name for name, module in modules.items() if is_linear(module) or isinstance(module, nn.Embedding)]
    experts = parameter_names(model)
    names += experts
    if not targets:
        raise AdapterError(f"--lora-target-modules is empty; linears here: {short_names(linear_names(model))}.")
    chosen: dict[str, Target] = {}
    for target in targets:
        found = _find(model, names, target)
        if not found:
            raise AdapterError(_no_match(target, names))
        for one in found:
            if one.name in chosen and chosen[one.name].group != one.group:
                raise AdapterError(f"--lora-target-modules names {one.name} twice, with and without a shared lora_A.")
            chosen[one.name] = one
            if one.name in experts:  # one tensor, so there is nothing to share an A with
                chosen[one.name] = Target(one.name, kind="experts")
            elif not is_linear(modules[one.name]):
                chosen[one.name] = replace(one, kind="embedding")
    return [chosen[name] for name in names if name in chosen]


def _find(model: nn.Module, names: list[str], target: str) -> list[Target]:
    if target.lower() == ALL_LINEAR:
        head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
        modules = dict(model.named_modules())
        return [
            Target(name) for name in names if (m := modules.get(name)) is not head and m is not None and is_linear(m)
        ]
    if _is_pattern(target):
        try:
            return [Target(name) for name in names if re.fullmatch(target, name)]
        except re.error as error:
            raise AdapterError(f"--lora-target-modules: {target!r} is no regular expression ({error}).") from error
    found = [Target(name) for name in names if matches_suffix(name, target)]
    if found or target not in GROUPS:
        return found
    members = [name for name in names if name.rpartition(".")[2] in GROUPS[target]]
    return [Target(name, group=f"{name.rpartition('.')[0]}:{target}") for name in members]


def _is_pattern(target: str) -> bool:
    return any(sign in target for sign in "*+?()[]|^$\\")


def matches_suffix(name: str, suffix: str) -> bool:
    """`suffix` is the whole name or its last parts."""
    return name == suffix or name.endswith(f".{suffix}")


def _no_match(target: str, names: list[str]) -> str:
    last_parts = {name.rpartition(".")[2] for name in names}
    near = unknown_name("target", target, last_parts).partition("Did you mean")
    hint = f" Did you mean{near[2].partition('?')[0]}?" if near[1] else ""
    return (
        f"--lora-target-modules: '{target}' matches no linear or embedding of this model.{hint} There are "
        f"{short_names(names)}."
    )


def layer_index(name: str) -> int | None:
    """`model.layers.3.mlp.up_proj` -> 3; None outside the decoder layers."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def short_names(names: Iterable[str]) -> str:
    """The last parts of module names, each once, for messages."""
    return ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in names)) or "none"


def expand_patterns(patterns: Mapping[str, float], targets: Sequence[Target], *, flag: str) -> dict[str, float]:
    """Patterns with Megatron names written out. Raises AdapterError for one that matches no target."""
    names = [target.name for target in targets]
    expanded: dict[str, float] = {}
    for pattern, value in patterns.items():
        try:
            hits = any(re.match(rf"(.*\.)?({pattern})$", name) for name in names)
        except re.error as error:
            raise AdapterError(f"{flag}: {pattern!r} is no regular expression ({error}).") from error
        if hits:
            expanded[pattern] = value
            continue
        members = [m for m in GROUPS.get(pattern, ()) if any(matches_suffix(name, m) for name in names)]
        if not members:
            raise AdapterError(f"{flag}: '{pattern}' matches no adapted linear; there are {short_names(names)}.")
        expanded.update(dict.fromkeys(members, value))
    return expanded


def peft_target_modules(model: nn.Module, targets: Sequence[Target]) -> list[str]:
    """The shortest `target_modules` that makes PEFT choose exactly these linears, sorted."""
    chosen = {target.name for target in targets}
    short = sorted({name.rpartition(".")[2] for name in chosen})
    # PEFT looks at every module, not only at linears, and fails on a match of another kind
    hit = {name for name, _ in _base_modules(model) if any(matches_suffix(name, s) for s in short)}
    return short if hit == chosen else sorted(chosen)


def _base_modules(model: nn.Module) -> Iterable[tuple[str, nn.Module]]:
    """Modules of the model without what adapters put into it."""
    for name, module in model.named_modules():
        if ".base_layer" not in name:
            yield name, module
