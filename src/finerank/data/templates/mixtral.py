"""Mixtral: the form of Mistral."""

from finerank.data.templates._slots import BOS, Slots

TEMPLATE = Slots(
    name="mixtral",
    user=("[INST] {{content}} [/INST]",),
    prefix=(BOS,),
)
