"""GLM 4.5: GLM 4 with thoughts; see `_slots` for the rules."""

from finerank.data.templates._slots import Slots

TEMPLATE = Slots(
    name="glm4_moe",
    user=("<|user|>\n{{content}}<|assistant|>",),
    assistant=("\n{{content}}",),
    system=("<|system|>\n{{content}}",),
    observation=("<|observation|>\n<tool_response>\n{{content}}\n</tool_response><|assistant|>",),
    prefix=("[gMASK]<sop>",),
    stop_words=("<|user|>", "<|observation|>"),
    efficient_eos=True,
    tool_format=None,
    reasoning=True,
)
