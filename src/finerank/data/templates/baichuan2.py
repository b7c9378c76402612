"""Baichuan 2: reserved tokens 106 and 107 before user and assistant."""

from finerank.data.templates._slots import Slots

TEMPLATE = Slots(
    name="baichuan2",
    user=("<reserved_106>{{content}}<reserved_107>",),
    assistant=("{{content}}",),
    efficient_eos=True,
)
