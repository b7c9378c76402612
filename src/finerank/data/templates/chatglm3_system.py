"""ChatGLM 3 with its default system text; the prefix stands before a system text only."""

from finerank.data.templates._slots import Slots, Token

TEMPLATE = Slots(
    name="chatglm3_system",
    user=(Token("<|user|>"), "\n", "{{content}}", Token("<|assistant|>")),
    assistant=("\n", "{{content}}"),
    system=(Token("[gMASK]"), Token("sop"), Token("<|system|>"), "\n", "{{content}}"),
    observation=(Token("<|observation|>"), "\n", "{{content}}", Token("<|assistant|>")),
    default_system=(
        "You are ChatGLM3, a large language model trained by Zhipu.AI. Follow the user's instructions carefully. "
        "Respond using markdown."
    ),
    stop_words=("<|user|>", "<|observation|>"),
    efficient_eos=True,
    call_format="glm4",
)
