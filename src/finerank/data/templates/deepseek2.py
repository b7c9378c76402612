"""DeepSeek 2: `User: U1` and `Assistant:A1`."""

from finerank.data.templates._slots import BOS, Slots

TEMPLATE = Slots(
    name="deepseek2",
    user=("User: {{content}}\n\nAssistant:",),
    system=("{{content}}\n\n",),
    prefix=(BOS,),
)
