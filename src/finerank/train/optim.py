"""AdamW over the adapters' fp32 parameters, the gradient norm, and the optimizer's state as named tensors.

torch's own AdamW does the arithmetic. Weight decay touches matrices only, as in Megatron. The state is stored by
parameter name (`<name>/exp_avg`, `<name>/exp_avg_sq`, `<name>/step`), never by position, so that a checkpoint whose
parameters are listed in another order cannot be loaded wrongly.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from finerank.errors import CheckpointError
from finerank.train.settings import OptimSettings

_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


def build_optimizer(
    named_parameters: Iterable[tuple[str, Tensor]],
    settings: OptimSettings,
    *,
    lr_ratios: Mapping[Tensor, float] | None = None,
    local: Collection[Tensor] = (),
) -> torch.optim.AdamW:
    """AdamW with groups for matrices (decayed) and for the rest (not decayed).

    `lr_ratios` gives the learning rate of some parameters over the run's; each ratio has its own groups, and so have
    `local` parameters, which may follow another schedule.
    """
    parameters = [p for _, p in named_parameters]
    is_local = set(local)
    kind_of = {p: ((lr_ratios or {}).get(p, 1.0), p in is_local) for p in parameters}
    groups = []
    for kind in dict.fromkeys(kind_of.values()):
        mine = [p for p in parameters if kind_of[p] == kind]
        matrices, rest = [p for p in mine if p.ndim >= 2], [p for p in mine if p.ndim < 2]
        rates = {"lr_ratio": kind[0], "is_local": kind[1]}
        groups.append({"params": matrices, "weight_decay": settings.weight_decay, **rates})
        groups.append({"params": rest, "weight_decay": 0.0, **rates})
    return torch.optim.AdamW(
        [g for g in groups if g["params"]],
        lr=settings.lr,
        betas=(settings.adam_beta1, settings.adam_beta2),
        eps=settings.adam_eps,
        # one kernel over all parameters instead of one call for each; same result in every run
        fused=all(p.device.type in ("cpu", "cuda") for p in parameters),
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float, *, local_lr: float | None = None) -> None:
    """Give all parameter groups the learning rate of this step, each times its ratio; local ones may have another."""
    for group in optimizer.param_groups:
        is_other = group["is_local"] and local_lr is not None
        group["lr"] = (local_lr if is_other else lr) * group["lr_ratio"]


def clip_gradients(parameters: Sequence[Tensor], max_norm: float) -> Tensor:
    """Scale the gradients down to a norm of `max_norm` (0: leave them); returns the norm before, a fp32 scalar."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if max_norm > 0:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, named_parameters: Iterable[tuple[str, Tensor]]
) -> dict[str, Tensor]:
    """The optimizer's state by parameter name; empty before the first step."""
    tensors = {}
    for name, parameter in named_parameters:
        for key, value in optimizer.state.get(parameter, {}).items():
            assert key in _MOMENTS, key
            tensors[f"{name}/{key}"] = value
    return tensors


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, named_parameters: Iterable[tuple[str, Tensor]], tensors: Mapping[str, Tensor]
) -> None:
    """Put back what `optimizer_tensors` gave. Raises CheckpointError when names or shapes differ."""
    named = dict(named_parameters)
    strangers = {key.rpartition("/")[0] for key in tensors} - set(named)
    if strangers:
        raise CheckpointError(
            f"The checkpoint's optimizer knows {sorted(strangers)[0]}, which this model has not; resume with the "
            "settings of that run."
        )
    for name, parameter in named.items():
        state = {key: tensors[f"{name}/{key}"] for key in _MOMENTS if f"{name}/{key}" in tensors}
        if not state:
            continue
        if len(state) != len(_MOMENTS) or state["exp_avg"].shape != parameter.shape:
            raise CheckpointError(f"The checkpoint's optimizer state of {name} does not fit; resume from another one.")
        optimizer.state[parameter] = {
            # the step counter stays where AdamW keeps it: with the parameter when fused
            key: value.to(device=parameter.device, dtype=torch.float32, copy=True)
            for key, value in state.items()
        }
