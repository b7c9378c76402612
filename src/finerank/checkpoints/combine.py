"""Several adapters of one base made into one, by weight: `sum of w_i * scale_i * B_i A_i`.

    parts = [Part(read_adapter(a), 0.7), Part(read_adapter(b), 0.3)]
    combined = combine(parts, "svd", rank=16)
    combined.adapter, combined.relative_error

    cat       A_i and B_i side by side: exact; the rank is the sum of the ranks
    svd       the best approximation of the sum with a given rank
    linear    sum of the A_i times sum of the B_i, each by sqrt(w_i scale_i): cheap, and a rough approximation

as `peft.LoraModel.add_weighted_adapter` defines them. The sum is never formed: its singular values are those of a
matrix as small as the ranks. All arithmetic is fp64 with one rounding at the end, and the error against the exact sum
is measured on the rounded factors.

Shapes: O out_features, I in_features, K sum of the ranks, R rank of the result.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finerank.checkpoints.formats.hf import read_json
from finerank.checkpoints.lora import Adapter, Factors
from finerank.checkpoints.native import beside
from finerank.checkpoints.regroup import lora_config
from finerank.checkpoints.weights import same_bits
from finerank.errors import AdapterError, ConfigError

METHODS = ("cat", "svd", "linear")


@dataclass(frozen=True)
class Part:
    """One adapter and how much of it counts."""

    adapter: Adapter
    weight: float


@dataclass(frozen=True)
class Combined:
    """The result of `combine`."""

    adapter: Adapter
    relative_error: float
    """Frobenius norm of (what the result changes - the weighted sum), over that of the weighted sum; all modules."""
    worst: tuple[str, float]
    """The module with the largest relative error of its own."""

    def report(self) -> dict[str, Any]:
        """The numbers as JSON values."""
        return {
            "relative_error": self.relative_error,
            "worst_module": {"name": self.worst[0], "relative_error": self.worst[1]},
            "ranks": {name: factors.rank for name, factors in self.adapter.factors.items()},
        }

    def describe(self) -> str:
        """One line."""
        ranks = sorted({f.rank for f in self.adapter.factors.values()})
        return (
            f"{len(self.adapter.factors)} modules of rank {'/'.join(map(str, ranks))}; distance from the weighted sum "
            f"{self.relative_error:.3g} of its Frobenius norm (at most {self.worst[1]:.3g}, {self.worst[0]})"
        )


def parse_weighted(text: str) -> tuple[Path, float]:
    """`runs/a:0.7` -> (runs/a, 0.7). Without a weight it is 1; a folder of the whole name is taken as the folder.

    Only what follows the last colon can be a weight, and only if it is a number. Raises ConfigError.
    """
    path, _, number = text.rpartition(":")
    if not path or Path(text).expanduser().is_dir():
        return Path(text).expanduser(), 1.0
    try:
        weight = float(number)
    except ValueError:
        return Path(text).expanduser(), 1.0
    if not math.isfinite(weight) or weight == 0:
        raise ConfigError(f"--adapters {text}: a weight must be a finite number other than 0; leave the adapter out.")
    return Path(path).expanduser(), weight


def combine(parts: Sequence[Part], how: str, *, rank: int | None = None) -> Combined:
    """One adapter out of several.

    Args:
        parts: adapters of one base; modules that only some of them adapt are combined from those.
        how: one of METHODS.
        rank: of the result, for `svd`; the highest rank of the parts when not given.

    Raises:
        AdapterError: adapters that cannot be added up, or whose shapes or (linear) ranks differ.
        ConfigError: an unknown method, or a rank that has no effect.
    """
    if how not in METHODS:
        raise ConfigError(f"--combine {how} is unknown; use one of {', '.join(METHODS)}.")
    if rank is not None and (how != "svd" or rank < 1):
        raise ConfigError(f"--svd-rank {rank} " + ("must be at least 1." if how == "svd" else "needs --combine svd."))
    for part in parts:
        _check_kind(part.adapter)
    names = sorted({name for part in parts for name in part.adapter.factors})
    most = max(f.rank for part in parts for f in part.adapter.factors.values())
    tally = _Tally()
    factors = {}
    for name in names:
        found = [(p.adapter, p.adapter.factors[name], p.weight) for p in parts if name in p.adapter.factors]
        _check_alike(name, [(adapter, f) for adapter, f, _ in found])
        exact = _concatenated([(f, weight) for _, f, weight in found])
        if how == "linear":
            a_RI, b_OR = _linear(name, found)
        elif how == "svd":
            a_RI, b_OR = _truncated(*exact, rank or most)
        else:
            a_RI, b_OR = exact
        dtype = torch.promote_types(found[0][1].a_RI.dtype, torch.float32)
        result = replace(found[0][1], a_RI=a_RI.to(dtype).contiguous(), b_OR=b_OR.to(dtype).contiguous(), scale=1.0)
        if not (result.a_RI.isfinite().all() and result.b_OR.isfinite().all()):
            raise AdapterError(f"The combined factors of {name} are not finite; check the adapters and the weights.")
        tally.add(name, result, exact)
        factors[name] = result
    return tally.combined(_adapter(parts, factors))


def _check_kind(adapter: Adapter) -> None:
    why = None
    if adapter.is_dora:
        why = "is a DoRA adapter, whose change is no low-rank sum"
    elif adapter.whole and (adapter.config.get("modules_to_save") or adapter.config.get("bias", "none") != "none"):
        why = f"holds {min(adapter.whole)}, which was trained whole"
    elif getattr(adapter, "rows", None) or adapter.config.get("trainable_token_indices"):
        why = "holds trained rows of new tokens"
    elif adapter.config.get("target_parameters"):
        why = "adapts parameters of fused experts"
    if why is not None:
        raise AdapterError(f"{adapter.source} {why}; merge it into the base, and tune or combine on from there.")


def _copies(adapters: Sequence[Adapter]) -> dict[str, Tensor]:
    """Tensors of the base that PEFT saves beside an adapted embedding; they must be the same in all adapters."""
    copies: dict[str, tuple[Adapter, Tensor]] = {}
    for adapter in adapters:
        for name, tensor in adapter.whole.items():
            first, kept = copies.setdefault(name, (adapter, tensor))
            if not same_bits(kept, tensor):
                raise AdapterError(
                    f"{first.source} and {adapter.source} hold different {name}; combine adapters of one base."
                )
    return {name: tensor for name, (_, tensor) in copies.items()}


def _check_alike(name: str, found: Sequence[tuple[Adapter, Factors]]) -> None:
    first, f = found[0]
    for other, g in found[1:]:
        kinds = [(x.is_embedding, x.is_transposed, x.weight_shape) for x in (f, g)]
        if kinds[0] != kinds[1]:
            raise AdapterError(
                f"{first.source} and {other.source} belong to different bases: {name} is {list(f.weight_shape)} in one "
                f"and {list(g.weight_shape)} in the other; combine adapters of one base."
            )


def _concatenated(found: Sequence[tuple[Factors, float]]) -> tuple[Tensor, Tensor]:
    """A [K, I] and B [O, K] whose product is the weighted sum, fp64."""
    a_KI = torch.cat([f.a_RI.double() * (weight * f.scale) for f, weight in found])
    return a_KI, torch.cat([f.b_OR.double() for f, _ in found], dim=1)


def _linear(name: str, found: Sequence[tuple[Adapter, Factors, float]]) -> tuple[Tensor, Tensor]:
    ranks = {f.rank for _, f, _ in found}
    if len(ranks) > 1:
        raise AdapterError(
            f"--combine linear needs equal ranks, and {name} has {' and '.join(map(str, sorted(ranks)))}; use cat or "
            "svd."
        )
    a_RI, b_OR = (torch.zeros_like(t, dtype=torch.float64) for t in (found[0][1].a_RI, found[0][1].b_OR))
    for _, f, weight in found:
        factor = weight * f.scale
        root = math.sqrt(abs(factor))
        a_RI += f.a_RI.double() * math.copysign(root, factor)
        b_OR += f.b_OR.double() * root
    return a_RI, b_OR


def _truncated(a_KI: Tensor, b_OK: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The leading singular components of `B A`: A with orthonormal rows, B with the singular values in it, as PEFT."""
    left, small_b = torch.linalg.qr(b_OK)
    right, small_a = torch.linalg.qr(a_KI.T)
    u, s, vh = torch.linalg.svd(small_b @ small_a.T, full_matrices=False)
    return vh[:rank] @ right.T, left @ (u[:, :rank] * s[:rank])


