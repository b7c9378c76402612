"""Bailing mini: roles between `<role>` tags, turns end with `<|role_end|>`."""

from finerank.data.templates._slots import Slots

TEMPLATE = Slots(
    name="bailing_mini",
    user=("<role>HUMAN</role>{{content}}<|role_end|><role>ASSISTANT</role>",),
    assistant=("{{content}}<|role_end|>",),
    system=("<role>SYSTEM</role>{{content}}<|role_end|>",),
    stop_words=("<|endoftext|>",),
    efficient_eos=True,
)
