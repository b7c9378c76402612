"""Mistral: `[INST] U1 [/INST]A1</s>`, the system text before the first `[INST]`."""

from finerank.data.templates._slots import BOS, Slots

TEMPLATE = Slots(
    name="mistral",
    user=("[INST] {{content}} [/INST]",),
    prefix=(BOS,),
)
