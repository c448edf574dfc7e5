"""Readers of the schemas in which instruction and preference data is published, into the forms of chat_rules.py.

A new schema is one function under `@schema(name, kind, keys)`; a file's schema is recognised by the keys of its rows.
"""

import json
import re
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from buddygpt.cli.errors import UserError
from buddygpt.data.chat.rules import FORMS, BadRow, check_row, neutralise, read_label, refuse_label
from buddygpt.data.text.rows import Row

ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "function_call"), "assistant"),
    **dict.fromkeys(("observation", "tool"), "tool"),
    "system": "system",
}
DIALOGUE_TURN = re.compile(r"\n\n(Human|Assistant): ?")
MOSS_TURN = re.compile(r"(?:<\|[\w ]+\|>:)?\s*(.*?)\s*(?:<eo[a-z]>)?\s*", re.DOTALL)
ROWS_LOOKED_AT = 100  # to recognise a file's schema
EMPTY_ROW = "the row is empty"


class Schema(NamedTuple):
    """One form of row: rows with all `keys`, and if `judged` a true or false label, are read into rows of `kind`."""

    name: str
    kind: str
    keys: frozenset[str]
    judged: bool
    read: Callable[[dict[str, Any]], dict[str, Any] | list[dict[str, Any]]]

    def fits(self, row: dict[str, Any]) -> bool:
        return self.keys <= row.keys() and (not self.judged or read_label(row) is not None)


SCHEMAS: dict[str, Schema] = {}


def schema(name: str, kind: str, keys: str, judged: bool = False) -> Callable:
    def register(read: Callable) -> Callable:
        SCHEMAS[name] = Schema(name, kind, frozenset(keys.split()), judged, read)
        return read

    return register


def recognise(row: dict[str, Any], kind: str | None = None) -> list[Schema]:
    """Return the schemas that `row` fits, without those whose keys another includes.

    Args:
        kind: "sft", "kto" or "preference"; None for the last of these that the row fits any schema of.
    """
    matches = [entry for entry in SCHEMAS.values() if kind in (None, entry.kind) and entry.fits(row)]
    matches = [entry for entry in matches if not any(entry.keys < other.keys for other in matches)]
    last = max((list(FORMS).index(entry.kind) for entry in matches), default=None)
    return [entry for entry in matches if entry.kind == list(FORMS)[last]]


def show(row: Any) -> str:
    """The beginning of a row, for an error of one line."""
    text = json.dumps(row, ensure_ascii=False, default=str)
    return text if len(text) <= 200 else f"{text[:200]}…"


def find_schema(path: Path, rows: Iterable[Row], kind: str | None = None) -> Schema:
    """Return the one schema that the first rows of a file fit; rows that fit none may stand between.

    Raises:
        UserError: A row fits several schemas, or another than those before, or no row fits any; with the row.
    """
    first, found, unreadable = None, None, None
    for row in islice(rows, ROWS_LOOKED_AT):
        if row.error or not row.content:
            unreadable = unreadable or row
            continue
        first = first or row
        matches = recognise(row.content, kind)
        if len(matches) > 1:
            names = ", ".join(entry.name for entry in matches)
            raise UserError(f"{path}:{row.number}: fits several schemas ({names}): {show(row.content)}. Give --schema")
        if found and matches and matches[0] != found:
            _refuse_mixture(path, row, found, matches[0])
        found = found or (matches[0] if matches else None)
    if first is None:
        fault = f":{unreadable.number}: {unreadable.error or EMPTY_ROW}" if unreadable else " is empty"
        raise UserError(f"{path}{fault}")
    if found is None:
        entries = [entry for entry in SCHEMAS.values() if kind in (None, entry.kind)]
        known = "; ".join(f"{entry.name} ({', '.join(sorted(entry.keys))})" for entry in entries)
        row = f"{path}:{first.number}: fits no schema; its keys: {', '.join(first.content)}; {show(first.content)}"
        raise UserError(f"{row}. Give --schema, one of: {known}")
    return found


def require_schema(path: Path, row: Row, schema: Schema, kind: str | None = None) -> None:
    """Raise [`UserError`] if a later row of a file fits another schema than the rows before."""
    matches = recognise(row.content, kind)
    if matches and schema not in matches:
        _refuse_mixture(path, row, schema, matches[0])


