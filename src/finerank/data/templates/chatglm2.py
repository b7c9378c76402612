"""ChatGLM 2: rounds with a number, from 0, question and answer in Chinese."""

from finerank.data.templates._slots import Slots, Token

TEMPLATE = Slots(
    name="chatglm2",
    user=("[Round {{idx}}]\n\n问：{{content}}\n\n答：",),
    assistant=("{{content}}",),
    separator=("\n\n",),
    prefix=(Token("[gMASK]"), Token("sop")),
    efficient_eos=True,
)
