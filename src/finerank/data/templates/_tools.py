"""How tools and calls look as text.

Tools, in the system text:

    default   a list with the arguments of each
    qwen      JSON signatures between <tools> tags
    ling      the same with another heading, and a last line that turns thinking off

Calls:

    default   "Action: NAME" and "Action Input: JSON"
    glm4      NAME and JSON on lines of their own
    qwen      JSON between <tool_call> tags; a thought before the call stays there

Source: `formatter.py` of MindSpeed-LLM, which follows LLaMA-Factory 0.8.2. Of several calls at once its default and
glm4 forms show none; here each is shown.
"""

import json
import re
from typing import Any

from finerank.data.rows import BadRow

_DEFAULT = (
    "You have access to the following tools:\n{tools}"
    "Use the following format if using a tool:\n"
    "```\n"
    "Action: tool name (one of [{names}]).\n"
    "Action Input: the input to the tool, in a JSON format representing the kwargs "
    '(e.g. ```{{"input": "hello world", "num_beams": 5}}```).\n'
    "```\n"
)
_SIGNATURES = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>{tools}\n</tools>\n\n"
    "For each function call, return a json object with function name and arguments within "
    "<tool_call></tool_call> XML tags:\n<tool_call>\n"
    '{{"name": <function-name>, "arguments": <args-json-object>}}\n</tool_call>'
)
_THOUGHT = re.compile(r"<think>.*</think>", re.DOTALL)


def tools_text(tool_format: str | None, tools: str, template: str) -> str:
    """What the system text says about the tools of a row; empty when it has none. Raises BadRow."""
    functions = functions_of(tools)
    if not functions:
        return ""
    if tool_format == "default":
        described = "".join(_describe(f) for f in functions)
        return _DEFAULT.format(tools=described, names=", ".join(f["name"] for f in functions))
    signatures = [json.dumps({"type": "function", "function": f}, ensure_ascii=False) for f in functions]
    listed = _SIGNATURES.format(tools="".join("\n" + s for s in signatures))
    if tool_format == "qwen":
        return "\n\n" + listed
    if tool_format == "ling":
        return listed + "\ndetailed thinking off"
    raise BadRow(f"template '{template}' cannot describe tools")


def functions_of(tools: str) -> list[dict[str, Any]]:
    """The tools of a row, without the wrapping that says they are functions. Raises BadRow."""
    try:
        listed = json.loads(tools)
    except (ValueError, RecursionError) as error:
        raise BadRow("tools are not JSON") from error
    if not isinstance(listed, list) or not all(isinstance(tool, dict) for tool in listed):
        raise BadRow("tools are not a list of objects")
    functions = [t["function"] if isinstance(t.get("function"), dict) else t for t in listed]
    if not all(isinstance(f.get("name"), str) for f in functions):
        raise BadRow("a tool has no name")
    return functions


def _describe(function: dict[str, Any]) -> str:
    parameters = function.get("parameters")
    parameters = parameters if isinstance(parameters, dict) else {}
    required = parameters.get("required")
    required = required if isinstance(required, list) else []
    lines = ""
    properties = parameters.get("properties")
    for name, value in (properties if isinstance(properties, dict) else {}).items():
        value = value if isinstance(value, dict) else {}
        must = ", required" if name in required else ""
        enum = (
            f", should be one of [{', '.join(map(str, value['enum']))}]"
            if isinstance(value.get("enum"), list) and value["enum"]
            else ""
        )
        items = value.get("items")
        of = f", where each item should be {items.get('type', '')}" if isinstance(items, dict) else ""
        lines += f"  - {name} ({value.get('type', '')}{must}): {value.get('description', '')}{enum}{of}\n"
    return (
        f"> Tool Name: {function['name']}\nTool Description: {function.get('description', '')}\nTool Args:\n{lines}\n"
    )


def calls_of(content: str) -> list[tuple[str, Any]]:
    """(name, arguments) of calls written as JSON: one object, or a list of them. Raises BadRow."""
    try:
        calls = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise BadRow("a function call is not JSON") from error
    calls = calls if isinstance(calls, list) else [calls]
    for call in calls:
        if not isinstance(call, dict) or not isinstance(call.get("name"), str) or "arguments" not in call:
            raise BadRow("a function call has no name or no arguments")
    return [(call["name"], call["arguments"]) for call in calls]


def call_text(call_format: str, content: str) -> str:
    """The text of a call, made from JSON with name and arguments (one or a list of them). Raises BadRow."""
    if call_format == "qwen":
        found = _THOUGHT.search(content)
        thought = found[0] if found else ""
        calls = [{"name": n, "arguments": a} for n, a in calls_of(content.replace(thought, "") if thought else content)]
        return thought + "\n".join(f"<tool_call>\n{json.dumps(c, ensure_ascii=False)}\n</tool_call>" for c in calls)
    texts = [(name, json.dumps(arguments, ensure_ascii=False)) for name, arguments in calls_of(content)]
    if call_format == "glm4":
        return "\n".join(f"{name}\n{arguments}" for name, arguments in texts)
    assert call_format == "default", call_format
    return "\n".join(f"Action: {name}\nAction Input: {arguments}" for name, arguments in texts)