def product_norm(a_KI: Tensor, b_OK: Tensor) -> float:
    """Frobenius norm of `B A`, without forming it."""
    return float(torch.linalg.norm(torch.linalg.qr(b_OK).R @ torch.linalg.qr(a_KI.T).R.T))


@dataclass
class _Tally:
    error: float = 0.0
    total: float = 0.0
    worst: tuple[str, float] = ("", -1.0)

    def add(self, name: str, result: Factors, exact: tuple[Tensor, Tensor]) -> None:
        a_KI, b_OK = exact
        total = product_norm(a_KI, b_OK)
        difference = torch.cat([result.a_RI.double(), a_KI]), torch.cat([result.b_OR.double(), -b_OK], dim=1)
        error = product_norm(*difference)
        self.error, self.total = math.hypot(self.error, error), math.hypot(self.total, total)
        if error / (total or 1.0) > self.worst[1]:
            self.worst = name, error / (total or 1.0)

    def combined(self, adapter: Adapter) -> Combined:
        return Combined(adapter, self.error / (self.total or 1.0), self.worst)


def _adapter(parts: Sequence[Part], factors: dict[str, Factors]) -> Adapter:
    """The result with a config whose scale is 1 everywhere."""
    ranks = {name: f.rank for name, f in factors.items()}
    usual = max(sorted(set(ranks.values())), key=list(ranks.values()).count)
    others = {name: rank for name, rank in ranks.items() if rank != usual}
    first = parts[0].adapter.config
    config = lora_config(
        usual,
        usual,
        factors,
        base_model_name_or_path=first.get("base_model_name_or_path"),
        rank_pattern=others,
        alpha_pattern=dict(others),
        target_modules=_targets(parts, factors),
        fan_in_fan_out=any(f.is_transposed for f in factors.values()),
    )
    source = " + ".join(f"{p.weight:g} {p.adapter.source}" for p in parts)
    return Adapter(config=config, factors=factors, whole=_copies([p.adapter for p in parts]), source=source)