def _refuse_mixture(path: Path, row: Row, schema: Schema, other: Schema) -> None:
    raise UserError(
        f"{path}:{row.number}: a row of schema {other.name} after rows of {schema.name}: {show(row.content)}. "
        f"Split the file, or read the rows of one schema with --schema {schema.name}"
    )


def convert(
    row: dict[str, Any], schema: Schema, special_tokens: tuple[str, ...] = ()
) -> tuple[list[dict[str, Any]], int]:
    """Return what a row stands for in standard form, and how many special tokens were neutralised in it.

    Args:
        special_tokens: See [`neutralise`].

    Raises:
        BadRow: It does not have the keys or types of the schema, or breaks a rule; with the reason.
    """
    if not row:
        raise BadRow(EMPTY_ROW)
    if schema.kind == "sft":
        refuse_label(row)
    if missing := schema.keys - row.keys():
        raise BadRow(f"no key {' and '.join(sorted(missing))}, unlike the schema {schema.name}")
    try:
        rows = schema.read(row)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, BadRow):
            raise
        raise BadRow(f"does not have the types of the schema {schema.name}") from error
    pairs = [neutralise(standard, special_tokens) for standard in (rows if isinstance(rows, list) else [rows])]
    for standard, _ in pairs:
        check_row(standard, schema.kind, special_tokens)
    return [standard for standard, _ in pairs], sum(count for _, count in pairs)


