"""MiniCPM 3: the form of DeepSeek 2."""

from finerank.data.templates._slots import BOS, Slots

TEMPLATE = Slots(
    name="minicpm3",
    user=("User: {{content}}\n\nAssistant:",),
    system=("{{content}}\n\n",),
    prefix=(BOS,),
)
