"""The base that a QLoRA adapter was trained against: its linears quantised and dequantised, one at a time.

    bits = bits_of_run(Path("runs/qlora"))          4, 8 or None, from the run's config.yaml
    base = as_trained(base, bits)                   weights as training computed with them
    save_dequantized(Path("runs/qlora"), ...)       these as a model folder of their own, for programs that have no bits

An adapter trained over NF4 or 8-bit linears has learned to make up for their rounding too; merged onto the original
weights it would make up for errors that are not there.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from finerank.checkpoints.native import beside
from finerank.checkpoints.weights import BaseModel, CastWeights, Weights, WeightsOver
from finerank.errors import CheckpointError
from finerank.files import replace_folder

_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "bfloat16": torch.bfloat16, "float32": torch.float32}


SAVED = "dequantized_base"
"""Folder within a run that `--qlora-save-dequantize` writes."""


def bits_of_run(folder: Path) -> int | None:
    """Bits of the base's linears in a run, from its config.yaml; None for a full base or where there is no config."""
    config = _config_of_run(folder)
    return 4 if config.get("load_4bit") else 8 if config.get("load_8bit") else None


def dtype_of_run(folder: Path) -> torch.dtype | None:
    """Precision of a run's base before it was quantised, from its config.yaml or results.json; None if unsaid."""
    said = _config_of_run(folder).get("dtype")
    if said not in _DTYPES:
        try:
            results = json.loads(beside(folder, "results.json").read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            results = None  # a run that was stopped has none
        said = results.get("base_dtype") if isinstance(results, dict) else None
    return _DTYPES.get(said) if isinstance(said, str) else None


def _config_of_run(folder: Path) -> dict[str, Any]:
    path = beside(folder, "config.yaml")
    if not path.is_file():
        return {}
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({' '.join(str(error).split())}); give --base-precision."
        ) from error
    return config if isinstance(config, dict) else {}


def as_trained(base: BaseModel, bits: int, dtype: torch.dtype | None = None) -> BaseModel:
    """The base with its linears (not the output head) as `bits`-bit training sees them, in the base's own dtype.

    `dtype` is what training read the weights in before it quantised them; None for the base's own.
    """
    return replace(base, weights=_Quantized(base.weights, _linears(base), bits, dtype), is_in_folder=False)


def base_as_trained(base: BaseModel, adapter_folder: Path, precision: str) -> BaseModel:
    """The base for `--base-precision`: `trained` goes by the run's config, `original` leaves it as it is."""
    named = {"original": None, "4bit": 4, "8bit": 8}
    bits = bits_of_run(adapter_folder) if precision == "trained" else named[precision]
    if bits is None:
        return base
    own = beside(adapter_folder, SAVED).resolve()
    if precision == "trained" and base.folder is not None and base.folder.resolve() == own:
        return base  # it has been through that already
    print(f"the base's linears are taken as {bits}-bit training sees them (--base-precision original: as they are)")
    return as_trained(base, bits, dtype_of_run(adapter_folder))


def save_dequantized(run: Path, load: str, bits: int, dtype: torch.dtype) -> Path:
    """Write the base that a run computed with, in `dtype`, as a Hugging Face folder; returns the folder.

    An adapter of the run is right on it with any program, and `finerank merge --base-precision original` onto it gives
    what merging the run gives. One tensor is in memory at a time. Raises StorageError, leaving nothing half written.
    """
    from finerank.checkpoints.checksums import write_checksums
    from finerank.checkpoints.formats import hf
    from finerank.checkpoints.open import open_base

    base = open_base(load)
    whole = replace(base, weights=CastWeights(base.weights, dtype))
    with replace_folder(run / SAVED) as aside:
        hf.write(as_trained(whole, bits), aside)
        write_checksums(aside)
    return run / SAVED


def _linears(base: BaseModel) -> dict[str, bool]:
    """Weight names of the linears that `--load-4bit` packs; True where the weight is stored transposed."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**base.config))
    head = model.get_output_embeddings()
    return {
        f"{name}.weight": isinstance(module, Conv1D)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    }


class _Quantized(WeightsOver):
    def __init__(self, weights: Weights, linears: dict[str, bool], bits: int, dtype: torch.dtype | None):
        super().__init__(weights)
        self._linears, self._bits, self._dtype = linears, bits, dtype

    def __getitem__(self, name: str) -> Tensor:
        from finerank.models.quantized import QuantizedLinear

        stored = self._weights[name]
        if name not in self._linears:
            return stored
        weight = stored if self._dtype is None else stored.to(self._dtype)
        if self._linears[name]:
            weight = weight.T.contiguous()
        weight = QuantizedLinear.of(weight, bits=self._bits).dequantized_weight().to(stored.dtype)
        return weight.T.contiguous() if self._linears[name] else weight
