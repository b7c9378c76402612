"""LoRA on the experts of a layer, which `transformers` holds fused: one 3-dimensional parameter for all of them.

    --lora-target-modules q_proj v_proj gate_up_proj down_proj

    mlp.experts.gate_up_proj [E, 2 F, D]     mlp.experts.down_proj [E, D, F]          mixtral, qwen3_moe

Each expert has factors of its own, `W_e + scale * B_e A_e`. The file is PEFT's of `target_parameters`, where the change
of the first parameter lies under a further `base_layer` when both are adapted:

    ....experts.base_layer.lora_A.weight [E R, D]    ....experts.base_layer.lora_B.weight [2 F, R E]     gate_up_proj
    ....experts.lora_A.weight            [E R, F]    ....experts.lora_B.weight            [D, R E]       down_proj

Rows of A are expert by expert, columns of B rank by rank. Reference: `peft.tuners.lora.layer.ParamWrapper`, which adds
the changes to the weights of all experts at every call; here the sum is never formed (`expert_products`).

Shapes: E experts, D hidden, F feed-forward, R rank, I in_features, O out_features.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from finerank.adapters.adapted_module import AdaptedModule
from finerank.adapters.expert_products import Change, experts_output
from finerank.adapters.seeding import named_generator
from finerank.adapters.shapes import shape_of
from finerank.errors import AdapterError

PARAMETERS = ("gate_up_proj", "down_proj")
"""Of a module of fused experts, in its own order."""


@dataclass(frozen=True)
class Factors:
    """The change of one parameter: as the file has them, trained."""

    lora_A: nn.Parameter
    """[E R, I]"""
    lora_B: nn.Parameter
    """[O, R E]"""
    scale: float

    def change(self, num_experts: int, dtype: torch.dtype) -> Change:
        """Expert by expert, differentiable."""
        a_ERI, b_EOR = by_expert(self.lora_A, self.lora_B, num_experts)
        return Change(a_ERI.to(dtype), b_EOR.to(dtype).contiguous(), self.scale)


def by_expert(lora_A: Tensor, lora_B: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """PEFT's flat factors as views [E, R, I] and [E, O, R]."""
    a_ERI = lora_A.unflatten(0, (num_experts, -1))
    return a_ERI, lora_B.unflatten(1, (-1, num_experts)).permute(2, 0, 1)


def flat(a_ERI: Tensor, b_EOR: Tensor) -> tuple[Tensor, Tensor]:
    """The way back of `by_expert`."""
    return a_ERI.flatten(0, 1).contiguous(), b_EOR.permute(1, 2, 0).flatten(1).contiguous()


def leaf(parameter: str, adapted: Collection[str]) -> str:
    """Where a parameter's factors lie in the file, `adapted` being the parameters of its module that have any.

    >>> leaf("gate_up_proj", {"gate_up_proj", "down_proj"}), leaf("gate_up_proj", {"gate_up_proj"})
    ('base_layer.', '')
    """
    behind = PARAMETERS[PARAMETERS.index(parameter) + 1 :]
    return "base_layer." * sum(name in adapted for name in behind)


class LoRAExperts(AdaptedModule):
    """Frozen fused experts with low-rank changes.

    Args:
        base_layer: holds the parameters of PARAMETERS; see `check_experts`.
        factors: by parameter name.
    """

    def __init__(self, base_layer: nn.Module, factors: Mapping[str, Factors]):
        super().__init__(base_layer)
        self.factors = {name: factors[name] for name in PARAMETERS if name in factors}
        # for `parameters()` and `to()` of the model, whose names may hold no dot
        self.lora = nn.ParameterDict({name.replace(".", "_"): p for name, p in self.trained().items()})

    def trained(self) -> dict[str, nn.Parameter]:
        """Factors of each adapted parameter."""
        named = {}
        for name, factors in self.factors.items():
            where = leaf(name, self.factors)
            named[f"{where}lora_A.weight"], named[f"{where}lora_B.weight"] = factors.lora_A, factors.lora_B
        return named

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """[T, D], [T, K], [T, K] -> [T, D]"""
        if not self.is_active:
            return self.base_layer(hidden_states, top_k_index, top_k_weights)
        return run_experts(self.base_layer, hidden_states, top_k_index, top_k_weights, self.factors)

    @torch.no_grad()
    def merge_(self) -> None:
        """`W_e + scale * B_e A_e`: fp32 arithmetic, one rounding, one expert at a time."""
        for name, factors in self.factors.items():
            weight_EOI: Tensor = getattr(self.base_layer, name)
            work = torch.promote_types(weight_EOI.dtype, torch.float32)
            change = factors.change(len(weight_EOI), work)
            for weight_OI, a_RI, b_OR in zip(weight_EOI, change.a_ERI, change.b_EOR, strict=True):
                weight_OI.copy_(torch.addmm(weight_OI.to(work), b_OR, a_RI, alpha=change.scale))
        self.is_active = False


