"""SYS, then `Human: U1` and `Assistant:A1` on lines of their own."""

from finerank.data.templates._slots import Slots

TEMPLATE = Slots(
    name="default",
    user=("Human: {{content}}\nAssistant:",),
    system=("{{content}}\n",),
    separator=("\n",),
)
