"""ChatGLM 3: `<|user|>` and `<|assistant|>` as single tokens; the next turn's token ends an answer."""

from finerank.data.templates._slots import Slots, Token

TEMPLATE = Slots(
    name="chatglm3",
    user=(Token("<|user|>"), "\n", "{{content}}", Token("<|assistant|>")),
    assistant=("\n", "{{content}}"),
    system=(Token("<|system|>"), "\n", "{{content}}"),
    observation=(Token("<|observation|>"), "\n", "{{content}}", Token("<|assistant|>")),
    prefix=(Token("[gMASK]"), Token("sop")),
    stop_words=("<|user|>", "<|observation|>"),
    efficient_eos=True,
    tool_format=None,
)
