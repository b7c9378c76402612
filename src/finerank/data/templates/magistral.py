"""Magistral: Mistral's newer tags, with thoughts; see `_slots` for the rules."""

from finerank.data.templates._slots import BOS, Slots

TEMPLATE = Slots(
    name="magistral",
    user=("[INST]{{content}}[/INST]",),
    system=("[SYSTEM_PROMPT]{{content}}[/SYSTEM_PROMPT]",),
    prefix=(BOS,),
    tool_format=None,
    reasoning=True,
)
