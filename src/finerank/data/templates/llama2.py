"""Llama 2: `[INST] <<SYS>>SYS<</SYS>> U1 [/INST]A1</s>`, the system text inside the first user turn."""

from finerank.data.templates._slots import BOS, Slots

TEMPLATE = Slots(
    name="llama2",
    user=(BOS, "[INST] {{content}} [/INST]"),
    system=("<<SYS>>\n{{content}}\n<</SYS>>\n\n",),
    system_inside_user=True,
)
