"""Read turns, thinking and text parts in the spellings they are published in, as messages of the standard forms."""

import re
from typing import Any

from buddygpt.data.chat.calls import read_calls, read_calls_in_text, read_tools
from buddygpt.data.chat.loss_marks import mark_turn
from buddygpt.data.chat.rules import ALL_THINKING_KEYS, MEDIA, THINKING_KEYS, BadRow, refuse_media

ROLES = {
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "tool_response": "tool",
    "function_response": "tool",
    "function": "tool",
    "ipython": "tool",
    "system": "system",
    "developer": "system",
}
CALL_ROLES = ("function_call", "tool_call")
TEXT_PARTS = ("text", "input_text", "output_text", "observation", "tool_result", "tool_response")
THINKING_PARTS = ("thinking", "reasoning", "think")
CALL_PARTS = ("tool_call", "function_call", "tool_use")
# Keys of a question and its answer, in a list of them.
EXCHANGES = (("human", "assistant"), ("user", "assistant"), ("input", "output"), ("question", "answer"))
DIALOGUE_TURN = re.compile(r"\n\n(Human|Assistant): ?")
LIST_PREFIX = re.compile(r"(?:问|答|Human|Assistant|User)\s*[:：]\s*")

# Thinking in an answer's text, in other tags than <think>; and the tags around the answer after it.
THINKING_TEXT = re.compile(
    r"\s*(?:<\|begin_of_thought\|>(.*?)<\|end_of_thought\|>|<(think|thinking|thoughts?|reasoning|seed:think)>(.*?)</\2>"
    r"|\[THINK\](.*?)\[/THINK\]|◁think▷(.*?)◁/think▷)\s*",  # the last two: Magistral and Kimi
    re.DOTALL | re.IGNORECASE,
)
ANSWER_TEXT = re.compile(
    r"\s*(?:<\|begin_of_solution\|>(.*?)(?:<\|end_of_solution\|>)?|<(answer|output|response)>(.*?)</\2>)\s*",
    re.DOTALL | re.IGNORECASE,
)


