"""GLM 4: `[gMASK]<sop>`, then `<|user|>` and `<|assistant|>` written as text."""

from finerank.data.templates._slots import Slots

TEMPLATE = Slots(
    name="glm4",
    user=("<|user|>\n{{content}}<|assistant|>",),
    assistant=("\n{{content}}",),
    system=("<|system|>\n{{content}}",),
    observation=("<|observation|>\n{{content}}<|assistant|>",),
    prefix=("[gMASK]<sop>",),
    stop_words=("<|user|>", "<|observation|>"),
    efficient_eos=True,
    tool_format=None,
    call_format="glm4",
)
