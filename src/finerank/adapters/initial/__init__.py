"""How a fresh adapter starts: `--init-lora-weights NAME`, one file here for each name, under PEFT's names.

    default      A uniform, B zero                              gaussian, orthogonal   other random factors
    pissa        the weight's leading singular components       pissa_niter_16         the same by a fast SVD
    olora        orthonormal columns of the weight's QR         eva                    components of the layer's inputs

Each file has `start(adapters, options)`, which fills the factors of adapters that are in place. PiSSA and OLoRA start
from factors A0, B0 that the base already contains: only what they change by counts, `scale * (B A - B0 A0)`, so the
base is left as it is (PEFT subtracts `scale * B0 A0` from it; in fp32 both compute the same) and what is saved is a
plain LoRA adapter of twice the rank.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from finerank import registry
from finerank.adapters.settings import AdapterSettings
from finerank.errors import AdapterError, ConfigError, unknown_name

if TYPE_CHECKING:
    from torch import Tensor

    from finerank.adapters.adapter_set import AdapterSet

PACKAGE = "finerank.adapters.initial"


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One forward pass over a micro-batch of training rows, for starts that look at the data."""

    trained_BT: "Tensor"
    """bool [B, T]: the tokens that are trained."""
    run: Callable[[], Any]
    real_BT: "Tensor | None" = None
    """bool [B, T]: the tokens that are no padding; None for all."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a start may need."""

    seed: int
    num_iterations: int | None = None
    """Subspace iterations of a fast SVD; None for the full one."""
    rho: float = 2.0
    """EVA: the highest rank of a layer over the one it is given."""
    passes: Callable[[], Iterator[Pass]] | None = None
    """Begins the training rows anew, without end."""


def check_initial(settings: AdapterSettings) -> None:
    """Raise ConfigError for an unknown start, and for what goes with no such start."""
    name, num_iterations = _parse(settings.init_lora_weights)
    known = registry.names(PACKAGE)
    if name not in known:
        raise ConfigError(unknown_name("--init-lora-weights", settings.init_lora_weights, [*known, "pissa_niter_16"]))
    if num_iterations is not None and name != "pissa":
        raise ConfigError(f"--init-lora-weights {settings.init_lora_weights}: only pissa takes _niter_N.")
    if settings.eva_rho is not None:
        if name != "eva":
            raise ConfigError("--eva-rho has no effect without --init-lora-weights eva; give that too.")
        if not (math.isfinite(settings.eva_rho) and settings.eva_rho >= 1):
            raise ConfigError(f"--eva-rho must be at least 1, not {settings.eva_rho:g}; 2 is the authors' value.")
    if name != "default" and settings.lu_lora_final_layer_index is not None:
        raise ConfigError(
            f"--init-lora-weights {settings.init_lora_weights} and --lu-lora-final-layer-index exclude each other: "
            "local rules choose their own start; give one of them."
        )


def start_adapters(
    adapters: "AdapterSet",
    settings: AdapterSettings,
    *,
    seed: int,
    passes: Callable[[], Iterator[Pass]] | None = None,
) -> None:
    """Let fresh adapters start as the settings say.

    Raises:
        AdapterError: a rank that the start cannot have, or rows with too few trained tokens.
    """
    name, num_iterations = _parse(settings.init_lora_weights)
    rho = 2.0 if settings.eva_rho is None else settings.eva_rho
    module = registry.load(PACKAGE, name, "--init-lora-weights")
    module.start(adapters, Options(seed=seed, num_iterations=num_iterations, rho=rho, passes=passes))


def shape_adapters(adapters: "AdapterSet", settings: AdapterSettings, tensors: "Mapping[str, Tensor]") -> None:
    """Give fresh adapters the ranks and places of saved ones with the same settings, for their values to be loaded.

    `tensors`: the saved parameters by their names in `AdapterSet.named_parameters`.
    """
    if _parse(settings.init_lora_weights)[0] != "default":
        from finerank.adapters.initial._ranks import shape_as

        shape_as(adapters, tensors)


def check_base_unchanged(config: "Mapping[str, Any]", source: Any) -> None:
    """Raise AdapterError for an adapter whose file says that it belongs to a base that its start has changed.

    PEFT subtracts the start of these from the base; over the original base, the same factors mean something else.
    """
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(("pissa", "olora", "corda", "loftq", "lora_ga")):
        raise AdapterError(
            f"{source} was saved with init_lora_weights = {start}: its factors belong to a base that PEFT changed; "
            "save it from PEFT with path_initial_model_for_weight_conversion, as an adapter of the original base."
        )


def _parse(text: str) -> tuple[str, int | None]:
    """`pissa_niter_16` -> ("pissa", 16)"""
    match = re.fullmatch(r"(.+)_niter_(\d{1,4})", text.replace("-", "_"))
    return (match[1], int(match[2])) if match else (text.replace("-", "_"), None)