def turn(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


def exchange(question: str, answer: str) -> list[dict[str, Any]]:
    return [turn("user", question), turn("assistant", answer)]


def read_turns(items: Any) -> list[dict[str, Any]]:
    """Read a list of turns, or of texts that take turns; a system turn without text is dropped.

    Calls in turns of their own, one after the other, become the calls of one turn.
    """
    if not isinstance(items, list):
        raise BadRow("the turns are not a list")
    if items and all(isinstance(item, str) for item in items):  # LIMA, UltraChat, HuatuoGPT
        texts = [LIST_PREFIX.sub("", item, count=1) if LIST_PREFIX.match(item) else item for item in items]
        return [turn("user" if number % 2 == 0 else "assistant", text) for number, text in enumerate(texts)]
    if items and all(isinstance(item, dict) for item in items):
        shared = set(items[0]).intersection(*items[1:])
        for question, answer in EXCHANGES:
            if question in shared and answer in shared:
                return read_exchanges(items, question, answer)
    messages: list[dict[str, Any]] = []
    thinking = ""
    for item in order_results(items):
        message = read_turn(item)
        if message["role"] == "thinking":
            thinking = message["content"]
            continue
        if message["role"] == "assistant" and thinking:
            has_calls = bool(message.get("tool_calls"))
            message["content"], thinking = think(thinking, message["content"], has_calls), ""
        previous = messages[-1] if messages else {"role": "start"}
        if message.get("tool_calls") and not message["content"] and previous["role"] == "assistant":
            if previous.get("weight") != message.get("weight"):
                raise BadRow("calls of one turn differ in their marks for the loss")
            previous["tool_calls"] = previous.get("tool_calls", []) + message["tool_calls"]
        elif message["role"] != "system" or message["content"]:
            messages.append(message)
    return messages


def read_exchanges(items: list[dict[str, Any]], question: str, answer: str) -> list[dict[str, Any]]:
    """Read a list of questions and answers; the first may have the system text (XTuner)."""
    messages = [turn("system", items[0]["system"])] if items[0].get("system") else []
    for item in items:
        asked, answered = exchange(item[question], item[answer])
        messages += [asked, mark_turn(answered, item)]
    return messages


def order_results(items: list[Any]) -> list[Any]:
    """Return the turns with the results of parallel calls in the order of the calls, if both have ids."""
    order: dict[Any, int] = {}
    ordered: list[Any] = []
    for item in items:
        calls = item.get("tool_calls") if isinstance(item, dict) else None
        if isinstance(calls, list):
            order = {
                call["id"]: number for number, call in enumerate(calls) if isinstance(call, dict) and "id" in call
            }
        place = len(ordered)
        rank = order.get(item.get("tool_call_id")) if isinstance(item, dict) and order else None
        while rank is not None and place and order.get(ordered[place - 1].get("tool_call_id"), -1) > rank:
            place -= 1
        ordered.insert(place, item)
    return ordered


def read_turn(item: Any) -> dict[str, Any]:
    """Read one turn with the keys from/value (ShareGPT), role/content (OpenAI) or role/text."""
    if not isinstance(item, dict) or ("from" not in item and "role" not in item):
        raise BadRow("a turn is not an object with role and content, or from and value")
    refuse_media(item)
    name = str(item.get("from", item.get("role"))).lower()
    content = next((item[key] for key in ("value", "content", "text") if item.get(key) is not None), None)
    if name in ALL_THINKING_KEYS:
        return turn("thinking", read_text(content))
    if name not in ROLES:
        raise BadRow(f"unknown role {item.get('from', item.get('role'))!r:.40}")

    # ShareGPT and swift: the turn's text is the JSON of one call or of several.
    if name in CALL_ROLES:
        calls = read_calls(content, "a tool call") if content else read_calls(item.get("tool_calls"), "tool_calls")
        if not calls:
            raise BadRow("a tool call is not an object with name and arguments")
        return mark_turn(turn("assistant", "") | {"tool_calls": calls}, item)

    # OpenAI: the calls have a key for themselves, and the content may be null next to them.
    calls = read_calls(item.get("tool_calls"), "tool_calls") + read_calls(item.get("function_call"), "function_call")
    text, thoughts = "", ""
    if content is not None or not calls:
        text, thoughts, more_calls = read_parts(content)
        calls += more_calls
    if ROLES[name] == "assistant":
        text = think(thoughts or read_thinking(item), respell_thinking(text), bool(calls))
    if ROLES[name] == "system":
        text = respell_system(text)
    message = turn(ROLES[name], text)
    if calls:
        message["tool_calls"] = calls
    return mark_turn(message, item) if message["role"] == "assistant" else message


def read_text(content: Any) -> str:
    """Read a string, or a list of text parts `{"type": "text", "text" or "value": ...}`."""
    text, thoughts, calls = read_parts(content)
    if thoughts or calls:
        raise BadRow("content is neither a string nor a list of text parts")
    return text


def read_parts(content: Any) -> tuple[str, str, list[dict[str, Any]]]:
    """Read a string, or a list of typed parts; return its text, its thinking and its calls.

    A part has its content under `text`, `value`, `content` or (Anthropic) the name of its type.
    """
    if isinstance(content, str):
        return content, "", []
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        raise BadRow("content is neither a string nor a list of text parts")
    text, thoughts, calls = "", "", []
    for part in content:
        kind = str(part.get("type"))
        keys = ("text", "value", "content", "thinking", "reasoning")
        value = next((part[key] for key in keys if part.get(key) is not None), None)
        if MEDIA.match(kind.removeprefix("input_")):
            raise BadRow(f"it needs a picture, sound or video (a part of type {kind})")
        if kind in CALL_PARTS:
            calls += read_calls(part if value is None else value, "a tool call")
        elif kind in THINKING_PARTS and isinstance(value, str):
            thoughts += value
        elif kind in TEXT_PARTS and isinstance(value, str | list):
            text += read_text(value)
        else:
            raise BadRow("content is neither a string nor a list of text parts")
    return text, thoughts, calls


# --- Thinking ---


def think(thinking: str, answer: Any, has_calls: bool = False) -> Any:
    """Return an answer after its thinking in <think> tags, as Qwen3 and DeepSeek-R1 write it.

    An answer that has such tags already is left as it is, and one without text stays empty.
    """
    if not thinking.strip() or not isinstance(answer, str) or "<think>" in answer:
        return answer
    if not answer.strip() and not has_calls:
        return answer
    return f"<think>\n{thinking.strip()}\n</think>\n\n{answer.lstrip()}"


def read_thinking(row: dict[str, Any]) -> str:
    """Return the thinking that a row or a turn has under a key of its own, or ""."""
    if ALL_THINKING_KEYS.isdisjoint(row):
        return ""
    for key in (key for key in THINKING_KEYS if key in row):
        value = row[key]
        if isinstance(value, str) and value.strip() and value not in ("on", "off"):  # Nemotron's switch
            return value
        if isinstance(value, list | dict) and value:
            raise BadRow(f"{key} is not a string")
    return ""


def respell_thinking(answer: str) -> str:
    """Return an answer whose thinking is in <think> tags, whatever tags it was in."""
    found = THINKING_TEXT.match(answer)
    if not found:
        return answer
    rest = answer[found.end() :]
    if solution := ANSWER_TEXT.fullmatch(rest):
        rest = solution[1] or solution[3] or ""
    elif found[2] == "think":
        return answer
    return think(next((thoughts for thoughts in found.group(1, 3, 4, 5) if thoughts), ""), rest.strip())


def respell_system(text: str) -> str:
    """Return a system text that asks for thinking in <think> tags if it asked for OpenThoughts' tags."""
    text = text.replace("<|begin_of_thought|>", "<think>").replace("<|end_of_thought|>", "</think>")
    return text.replace("<|begin_of_solution|>", "").replace("<|end_of_solution|>", "")


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


def add_context(row: dict[str, Any], standard: dict[str, Any], key: str = "messages") -> dict[str, Any]:
    """Return a standard row with the system text and the tools of the row it was made from.

    The tools are a list, or its JSON, under `tools` or `functions` of the row or (minimind-3) of one of its turns.

    Args:
        key: The list of messages that the system text of `row` opens.
    """
    system = next((row[name] for name in ("system", "system_prompt") if row.get(name)), None)
    if system:
        opening = turn("system", respell_system(read_text(system)))
        repeated = standard[key][:1] == [opening]
        standard = standard | {key: standard[key] if repeated else [opening, *standard[key]]}
    holders = [row]
    for item in [*(row.get("conversations") or ()), *(row.get("messages") or ())]:
        if isinstance(item, dict):
            holders.append(item)
    given = [holder[name] for holder in holders for name in ("tools", "functions") if holder.get(name)]
    tools = read_tools(given[0]) if given else []
    messages, tools = read_calls_in_text(standard[key], tools)
    for answer in {"chosen", "rejected", "completion"} & standard.keys():
        standard = standard | {answer: read_calls_in_text(standard[key] + standard[answer], tools)[0][-1:]}
    standard = standard | {key: messages}
    return standard | {"tools": tools} if tools else standard
