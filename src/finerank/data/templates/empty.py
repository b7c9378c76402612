"""Nothing but the texts, no end token: SYS U1 A1 U2 A2."""

from finerank.data.templates._slots import Slots

TEMPLATE = Slots(
    name="empty",
    assistant=("{{content}}",),
)