def run_experts(
    base: Any, x_TD: Tensor, index_TK: Tensor, weights_TK: Tensor, factors: Mapping[str, Factors]
) -> Tensor:
    """What the experts compute, with these changes."""
    changes = {name: f.change(base.num_experts, x_TD.dtype) for name, f in factors.items()}
    return experts_output(
        x_TD,
        index_TK,
        weights_TK,
        first_EUD=base.gate_up_proj,
        second_EDF=base.down_proj,
        gate=base._apply_gate,
        first=changes.get("gate_up_proj"),
        second=changes.get("down_proj"),
    )


def experts_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Modules of fused experts by name."""
    return {name: module for name, module in model.named_modules() if is_experts(module)}


def is_experts(module: nn.Module) -> bool:
    """Holds the experts of a layer as 3-dimensional parameters."""
    own = dict(module.named_parameters(recurse=False))
    return all(name in own and own[name].dim() == 3 for name in PARAMETERS)


def parameter_names(model: nn.Module) -> list[str]:
    """Full names of the parameters of fused experts, in the model's order."""
    return [f"{name}.{parameter}" for name in experts_modules(model) for parameter in PARAMETERS]


@torch.no_grad()
def check_experts(base: nn.Module, name: str) -> None:
    """Raise AdapterError for experts that are more than two products and a gate, on which ours would be wrong."""
    first, second = (getattr(base, parameter) for parameter in PARAMETERS)
    E, D = first.shape[0], first.shape[2]
    plain = first.dtype.is_floating_point and first.dtype.itemsize >= 2 and second.shape[:2] == (E, D)
    if plain and hasattr(base, "_apply_gate") and not getattr(base, "_is_expert_parallel", False):
        g = named_generator(0, name)
        x_TD = torch.randn(4, D, generator=g).to(first)
        index_TK = torch.rand(4, E, generator=g).argsort(1)[:, : min(2, E)].to(first.device)
        weights_TK = torch.rand(index_TK.shape, generator=g).to(first)
        try:
            wanted, ours = base(x_TD, index_TK, weights_TK), run_experts(base, x_TD, index_TK, weights_TK, {})
        except (RuntimeError, TypeError, AttributeError):  # shapes or arguments that are not ours
            pass
        else:
            close = math.sqrt(torch.finfo(first.dtype).eps)
            if torch.allclose(ours.float(), wanted.float(), rtol=close, atol=close * float(wanted.abs().max())):
                return
    raise AdapterError(
        f"{name} holds its experts in a form that finerank cannot adapt (known: mixtral, qwen3_moe); leave it out of "
        "--lora-target-modules."
    )


def fresh_experts(
    base: nn.Module, name: str, parameters: Collection[str], config: Mapping[str, Any], *, seed: int, trainable: bool
) -> LoRAExperts:
    """Changes of these parameters: A uniform within 1 / sqrt(in_features), B zero, as PEFT starts."""
    factors = {}
    for parameter in parameters:
        shape, weight = shape_of(config, f"{name}.{parameter}"), getattr(base, parameter)
        E, O, I = weight.shape  # noqa: E741
        bound = 1.0 / math.sqrt(I)
        generator = named_generator(seed, f"{name}.{parameter}")
        a = torch.empty(E * shape.rank, I).uniform_(-bound, bound, generator=generator).to(weight.device)
        b = torch.zeros(O, shape.rank * E, device=weight.device)
        a, b = (nn.Parameter(t, requires_grad=trainable) for t in (a, b))
        factors[parameter] = Factors(a, b, shape.scale)
    return LoRAExperts(base, factors)


def peft_target_parameters(model: nn.Module, chosen: Collection[str]) -> list[str]:
    """The shortest `target_parameters` that makes PEFT choose exactly these, sorted."""
    short = sorted({".".join(name.split(".")[-2:]) for name in chosen})
    hit = {n for n, _ in model.named_parameters() if any(n == s or n.endswith(f".{s}") for s in short)}
    return short if hit == set(chosen) else sorted(chosen)


def adapted_parameters(config: Mapping[str, Any], module: str, depth: int) -> tuple[str, ...]:
    """Which parameters of a module the `depth` pairs of factors of a PEFT file belong to, by `target_parameters`.

    Raises AdapterError when the config does not say so.
    """
    named = config.get("target_parameters")
    targets = [t for t in named if isinstance(t, str)] if isinstance(named, list) else []
    chosen = tuple(p for p in PARAMETERS if any(f".{module}.{p}".endswith(f".{t}") for t in targets))
    if len(chosen) != depth:
        raise AdapterError(
            f"The adapter has {depth} pairs of factors for {module}, and its target_parameters name "
            f"{' and '.join(chosen) or 'none of its parameters'}; copy the adapter again."
        )
    return chosen