def _targets(parts: Sequence[Part], factors: dict[str, Factors]) -> list[str]:
    """Short names where the parts have lists of them that mean no other module; else full names."""
    configs = [part.adapter.config for part in parts]
    lists = [c.get("target_modules") for c in configs]
    narrows = any(c.get("layers_to_transform") is not None or c.get("exclude_modules") for c in configs)
    if narrows or not all(isinstance(names, list) and names for names in lists):
        return sorted(factors)
    return sorted({name for names in lists for name in names or ()})


@dataclass(frozen=True)
class Run:
    """What the folder of an adapter says of the run that made it; None where it says nothing."""

    base_digest: str | None
    template: str | None


def described_runs(folders: Sequence[Path]) -> list[Run]:
    """From `results.json` and `template.json`, which a checkpoint's run has beside it."""

    def value(folder: Path, file: str, key: str) -> str | None:
        path = beside(folder, file)
        found = read_json(path).get(key) if path.is_file() else None
        return found if isinstance(found, str) else None

    return [Run(value(f, "results.json", "base_model_digest"), value(f, "template.json", "digest")) for f in folders]


def check_one_base(adapters: Sequence[Adapter], digests: Sequence[str | None], *, compare_names: bool) -> None:
    """Raise AdapterError when the adapters were trained on different bases.

    Args:
        adapters: to be combined.
        digests: of the base's weights, where the run that made the adapter says so.
        compare_names: also where a digest is missing. One base can have two names, and then `--load` says which.
    """
    named = list(zip(adapters, digests, strict=True))
    for i, (one, digest) in enumerate(named):
        for other, other_digest in named[:i]:
            if digest is not None and other_digest is not None:
                if digest != other_digest:
                    raise AdapterError(
                        f"{other.source} and {one.source} were trained on different base weights ({other_digest[:12]} "
                        f"and {digest[:12]}); combine adapters of one base."
                    )
                continue
            names = one.base_model_name, other.base_model_name
            if compare_names and None not in names and names[0] != names[1]:
                raise AdapterError(
                    f"{other.source} was trained on {names[1]}, {one.source} on {names[0]}; combine adapters of one "
                    "base, or name it with --load."
                )
