"""Read turns, tool calls and tools in the spellings they are published in, as messages of the standard forms."""

import json
import re
from typing import Any

from buddygpt.data.chat.rules import BadRow

ROLES = {
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "system": "system",
}
DIALOGUE_TURN = re.compile(r"\n\n(Human|Assistant): ?")


def turn(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


def exchange(question: str, answer: str) -> list[dict[str, Any]]:
    return [turn("user", question), turn("assistant", answer)]


def read_turns(items: Any) -> list[dict[str, Any]]:
    """Read a list of turns; a system turn without text is dropped."""
    if not isinstance(items, list):
        raise BadRow("the turns are not a list")
    messages = [read_turn(item) for item in items]
    return [message for message in messages if message["role"] != "system" or message["content"]]


def read_turn(item: Any) -> dict[str, Any]:
    """Read one turn with the keys from/value (ShareGPT) or role/content (OpenAI)."""
    if not isinstance(item, dict) or ("from" not in item and "role" not in item):
        raise BadRow("a turn is not an object with role and content, or from and value")
    name = item.get("from", item.get("role"))
    if name not in ROLES:
        raise BadRow(f"unknown role {name!r:.40}")
    content = item.get("value", item.get("content"))

    # ShareGPT: the turn's text is the JSON of one call or of several.
    if name == "function_call":
        calls = parse_json(content, "a tool call")
        calls = calls if isinstance(calls, list) else [calls]
        return turn("assistant", "") | {"tool_calls": [read_call(call) for call in calls]}

    # OpenAI: the calls have a key for themselves, and the content may be null next to them.
    calls = parse_json(item.get("tool_calls"), "tool_calls")
    if content is None and calls:
        content = ""
    message = turn(ROLES[name], read_text(content))
    if item.get("reasoning_content"):
        message["reasoning_content"] = read_text(item["reasoning_content"])
    if calls:
        message["tool_calls"] = [read_call(call) for call in calls]
    return message


def read_text(content: Any) -> str:
    """Read a string, or a list of text parts `{"type": "text", "text" or "value": ...}`."""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        return "".join(part.get("text", part.get("value")) for part in content)
    raise BadRow("content is neither a string nor a list of text parts")


def read_answer(value: Any, role: str) -> list[dict[str, Any]]:
    """Read a text, a turn, or a list of turns."""
    if isinstance(value, str):
        return [turn(role, value)]
    if isinstance(value, dict):
        return [read_turn(value)]
    return read_turns(value)


def read_dialogue(text: str) -> list[dict[str, Any]]:
    """Read an hh-rlhf dialogue: turns that open with "\\n\\nHuman: " and "\\n\\nAssistant: "."""
    _, *parts = DIALOGUE_TURN.split(text)
    if not parts:
        raise BadRow("a dialogue has no turn that opens with a blank line and `Human:`")
    messages = []
    for name, content in zip(parts[::2], parts[1::2], strict=True):
        messages.append(turn("user" if name == "Human" else "assistant", content.strip()))
    return messages


def parse_json(value: Any, name: str) -> Any:
    """Return a value, parsed if it is a JSON string; None for anything empty."""
    if not isinstance(value, str) or not value:
        return value or None
    try:
        return json.loads(value)
    except ValueError as error:
        raise BadRow(f"{name} is not valid JSON") from error


def read_call(call: Any) -> dict[str, Any]:
    """Read a call in the OpenAI form or bare `{"name", "arguments"}`, as an object or as JSON; parse its arguments."""
    try:
        if isinstance(call, str):
            call = json.loads(call)
        function = call.get("function", call)
        arguments = function["arguments"]
        if isinstance(arguments, str):
            arguments = json.loads(arguments)
        return {"type": "function", "function": {"name": function["name"], "arguments": dict(arguments)}}
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise BadRow("a tool call is not an object with name and arguments") from error


def read_tool(tool: Any) -> dict[str, Any]:
    """Read a function in the OpenAI form, or bare."""
    if isinstance(tool, dict) and "function" in tool:
        return tool
    return {"type": "function", "function": dict(tool)}


def add_context(row: dict[str, Any], standard: dict[str, Any], key: str = "messages") -> dict[str, Any]:
    """Return a standard row with the system text and the tools of the row it was made from.

    The tools are a list, or its JSON, under `tools` of the row or (minimind-3) of one of its `conversations`.

    Args:
        key: The list of messages that the `system` text of `row` opens.
    """
    if row.get("system"):
        standard = standard | {key: [turn("system", row["system"]), *standard[key]]}
    holders = [row]
    for item in row.get("conversations") or ():
        if isinstance(item, dict):
            holders.append(item)
    given = [holder["tools"] for holder in holders if holder.get("tools")]
    tools = parse_json(given[0], "tools") if given else None
    if tools:
        standard = standard | {"tools": [read_tool(tool) for tool in tools]}
    return standard
