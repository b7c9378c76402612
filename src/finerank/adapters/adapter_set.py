"""The adapters of one model: what is trained, under which names, switched off, merged, taken out again.

optimizer = AdamW(adapters.parameters())
with adapters.disabled(): ...          # the base model again
adapters.merge_()                      # into the base's weights, for good
"""

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from finerank.adapters.adapted_module import AdaptedModule
from finerank.adapters.embedding import embedding_and_head, is_tied, untie_
from finerank.adapters.lora import LoRALinear
from finerank.adapters.new_tokens import TrainedRows
from finerank.adapters.shapes import by_pattern
from finerank.models.quantized import num_weights

FILE_PREFIX = "base_model.model."
"""PEFT wraps the model twice; its tensor names show it."""


class AdapterSet:
    """The adapters of one model."""

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, LoRALinear],
        config: dict[str, Any],
        groups: list[str],
        parts: Mapping[str, AdaptedModule] | None = None,
    ):
        """
        Args:
            model: with the layers in place.
            layers: low-rank changes of linears, by full module name.
            config: PEFT's LoraConfig as JSON values.
            groups: Megatron names whose members share one lora_A, as they were asked for.
            parts: everything else that is adapted, by full module name.
        """
        self.model, self.layers, self.config, self.groups = model, dict(layers), config, groups
        self.parts = dict(parts or {})
        self.lr_ratios: dict[Tensor, float] = {}
        """Learning rate of a parameter over the run's, where it is not 1."""

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Parameters with their names in the adapter file; a shared lora_A once, under its first layer.

        Frozen starts are among them: they are part of a checkpoint, though not of the adapter file.
        """
        named: dict[int, tuple[str, nn.Parameter]] = {}
        for name, layer in self.layers.items():
            for factor in ("lora_A", "lora_B"):
                parameter = getattr(layer, factor)
                named.setdefault(id(parameter), (f"{FILE_PREFIX}{name}.{factor}.weight", parameter))
            for factor in ("start_A", "start_B"):
                if (parameter := getattr(layer, factor)) is not None:
                    named.setdefault(id(parameter), (f"{FILE_PREFIX}{name}.{factor}", parameter))
            if (magnitude := layer.lora_magnitude_vector) is not None:
                named[id(magnitude)] = (f"{FILE_PREFIX}{name}.lora_magnitude_vector", magnitude)
        for name, part in self.parts.items():
            for leaf, parameter in part.trained().items():
                named.setdefault(id(parameter), (f"{FILE_PREFIX}{name}.{leaf}", parameter))
        return list(named.values())

    def parameters(self) -> list[nn.Parameter]:
        """Trained parameters, each once."""
        starts = {id(p) for layer in self.layers.values() for p in (layer.start_A, layer.start_B)}
        return [parameter for _, parameter in self.named_parameters() if id(parameter) not in starts]

    def state(self) -> dict[str, Tensor]:
        """All tensors of the adapter file, sorted by name; a shared lora_A once for each of its layers."""
        tensors = {}
        for name, layer in self.layers.items():
            a_RI, b_OR = layer.factors()
            tensors[f"{FILE_PREFIX}{name}.lora_A.weight"] = a_RI.detach()
            tensors[f"{FILE_PREFIX}{name}.lora_B.weight"] = b_OR.detach()
            if layer.lora_magnitude_vector is not None:
                tensors[f"{FILE_PREFIX}{name}.lora_magnitude_vector"] = layer.lora_magnitude_vector.detach()
        for name, part in self.parts.items():
            tensors |= {f"{FILE_PREFIX}{name}.{leaf}": tensor for leaf, tensor in part.file_tensors().items()}
        return dict(sorted(tensors.items()))

    def file_config(self) -> dict[str, Any]:
        """PEFT's LoraConfig for the tensors of `state`: linears with a start have twice the rank, at the same scale."""
        if not any(layer.start_A is not None for layer in self.layers.values()):
            return self.config
        grown = math.sqrt(2) if self.config["use_rslora"] else 2
        ranks = {name: 2 * rank for name, rank in self.config["rank_pattern"].items()}
        alphas = {name: alpha * grown for name, alpha in self.config["alpha_pattern"].items()}
        config = {**self.config, "r": 2 * self.config["r"], "lora_alpha": self.config["lora_alpha"] * grown}
        for key, default, doubled in (("rank_pattern", "r", ranks), ("alpha_pattern", "lora_alpha", alphas)):
            # what is no linear keeps its own; the first pattern that matches counts
            kept = [name for name, part in self.parts.items() if any("lora_" in leaf for leaf in part.trained())]
            own = {name: by_pattern(self.config[key], name, self.config[default]) for name in kept}
            config[key] = own | {pattern: value for pattern, value in doubled.items() if pattern not in own}
        return config

    @property
    def num_parameters(self) -> int:
        """Trained numbers."""
        return sum(parameter.numel() for parameter in self.parameters())

    def describe(self) -> str:
        """One line for the log."""
        share = self.num_parameters / max(num_weights(self.model) - self.num_parameters, 1)
        ranks = sorted({layer.rank for layer in self.layers.values()})
        # not the config's target_modules, which PEFT may have written as a regular expression
        names = sorted({name.rpartition(".")[2] for name in self.layers})
        shared = f", lora_A shared in {' '.join(self.groups)}" if self.groups else ""
        if self.parts:
            shared += f", and {', '.join(dict.fromkeys(name.rpartition('.')[2] for name in self.parts))}"
        linears = f"LoRA on {len(self.layers)} linears ({', '.join(names[:8])}), rank {'/'.join(map(str, ranks))}"
        return (
            f"{linears if self.layers else 'No LoRA on linears'}{shared}: {self.num_parameters:,} trained parameters, "
            f"{100 * share:.2f}% of the base"
        )

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """The base model inside the `with` block."""
        modules: list[LoRALinear | AdaptedModule] = [*self.layers.values(), *self.parts.values()]
        active = [module.is_active for module in modules]
        try:
            for module in modules:
                module.is_active = False
            yield
        finally:
            for module, was_active in zip(modules, active, strict=True):
                module.is_active = was_active

    def merge_(self) -> None:
        """Add every change to the base's weights, one rounding each, and put the plain modules back for good.

        A tied embedding and head of which only one changed, or both in their own ways, are untied.
        """
        changed: list[LoRALinear | AdaptedModule] = [*self.layers.values(), *self.parts.values()]
        stays_tied = bool(self.config.get("ensure_weight_tying")) or not is_tied(self.model)
        pair = embedding_and_head(self.model)
        follows = isinstance(pair[1], TrainedRows) and pair[1].follows
        if not stays_tied and not follows and any(module in changed for module in pair):
            untie_(self.model)
        for module in changed:
            module.merge_()
        self.remove()

    def remove(self) -> None:
        """Put the base's modules back into the model."""
        for name, base in {n: m.base_layer for n, m in (*self.layers.items(), *self.parts.items())}.items():
            assert isinstance(base, nn.Module)
            put_module(self.model, name, base)

    def remove_layer(self, name: str) -> None:
        """Put one of the base's linears back into the model."""
        put_module(self.model, name, self.layers.pop(name).base_layer)


def put_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Replace the module of that name."""
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)
