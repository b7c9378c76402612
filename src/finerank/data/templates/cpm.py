"""CPM: `<用户>U1<AI>A1`."""

from finerank.data.templates._slots import BOS, Slots

TEMPLATE = Slots(
    name="cpm",
    user=("<用户>{{content}}<AI>",),
    prefix=(BOS,),
)
