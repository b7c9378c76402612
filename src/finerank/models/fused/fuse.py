"""Put the fused chains into a model: its RMSNorms and gated MLPs, each only where it gives the module's own output.

    fused = fuse(model)        # Fused(norms=61, mlps=30)

The classes of transformers stay as they are: a single module gets a `forward` of its own, which `unfuse` takes away. It
is tried first: on random hidden states it must give the module's own output to the last bit, in the model's precision
and with the module's weights. A module that computes anything else is left alone.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from finerank.models.fused import gated_mlp, rms_norm


class Fused(NamedTuple):
    """How many modules of a model are fused."""

    norms: int
    mlps: int


def fuse(model: nn.Module) -> Fused:
    """Fuse what can be; see the module's docstring. Trained norm weights keep their module's own forward."""
    norms = sum(_fuse_norm(m) for m in model.modules() if "RMSNorm" in type(m).__name__)
    mlps = sum(_fuse_mlp(m) for m in model.modules() if _is_gated_mlp(m))
    return Fused(norms, mlps)


def unfuse(model: nn.Module) -> None:
    """Give the modules back their own forward."""
    for module in model.modules():
        if isinstance(vars(module).get("forward"), _Fused):
            del module.forward


class _Fused(partial):
    """A `forward` that `fuse` has put in."""


def _fuse_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(weight, nn.Parameter) or weight.dim() != 1 or not isinstance(eps, float):
        return False
    x = _hidden_states(weight.shape[0], like=weight)
    for style in rms_norm.STYLES:
        if _same_output(module, partial(rms_norm.rms_norm, weight=weight, eps=eps, style=style), x):
            module.forward = _Fused(_norm_forward, module, eps, style)  # type: ignore[method-assign]
            return True
    return False


def _norm_forward(module: nn.Module, eps: float, style: rms_norm.Style, hidden_states: Tensor) -> Tensor:
    weight: Tensor = module.weight  # type: ignore[assignment]
    if weight.requires_grad:
        return type(module).forward(module, hidden_states)
    return rms_norm.rms_norm(hidden_states, weight, eps, style)


def _is_gated_mlp(module: nn.Module) -> bool:
    names = {name for name, _ in module.named_children()}
    return names == {"gate_proj", "up_proj", "down_proj", "act_fn"} and not any(True for _ in module.parameters(False))


def _fuse_mlp(module: nn.Module) -> bool:
    gate: Any = module.gate_proj
    weight, size = getattr(gate, "weight", None), getattr(gate, "in_features", None)
    if not isinstance(weight, Tensor) or not isinstance(size, int):
        return False
    like = weight if weight.is_floating_point() else next(iter(module.buffers()), weight)
    x = _hidden_states(size, like=like)
    for activation in gated_mlp.ACTIVATIONS:
        forward = _Fused(_mlp_forward, module, activation)
        if _same_output(module, forward, x):
            module.forward = forward  # type: ignore[method-assign]
            return True
    return False


def _mlp_forward(module: nn.Module, activation: gated_mlp.Activation, x: Tensor) -> Tensor:
    gate, up, down = module.gate_proj, module.up_proj, module.down_proj
    return down(gated_mlp.gated_product(gate(x), up(x), activation))  # type: ignore[operator]


def _hidden_states(size: int, *, like: Tensor) -> Tensor:
    """[1, 5, size], the same each time."""
    dtype = like.dtype if like.is_floating_point() else torch.float32
    x = torch.randn(1, 5, size, generator=torch.Generator().manual_seed(size))
    return x.to(like.device, dtype)


@torch.no_grad()
def _same_output(module: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor) -> bool:
    try:
        return torch.equal(type(module).forward(module, x), forward(x))
    except (TypeError, RuntimeError):  # it takes other arguments, or other numbers
        return False
