"""DeepSeek 2 Lite: the form of DeepSeek 2."""

from finerank.data.templates._slots import BOS, Slots

TEMPLATE = Slots(
    name="deepseek2-lite",
    user=("User: {{content}}\n\nAssistant:",),
    system=("{{content}}\n\n",),
    prefix=(BOS,),
)
