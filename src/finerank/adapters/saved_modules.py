"""Modules that are trained whole beside the low-rank changes: PEFT's `modules_to_save`.

    --lora-modules-to-save embed_tokens lm_head          a full fp32 copy of each is trained and saved
    --lora-modules-to-save model.norm                    any module that holds weights of its own

The base stays as it is, so the adapter can be switched off. Of a tied embedding and head, each named one gets a copy of
its own, and the merged model has both matrices; with `--ensure-weight-tying` both are one copy.

Reference: `peft.utils.other.ModulesToSaveWrapper`, `set_additional_trainable_modules`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from finerank.adapters.adapted_module import AdaptedModule
from finerank.adapters.embedding import check_embedding, embed_scale
from finerank.adapters.targets import matches_suffix
from finerank.errors import AdapterError, unknown_name


class SavedModule(AdaptedModule):
    """A module whose weights are replaced by trained copies, in fp32 whatever the base's precision.

    Args:
        base_layer: holds parameters and no module with parameters.
        weights: parameters to use in place of copies (those of the other side of a tied pair), by name.
        trainable: whether the copies get gradients.
    """

    def __init__(self, base_layer: nn.Module, *, trainable: bool, weights: Mapping[str, nn.Parameter] | None = None):
        super().__init__(base_layer)
        self.weights = nn.ParameterDict(weights or {})
        for name, p in base_layer.named_parameters():
            if name not in self.weights:
                copy = p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True)
                self.weights[name] = nn.Parameter(copy, requires_grad=trainable)

    @property
    def weight(self) -> Tensor:
        """The weight that counts."""
        return self.weights["weight"] if self.is_active else self.base_layer.weight  # type: ignore[return-value]

    def trained(self) -> dict[str, nn.Parameter]:
        """All parameters of the module, under their own names."""
        return dict(self.weights.items())

    def file_tensors(self) -> dict[str, Tensor]:
        """With the buffers, which PEFT expects too."""
        return {name: t.detach() for name, t in self.base_layer.state_dict().items()} | super().file_tensors()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the base computes, with the trained weights, rounded to the base's precision for it."""
        if not self.is_active:
            return self.base_layer(*args, **kwargs)
        base = self.base_layer
        if isinstance(base, nn.Embedding):  # rounds the rows looked up, not the whole table
            rows = F.embedding(args[0], self.weights["weight"], base.padding_idx).to(base.weight.dtype)
            return rows * embed_scale(base) if hasattr(base, "embed_scale") else rows
        dtypes = {name: p.dtype for name, p in base.named_parameters()}
        rounded = {name: p.to(dtypes[name]) for name, p in self.weights.items()}
        return functional_call(base, rounded, args, kwargs)

    @torch.no_grad()
    def merge_(self) -> None:
        """The trained weights take the place of the base's, rounded once."""
        for name, p in self.base_layer.named_parameters():
            p.copy_(self.weights[name])
        self.is_active = False


def find_saved(model: nn.Module, names: Sequence[str], *, flag: str = "--lora-modules-to-save") -> list[str]:
    """Full names of the modules to train whole, in the model's order.

    Raises AdapterError for a name that matches no module, one that only holds others, or a quantised one.
    """
    modules = dict(model.named_modules())
    chosen: set[str] = set()
    for name in names:
        found = [full for full in modules if full and matches_suffix(full, name)]
        if not found:
            known = {full.rpartition(".")[2] for full, module in modules.items() if _own(module)}
            raise AdapterError(f"{flag}: {unknown_name('module', name, {k for k in known if not k.isdigit()})}")
        for full in found:
            check_saved(modules[full], full, flag=flag)
        chosen.update(found)
    return [name for name in modules if name in chosen]


def check_saved(module: nn.Module, name: str, *, flag: str) -> None:
    """Raise AdapterError for a module that cannot be trained whole."""
    if hasattr(module, "dequantized_weight"):
        raise AdapterError(
            f"{flag}: {name} is quantised, and what is trained whole must not be; leave it out, or load the base "
            "without --load-4bit and --load-8bit."
        )
    if not _own(module):
        inner = [n for n, m in module.named_modules() if _own(m)][:3]
        fix = f"name those, e.g. {' '.join(f'{name}.{n}' for n in inner)}" if inner else "leave it out"
        raise AdapterError(f"{flag}: {name} holds no weights of its own; {fix}.")
    if any(_own(child) for child in module.modules() if child is not module):
        raise AdapterError(f"{flag}: {name} holds further modules with weights; name those.")
    if isinstance(module, nn.Embedding):
        check_embedding(module, name)


def _own(module: nn.Module) -> bool:
    return next(module.parameters(recurse=False), None) is not None or hasattr(module, "dequantized_weight")


def peft_modules_to_save(model: nn.Module, chosen: Sequence[str]) -> list[str]:
    """The shortest `modules_to_save` that makes PEFT choose exactly these modules, sorted.

    PEFT takes every module whose name ends in one of them, dot or not: `norm` also means `input_layernorm`.
    """
    names = [name for name, _ in model.named_modules()]
    short = sorted({name.rpartition(".")[2] for name in chosen})
    hit = {name for name in names if any(name.endswith(s) for s in short)}
    return short if hit == set(chosen) else sorted(chosen)