def turn(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


def exchange(question: str, answer: str) -> list[dict[str, Any]]:
    return [turn("user", question), turn("assistant", answer)]


def read_text(content: Any) -> str:
    """A string, or a list of text parts `{"type": "text", "text" or "value": ...}`."""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        return "".join(part.get("text", part.get("value")) for part in content)
    raise BadRow("content is neither a string nor a list of text parts")


def read_json(value: Any, name: str) -> Any:
    """A value, or the JSON of it; an empty string is None."""
    try:
        return json.loads(value) if isinstance(value, str) and value else value or None
    except ValueError as error:
        raise BadRow(f"{name} is not valid JSON") from error


def read_call(call: Any) -> dict[str, Any]:
    """A call in the OpenAI form or bare `{"name", "arguments"}`, as an object or as JSON; arguments are parsed."""
    try:
        call = json.loads(call) if isinstance(call, str) else call
        function = call.get("function", call)
        arguments = function["arguments"]
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
        return {"type": "function", "function": {"name": function["name"], "arguments": dict(arguments)}}
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise BadRow("a tool call is not an object with name and arguments") from error


def read_turn(item: Any) -> dict[str, Any]:
    """One turn with the keys from/value (ShareGPT) or role/content (OpenAI)."""
    if not isinstance(item, dict) or ("from" not in item and "role" not in item):
        raise BadRow("a turn is not an object with role and content, or from and value")
    name = item.get("from", item.get("role"))
    if name not in ROLES:
        raise BadRow(f"unknown role {name!r:.40}")
    content = item.get("value", item.get("content"))
    if name == "function_call":
        calls = read_json(content, "a tool call")
        calls = calls if isinstance(calls, list) else [calls]
        return turn("assistant", "") | {"tool_calls": [read_call(call) for call in calls]}
    calls = read_json(item.get("tool_calls"), "tool_calls")
    message = turn(ROLES[name], read_text("" if content is None and calls else content))
    if item.get("reasoning_content"):
        message["reasoning_content"] = read_text(item["reasoning_content"])
    return message | {"tool_calls": [read_call(call) for call in calls]} if calls else message


def read_turns(items: Any) -> list[dict[str, Any]]:
    """Turns of a list, without a system turn that says nothing."""
    if not isinstance(items, list):
        raise BadRow("the turns are not a list")
    messages = [read_turn(item) for item in items]
    return [message for message in messages if message["role"] != "system" or message["content"]]


def with_context(row: dict[str, Any], standard: dict[str, Any], key: str = "messages") -> dict[str, Any]:
    """Put the row's own `system` text before the turns under `key`, and its tools beside them.

    `tools` are a list or the JSON of one, of the row or (minimind-3) of one of its `conversations`.
    """
    if row.get("system"):
        standard = standard | {key: [turn("system", row["system"]), *standard[key]]}
    items = row.get("conversations") or ()
    given = [row.get("tools"), *(item.get("tools") for item in items if isinstance(item, dict))]
    tools = read_json(next(filter(None, given), None), "tools")
    if not tools:
        return standard
    return standard | {"tools": [read_tool(tool) for tool in tools]}


def read_tool(tool: Any) -> dict[str, Any]:
    """A function in the OpenAI form, or bare."""
    return tool if isinstance(tool, dict) and "function" in tool else {"type": "function", "function": dict(tool)}


def instruction(row: dict[str, Any], question: str, answer: str) -> dict[str, Any]:
    """A question and its answer, after the row's `history` of [question, answer]."""
    history = row.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise BadRow("history is not a list of [question, answer]")
    pairs = [*history, (question, answer)]
    return with_context(row, {"messages": [message for pair in pairs for message in exchange(*pair)]})


def join_input(row: dict[str, Any], key: str) -> str:
    texts = [text for text in (row[key], row.get("input")) if text]
    if not all(isinstance(text, str) for text in texts):
        raise BadRow(f"{key} or input is not a string")
    return "\n".join(texts)


@schema("alpaca", "sft", "instruction output")
def alpaca(row: dict[str, Any]) -> dict[str, Any]:
    return instruction(row, join_input(row, "instruction"), row["output"])


@schema("seed_tasks", "sft", "instruction instances")
def seed_tasks(row: dict[str, Any]) -> list[dict[str, Any]]:
    """An instruction with several inputs and outputs: a row of each."""
    if not row["instances"]:
        raise BadRow("there are no instances")
    return [alpaca({"instruction": row["instruction"], **instance}) for instance in row["instances"]]


@schema("q_a", "sft", "q a")
def q_a(row: dict[str, Any]) -> dict[str, Any]:
    return instruction(row, join_input(row, "q"), row["a"])


@schema("prompt_response", "sft", "prompt response")
def prompt_response(row: dict[str, Any]) -> dict[str, Any]:
    return instruction(row, row["prompt"], row["response"])


@schema("input_target", "sft", "input target")
def input_target(row: dict[str, Any]) -> dict[str, Any]:
    return instruction(row, row["input"], row["target"])


@schema("question_answer", "sft", "question answer")
def question_answer(row: dict[str, Any]) -> dict[str, Any]:
    return instruction(row, row["question"], row["answer"])


@schema("sharegpt", "sft", "conversations")
def sharegpt(row: dict[str, Any]) -> dict[str, Any]:
    return with_context(row, {"messages": read_turns(row["conversations"])})


@schema("messages", "sft", "messages")
def messages(row: dict[str, Any]) -> dict[str, Any]:
    return with_context(row, {"messages": read_turns(row["messages"])})


@schema("human_assistant", "sft", "conversation")
def human_assistant(row: dict[str, Any]) -> dict[str, Any]:
    pairs = row["conversation"]
    if not isinstance(pairs, list) or not all({"human", "assistant"} <= set(pair) for pair in pairs):
        raise BadRow("conversation is not a list of objects with human and assistant")
    turns = [message for pair in pairs for message in exchange(pair["human"], pair["assistant"])]
    return with_context(row, {"messages": turns})


@schema("moss", "sft", "chat")
def moss(row: dict[str, Any]) -> dict[str, Any]:
    """MOSS-003: turn_1, turn_2, ... of marked texts, `<|Human|>: ...<eoh>`; thoughts are left out.

    A turn with commands to plugins is refused: they are no JSON that a tool call could be made of.
    """
    result = []
    for item in sorted(row["chat"].items(), key=lambda item: int(item[0].removeprefix("turn_"))):
        texts = {key: MOSS_TURN.fullmatch(text)[1] for key, text in item[1].items()}
        if texts.get("Commands", "None") != "None":
            raise BadRow("a turn commands plugins, which is no tool call")
        result += exchange(texts["Human"], texts["MOSS"])
    return with_context({"system": row.get("meta_instruction")}, {"messages": result})


def label(row: dict[str, Any], messages: list[dict[str, Any]]) -> dict[str, Any]:
    """Split off the answer that is labelled good or bad."""
    standard = {"prompt": messages[:-1], "completion": messages[-1:], "label": read_label(row)}
    return with_context(row, standard, "prompt")


@schema("messages_label", "kto", "messages label", judged=True)
def messages_label(row: dict[str, Any]) -> dict[str, Any]:
    return label(row, read_turns(row["messages"]))


@schema("sharegpt_label", "kto", "conversations label", judged=True)
def sharegpt_label(row: dict[str, Any]) -> dict[str, Any]:
    return label(row, read_turns(row["conversations"]))


@schema("kto", "kto", "prompt completion label")
def kto(row: dict[str, Any]) -> dict[str, Any]:
    return label(row, read_answer(row["prompt"], "user") + read_answer(row["completion"], "assistant"))


def read_answer(value: Any, role: str) -> list[dict[str, Any]]:
    """A text, a turn, or a list of turns."""
    if isinstance(value, str):
        return [turn(role, value)]
    return [read_turn(value)] if isinstance(value, dict) else read_turns(value)


def pair(row: dict[str, Any], prompt: list, chosen: list, rejected: list) -> dict[str, Any]:
    """Join a prompt and two answers; the answers may repeat the prompt's turns and bring the turns before it."""
    if chosen[:-1] != rejected[:-1]:
        raise BadRow("chosen and rejected differ before the last turn")
    context = chosen[:-1]
    if context and context[len(context) - len(prompt) :] != prompt:
        raise BadRow("chosen does not begin with the prompt")
    standard = {"prompt": context or prompt, "chosen": chosen[-1:], "rejected": rejected[-1:]}
    return with_context(row, standard, "prompt")


def read_dialogue(text: str) -> list[dict[str, Any]]:
    """hh-rlhf: turns opened by "\\n\\nHuman: " and "\\n\\nAssistant: "."""
    parts = DIALOGUE_TURN.split(text)[1:]
    if not parts:
        raise BadRow("a dialogue has no turn that opens with a blank line and `Human:`")
    roles = ["user" if name == "Human" else "assistant" for name in parts[::2]]
    return [turn(role, content.strip()) for role, content in zip(roles, parts[1::2], strict=True)]


@schema("preference", "preference", "prompt chosen rejected")
def preference(row: dict[str, Any]) -> dict[str, Any]:
    """A prompt may be the hh-rlhf dialogue that the answers continue: up to an open "\\n\\nAssistant:"."""
    prompt, answers = row["prompt"], (read_answer(row[key], "assistant") for key in ("chosen", "rejected"))
    if isinstance(prompt, str) and DIALOGUE_TURN.match(prompt):
        prompt = [message for message in read_dialogue(prompt) if message != turn("assistant", "")]
    return pair(row, read_answer(prompt, "user"), *answers)


@schema("prompt_reject", "preference", "prompt chosen reject")
def prompt_reject(row: dict[str, Any]) -> dict[str, Any]:
    return preference(row | {"rejected": row["reject"]})


@schema("instruction_preference", "preference", "instruction chosen rejected")
def instruction_preference(row: dict[str, Any]) -> dict[str, Any]:
    return preference(row | {"prompt": join_input(row, "instruction")})


@schema("sharegpt_preference", "preference", "conversations chosen rejected")
def sharegpt_preference(row: dict[str, Any]) -> dict[str, Any]:
    answers = (read_answer(row[key], "assistant") for key in ("chosen", "rejected"))
    return pair(row, read_turns(row["conversations"]), *answers)


@schema("message_pair", "preference", "chosen_messages rejected_messages")
def message_pair(row: dict[str, Any]) -> dict[str, Any]:
    return pair(row, [], read_turns(row["chosen_messages"]), read_turns(row["rejected_messages"]))


@schema("dialogue_pair", "preference", "chosen rejected")
def dialogue_pair(row: dict[str, Any]) -> dict[str, Any]:
    """hh-rlhf: one string a dialogue; or lists of turns."""
    sides = (row["chosen"], row["rejected"])
    return pair(row, [], *(read_dialogue(side) if isinstance(side, str) else read_turns(side) for side in sides))


@schema("hc3", "preference", "question human_answers chatgpt_answers")
def hc3(row: dict[str, Any]) -> dict[str, Any]:
    """HC3 compares who wrote, not how well. Here ChatGPT's first answer is chosen over the first human one, which
    readers found the less helpful more often than not (arXiv:2301.07597); so the pair teaches ChatGPT's manner.
    """
    chatgpt, human = row["chatgpt_answers"], row["human_answers"]
    if not chatgpt or not human:
        raise BadRow("one side has no answers")
    return preference({"prompt": row["question"], "chosen": chatgpt[0], "rejected": human[0]})
