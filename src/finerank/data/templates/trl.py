"""The begin-of-text token, then nothing but the texts."""

from finerank.data.templates._slots import BOS, Slots

TEMPLATE = Slots(
    name="trl",
    assistant=("{{content}}",),
    prefix=(BOS,),
)
