"""A within `1 / sqrt(in_features)`, B zero: Microsoft's LoRA and PEFT's `init_lora_weights=True`."""

from finerank.adapters.adapter_set import AdapterSet
from finerank.adapters.initial import Options


def start(adapters: AdapterSet, options: Options) -> None:
    """Nothing to do: adapters are put in place like this."""
