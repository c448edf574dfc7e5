"""Read tools and tool calls: as keys of a row, and as some sets write them into texts (Hermes, Qwen, ToolACE)."""

import ast
import json
import re
from typing import Any

from buddygpt.data.chat.rules import BadRow

TAGGED_TOOLS = re.compile(r"<tools>\s*([\[{].*?)\s*</tools>", re.DOTALL)  # Hermes and Qwen
LISTED_TOOLS = re.compile(r"functions in JSON format that you can invoke:?\s*(?=\[)")  # ToolACE
TOOL_GUIDE = re.compile(  # where the text about tools begins, which chat templates write themselves
    r"#+ Tools\b|You are provided with function signatures|Here is a list of functions|<tools>"
)
TAGGED_CALL = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)
TAGGED_RESULT = re.compile(r"<tool_response>\s*(.*?)\s*</tool_response>\s*", re.DOTALL)
JSON_NAMES = {"true": True, "false": False, "null": None}


def loads(text: str) -> Any:
    """Parse JSON, or a Python literal, which some sets write instead. Raises ValueError."""
    try:
        return json.loads(text)
    except ValueError as error:
        try:
            return ast.literal_eval(text.strip())
        except (SyntaxError, ValueError, MemoryError, RecursionError):
            raise error from None


def parse_json(value: Any, name: str) -> Any:
    """Return a value, parsed if it is a JSON string; None for anything empty."""
    if not isinstance(value, str) or not value:
        return value or None
    try:
        return loads(value)
    except ValueError as error:
        raise BadRow(f"{name} is not valid JSON") from error


def read_call(call: Any) -> dict[str, Any]:
    """Read a call in the OpenAI form or bare, as an object or as JSON; parse its arguments.

    A bare call is `{"name", "arguments"}`; `parameters` (Llama) or `input` (Anthropic) may stand for the arguments.
    """
    try:
        if isinstance(call, str):
            call = loads(call)
        function = call.get("function", call)
        arguments = next(function[key] for key in ("arguments", "parameters", "input") if key in function)
        if isinstance(arguments, str):
            arguments = loads(arguments)
        return {"type": "function", "function": {"name": function["name"], "arguments": dict(arguments)}}
    except (ValueError, AttributeError, KeyError, TypeError, StopIteration) as error:
        raise BadRow("a tool call is not an object with name and arguments") from error


def read_calls(value: Any, name: str) -> list[dict[str, Any]]:
    """Read one call or a list of calls, also as JSON; nothing for anything empty."""
    calls = parse_json(value, name) or []
    return [read_call(call) for call in (calls if isinstance(calls, list) else [calls])]


def read_tools(value: Any) -> list[dict[str, Any]]:
    """Read a list of functions, or its JSON, in the OpenAI form or bare."""
    tools = parse_json(value, "tools") or []
    standard = []
    for tool in tools if isinstance(tools, list) else [tools]:
        if isinstance(tool, str):
            tool = parse_json(tool, "tools")
        if not isinstance(tool, dict) or "function" not in tool:
            tool = {"type": "function", "function": {key: value for key, value in dict(tool).items() if key != "type"}}
        standard.append(tool)
    return standard


# --- Tools and calls in texts ---


def read_calls_in_text(
    messages: list[dict[str, Any]], tools: list[dict[str, Any]]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the messages with the calls and results that their texts hold as turns, and the tools.

    A text becomes a call only if the system turn explains the notation, or if every call is of one of the tools: a
    quotation must not call anything. The explanation is cut, because chat templates write their own.

    Args:
        tools: Those of the row; if there are none, those that the system turn lists.

    Raises:
        BadRow: A text has a call in the notation that the system turn explains, but not a readable one.
    """
    system = messages[0]["content"] if messages and messages[0]["role"] == "system" else ""
    listed = LISTED_TOOLS.search(system)
    tools = tools or _tools_in_system(system, listed)
    if not tools:
        return messages, tools
    names = [str(tool["function"].get("name")) for tool in tools]
    explained = "<tool_call>" in system
    turns = []
    for message in messages:
        content = message["content"]
        after_call = turns and (turns[-1].get("tool_calls") or turns[-1]["role"] == "tool")
        if message["role"] == "system" and (listed or TAGGED_TOOLS.search(system)):
            content = system[: TOOL_GUIDE.search(system).start()].strip()
            turns += [message | {"content": content}] if content else []
        elif message["role"] == "assistant" and not message.get("tool_calls"):
            text, calls = _listed_calls(content, names) if listed else _tagged_calls(content, names, explained)
            turns.append(message | {"content": text, "tool_calls": calls} if calls else message)
        elif after_call and TAGGED_RESULT.search(content) and not TAGGED_RESULT.sub("", content).strip():
            turns += [message | {"role": "tool", "content": text} for text in TAGGED_RESULT.findall(content)]
        else:
            turns.append(message)
    return turns, tools


def _tools_in_system(system: str, listed: re.Match | None) -> list[dict[str, Any]]:
    """Return the tools that a system turn lists: one list, or one object after the other."""
    if tagged := TAGGED_TOOLS.search(system):
        text = tagged[1]
        try:
            return read_tools(loads(text))
        except ValueError:
            return read_tools([loads(line) for line in text.splitlines() if line.strip()])
    if listed:
        return read_tools(json.JSONDecoder().raw_decode(system, listed.end())[0])
    return []


def _tagged_calls(content: str, names: list[str], explained: bool) -> tuple[str, list[dict[str, Any]]]:
    """Read `<tool_call>{"name", "arguments"}</tool_call>`; return the other text and the calls."""
    texts = TAGGED_CALL.findall(content)
    try:
        calls = [read_call(text) for text in texts]
    except BadRow:
        if explained:
            raise
        return content, []
    if not explained and any(call["function"]["name"] not in names for call in calls):
        return content, []
    return TAGGED_CALL.sub("", content).strip(), calls


def _listed_calls(content: str, names: list[str]) -> tuple[str, list[dict[str, Any]]]:
    """Read ToolACE's `[NAME(KEY=VALUE, ...), ...]`; names may contain spaces."""
    # Python's parser reads the calls once each name is an identifier.
    known = sorted(set(names), key=len, reverse=True)
    pattern = re.compile(rf"(?:(?<=[\[,])|(?<=, ))({'|'.join(map(re.escape, known))})\(")
    if not re.match(rf"\[\s*(?:{'|'.join(map(re.escape, known))})\(", content.strip()):
        return content, []
    text = pattern.sub(lambda match: f"_{names.index(match[1])}(", content.strip())
    try:
        calls = []
        for call in ast.parse(text, mode="eval").body.elts:
            arguments = {keyword.arg: _literal(keyword.value) for keyword in call.keywords}
            if call.args or None in arguments:
                raise ValueError
            calls.append(read_call({"name": names[int(call.func.id[1:])], "arguments": arguments}))
        return "", calls
    except (SyntaxError, ValueError, AttributeError, MemoryError, RecursionError) as error:
        raise BadRow("a tool call is not a list of NAME(KEY=VALUE)") from error


def _literal(node: ast.expr) -> Any:
    """Return the value of a literal in which JSON's true, false and null may stand for Python's."""

    class Names(ast.NodeTransformer):
        def visit_Name(self, name: ast.Name) -> ast.AST:
            return ast.Constant(JSON_NAMES[name.id]) if name.id in JSON_NAMES else name

    return ast.literal_eval(Names().visit(node))
