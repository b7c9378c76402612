"""Bailing mini: roles between `<role>` tags, turns end with `<|role_end|>`."""

from finerank.data.templates._slots import Slots

TEMPLATE = Slots(
    name="bailing_mini",
    user=("<role>HUMAN</role>{{content}}<|role_end|><role>ASSISTANT</role>",),
    assistant=("{{content}}<|role_end|>",),
    system=("<role>SYSTEM</role>{{content}}<|role_end|>",),
    function=("{{content}}<|role_end|>",),
    observation=(
        "<role>OBSERVATION</role>\n<tool_response>\n{{content}}\n</tool_response><|role_end|><role>ASSISTANT</role>",
    ),
    tool_format="ling",
    call_format="qwen",
    stop_words=("<|endoftext|>",),
    efficient_eos=True,
)
