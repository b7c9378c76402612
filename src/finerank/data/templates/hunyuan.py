"""Hunyuan: nothing but the texts, after a default system text."""

from finerank.data.templates._slots import Slots

TEMPLATE = Slots(
    name="hunyuan",
    assistant=("{{content}}",),
    default_system="You are a helpful assistant.",
)
