"""Rows of public instruction and preference data sets to the two standard forms, and the rules both forms obey.

Standard forms (a message is `{"role", "content"}`, an assistant's may carry `tool_calls` in the OpenAI form):

    sft          {"messages": [message, ...]}, optionally "tools": [{"type": "function", "function": {...}}]
    preference   {"prompt": [message, ...], "chosen": [message], "rejected": [message]}

A new schema is one function under `@schema(name, kind, keys)`; `data/convert_chat.py` finds it by the keys.
"""

import json
import re
from collections.abc import Callable
from typing import Any, NamedTuple

ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "function_call"), "assistant"),
    **dict.fromkeys(("observation", "tool"), "tool"),
    "system": "system",
}
# Which turn may follow which; "call" is an assistant's turn that calls tools.
NEXT = {
    "start": ("system", "user"),
    "system": ("user",),
    "user": ("assistant", "call"),
    "call": ("tool",),
    "tool": ("tool", "assistant", "call"),
    "assistant": ("user",),
}
SPECIAL_TOKEN = re.compile(r"<\|(im_start|im_end|endoftext|pad)\|>")
DIALOGUE_TURN = re.compile(r"\n\n(Human|Assistant): ?")


class BadRow(ValueError):
    """A row that cannot be trained on; the message is the reason."""


class Schema(NamedTuple):
    """One form of row: rows that have all `keys` are read by `read` into the standard form of `kind`."""

    name: str
    kind: str
    keys: frozenset[str]
    read: Callable[[dict[str, Any]], dict[str, Any]]


SCHEMAS: dict[str, Schema] = {}


def schema(name: str, kind: str, keys: str) -> Callable:
    def register(read: Callable) -> Callable:
        SCHEMAS[name] = Schema(name, kind, frozenset(keys.split()), read)
        return read

    return register


def recognise(row: dict[str, Any], kind: str) -> list[Schema]:
    """Return the schemas of `kind` whose keys `row` has, without those whose keys another match includes."""
    matches = [entry for entry in SCHEMAS.values() if entry.kind == kind and entry.keys <= row.keys()]
    return [entry for entry in matches if not any(entry.keys < other.keys for other in matches)]


