"""DeepSeek 3: `<｜User｜>U1<｜Assistant｜>A1`, written with full-width bars."""

from finerank.data.templates._slots import BOS, Slots

TEMPLATE = Slots(
    name="deepseek3",
    user=("<｜User｜>{{content}}<｜Assistant｜>",),
    prefix=(BOS,),
)
