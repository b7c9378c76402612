"""The base that a QLoRA adapter was trained against: its linears quantised and dequantised, one at a time.

    bits = bits_of_run(Path("runs/qlora"))          4, 8 or None, from the run's config.yaml
    base = as_trained(base, bits)                   weights as training computed with them

An adapter trained over NF4 or 8-bit linears has learned to make up for their rounding too; merged onto the original
weights it would make up for errors that are not there.
"""

from dataclasses import replace
from pathlib import Path

import torch
import yaml
from torch import Tensor, nn

from finerank.checkpoints.weights import BaseModel, Weights, WeightsOver
from finerank.errors import CheckpointError


def bits_of_run(folder: Path) -> int | None:
    """Bits of the base's linears in a run, from its config.yaml; None for a full base or where there is no config."""
    path = folder / "config.yaml"
    if not path.is_file():
        return None
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({' '.join(str(error).split())}); give --base-precision."
        ) from error
    if not isinstance(config, dict):
        return None
    return 4 if config.get("load_4bit") else 8 if config.get("load_8bit") else None


def as_trained(base: BaseModel, bits: int) -> BaseModel:
    """The base with its linears (not the output head) as `bits`-bit training sees them, in the base's dtype."""
    return replace(base, weights=_Quantized(base.weights, _linears(base), bits), is_in_folder=False)


def base_as_trained(base: BaseModel, adapter_folder: Path, precision: str) -> BaseModel:
    """The base for `--base-precision`: `trained` goes by the run's config, `original` leaves it as it is."""
    named = {"original": None, "4bit": 4, "8bit": 8}
    bits = bits_of_run(adapter_folder) if precision == "trained" else named[precision]
    if bits is None:
        return base
    print(f"the base's linears are taken as {bits}-bit training sees them (--base-precision original: as they are)")
    return as_trained(base, bits)


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
    def __init__(self, weights: Weights, linears: dict[str, bool], bits: int):
        super().__init__(weights)
        self._linears, self._bits = linears, bits

    def __getitem__(self, name: str) -> Tensor:
        from finerank.models.quantized import QuantizedLinear

        weight = self._weights[name]
        if name not in self._linears:
            return weight
        if not self._linears[name]:
            return QuantizedLinear.of(weight, bits=self._bits).dequantized_weight()
        return QuantizedLinear.of(weight.T.contiguous(), bits=self._bits).dequantized_weight().T.contiguous()
