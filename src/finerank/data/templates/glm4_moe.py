"""GLM 4.5: GLM 4 with thoughts; see `_slots` for the rules."""

from finerank.data.templates._slots import Slots

TEMPLATE = Slots(
    name="glm4_moe",
    user=("<|user|>\n{{content}}<|assistant|>",),
    assistant=("\n{{content}}",),
    system=("<|system|>\n{{content}}",),
    observation=("<|observation|>\n{{content}}<|assistant|>",),
    prefix=("[gMASK]<sop>",),
    stop_words=("<|user|>", "<|observation|>"),
    efficient_eos=True,
    tool_format=None,
    call_format="glm4",
    reasoning=True,
)