def turn(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


def read_text(content: Any) -> str:
    """A string, or a list of text parts `{"type": "text", "text" or "value": ...}`."""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        return "".join(part.get("text", part.get("value")) for part in content)
    raise BadRow("content is neither a string nor a list of text parts")


def read_call(call: Any) -> dict[str, Any]:
    """A call in the OpenAI form or bare `{"name", "arguments"}`, as an object or as JSON; arguments are parsed."""
    try:
        call = json.loads(call) if isinstance(call, str) else call
        function = call.get("function", call)
        arguments = function["arguments"]
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
        return {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise BadRow("a tool call is not an object with name and arguments") from error


def read_turn(item: Any) -> dict[str, Any]:
    """One turn with the keys from/value (ShareGPT) or role/content (OpenAI)."""
    if not isinstance(item, dict) or ("from" not in item and "role" not in item):
        raise BadRow("a turn is not an object with role and content, or from and value")
    name = item.get("from", item.get("role"))
    if name not in ROLES:
        raise BadRow(f"unknown role `{name}`")
    content = item.get("value", item.get("content"))
    if name == "function_call":
        return turn("assistant", "") | {"tool_calls": [read_call(content)]}
    calls = item.get("tool_calls")
    message = turn(ROLES[name], read_text("" if content is None and calls else content))
    return message | {"tool_calls": [read_call(call) for call in calls]} if calls else message


def read_turns(items: Any) -> list[dict[str, Any]]:
    if not isinstance(items, list):
        raise BadRow("the turns are not a list")
    return [read_turn(item) for item in items]


def with_context(row: dict[str, Any], messages: list[dict[str, Any]]) -> dict[str, Any]:
    """Put the row's own `system` text before the messages and its `tools` (a list, or JSON of one) beside them."""
    if row.get("system"):
        messages = [turn("system", row["system"]), *messages]
    try:
        tools = json.loads(row["tools"]) if isinstance(row.get("tools"), str) and row["tools"] else row.get("tools")
    except ValueError as error:
        raise BadRow("tools is not valid JSON") from error
    if not tools:
        return {"messages": messages}
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise BadRow("tools is not a list of objects")
    tools = [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]
    return {"messages": messages, "tools": tools}


@schema("alpaca", "sft", "instruction output")
def alpaca(row: dict[str, Any]) -> dict[str, Any]:
    question = "\n".join(text for text in (row["instruction"], row.get("input")) if text)
    pairs = [*(row.get("history") or []), (question, row["output"])]
    return with_context(row, [turn(*item) for q, a in pairs for item in (("user", q), ("assistant", a))])


@schema("sharegpt", "sft", "conversations")
def sharegpt(row: dict[str, Any]) -> dict[str, Any]:
    return with_context(row, read_turns(row["conversations"]))


@schema("human_assistant", "sft", "conversation")
def human_assistant(row: dict[str, Any]) -> dict[str, Any]:
    pairs = [(pair["human"], pair["assistant"]) for pair in row["conversation"]]
    return with_context(row, [turn(*item) for q, a in pairs for item in (("user", q), ("assistant", a))])


@schema("messages", "sft", "messages")
def messages(row: dict[str, Any]) -> dict[str, Any]:
    if isinstance(row.get("label"), bool):
        raise BadRow("an answer labelled good or bad (KTO), not an instruction")
    return with_context(row, read_turns(row["messages"]))


@schema("prompt_response", "sft", "prompt response")
def prompt_response(row: dict[str, Any]) -> dict[str, Any]:
    return with_context(row, [turn("user", row["prompt"]), turn("assistant", row["response"])])


@schema("input_target", "sft", "input target")
def input_target(row: dict[str, Any]) -> dict[str, Any]:
    return with_context(row, [turn("user", row["input"]), turn("assistant", row["target"])])


@schema("question_answer", "sft", "question answer")
def question_answer(row: dict[str, Any]) -> dict[str, Any]:
    return with_context(row, [turn("user", row["question"]), turn("assistant", row["answer"])])


def pair(prompt: list, chosen: list, rejected: list) -> dict[str, Any]:
    """Join a prompt and two answers; the answers may repeat the prompt's turns and bring the turns before it."""
    if chosen[:-1] != rejected[:-1]:
        raise BadRow("chosen and rejected differ before the last turn")
    context = chosen[:-1]
    if context and context[len(context) - len(prompt) :] != prompt:
        raise BadRow("chosen does not begin with the prompt")
    return {"prompt": context or prompt, "chosen": chosen[-1:], "rejected": rejected[-1:]}


@schema("preference", "preference", "prompt chosen rejected")
def preference(row: dict[str, Any]) -> dict[str, Any]:
    def read(value: Any, role: str) -> list[dict[str, Any]]:
        return [turn(role, value)] if isinstance(value, str) else read_turns(value)

    return pair(read(row["prompt"], "user"), read(row["chosen"], "assistant"), read(row["rejected"], "assistant"))


@schema("sharegpt_preference", "preference", "conversations chosen rejected")
def sharegpt_preference(row: dict[str, Any]) -> dict[str, Any]:
    prompt = with_context(row, read_turns(row["conversations"]))["messages"]
    return pair(prompt, [read_turn(row["chosen"])], [read_turn(row["rejected"])])


@schema("message_pair", "preference", "chosen_messages rejected_messages")
def message_pair(row: dict[str, Any]) -> dict[str, Any]:
    return pair([], read_turns(row["chosen_messages"]), read_turns(row["rejected_messages"]))


@schema("dialogue_pair", "preference", "chosen rejected")
def dialogue_pair(row: dict[str, Any]) -> dict[str, Any]:
    """hh-rlhf: one string a dialogue, turns opened by "\\n\\nHuman: " and "\\n\\nAssistant: "."""

    def read(text: Any) -> list[dict[str, Any]]:
        if not isinstance(text, str):
            return read_turns(text)
        parts = DIALOGUE_TURN.split(text)[1:]
        roles = ["user" if name == "Human" else "assistant" for name in parts[::2]]
        return [turn(role, content.strip()) for role, content in zip(roles, parts[1::2], strict=True)]

    return pair([], read(row["chosen"]), read(row["rejected"]))


def neutralise(row: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """Return `row` with spaces inside every text that is spelt like a special token, and how many there were.

    A tokenizer would read `<|im_end|>` in the text as the end of the turn, so that a row could open turns of its own.
    `<| im_end |>` stays legible and is made of ordinary tokens.
    """
    text, count = SPECIAL_TOKEN.subn(r"<| \1 |>", json.dumps(row, ensure_ascii=False))
    return (json.loads(text), count) if count else (row, 0)


def check_messages(messages: Any) -> None:
    """Raise [`BadRow`] unless the turns alternate as in `NEXT`, none is empty, and the last is the assistant's."""
    if not isinstance(messages, list) or not messages:
        raise BadRow("no messages")
    last = "start"
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise BadRow(f"turn {number} is not an object with role and content")
        role, content = message["role"], message["content"]
        if not isinstance(content, str):
            raise BadRow(f"the content of turn {number} is not a string")
        this = "call" if role == "assistant" and message.get("tool_calls") else role
        if this not in NEXT[last]:
            raise BadRow(f"turn {number} is `{this}` after `{last}`, expected {' or '.join(NEXT[last])}")
        if this != "call" and not content.strip():
            raise BadRow(f"turn {number} ({role}) is empty")
        last = this
    if last not in ("assistant", "call"):
        raise BadRow(f"the last turn is `{last}`, not the assistant's")


def check_row(row: dict[str, Any], kind: str) -> None:
    """Raise [`BadRow`] unless `row` is in the standard form of `kind` ("sft" or "preference") and fit to train on."""
    keys = ("messages",) if kind == "sft" else ("prompt", "chosen", "rejected")
    if not all(isinstance(row.get(key), list) for key in keys):
        raise BadRow(f"not in the standard form: {', '.join(keys)} must be lists of messages; keys: {', '.join(row)}")
    if kind == "sft":
        check_messages(row["messages"])
    else:
        check_messages(row["prompt"] + row["chosen"])
        check_messages(row["prompt"] + row["rejected"])
        if len(row["chosen"]) != 1 or len(row["rejected"]) != 1 or not row["prompt"]:
            raise BadRow("chosen and rejected must be one turn each, after a prompt")
        if row["chosen"] == row["rejected"]:
            raise BadRow("chosen equals rejected")
    text = json.dumps(row, ensure_ascii=False)
    if token := SPECIAL_TOKEN.search(text):
        raise BadRow(f"the text holds the special token {token[0]}")
    if re.search("[\ud800-\udfff]", text):
        raise BadRow("the text holds half a surrogate pair")
