"""Read dialogues that are published as one marked text, as messages of the standard forms."""

import json
import re
from typing import Any

from buddygpt.data.chat.calls import read_call, read_tools
from buddygpt.data.chat.rules import BadRow
from buddygpt.data.chat.turns import exchange, turn

MOSS_TURN = re.compile(r"(?:<\|[\w ]+\|>:)?\s*(.*?)\s*(?:<eo[a-z]>)?\s*", re.DOTALL)
MOSS_002_TURN = re.compile(r"\s*\[(Human|MOSS)\]:\s*(.*?)\s*<eo[ha]>\s*", re.DOTALL)
MOSS_MARK = re.compile(r"\s*<eo[a-z]>|<\|(?:Human|MOSS)\|>:?\s*")
BELLE_TURN = re.compile(r"(?:^|\n)\s*(Human|Assistant)\s*[:：]\s*")
GLAIVE_TURN = re.compile(r"(?:^|\n)\s*(USER|ASSISTANT|FUNCTION RESPONSE):\s*")
GLAIVE_CALL = re.compile(r"<functioncall>\s*(\{.*\})\s*", re.DOTALL)
GLAIVE_ROLES = {"USER": "user", "ASSISTANT": "assistant", "FUNCTION RESPONSE": "tool"}


def read_moss(chat: dict[str, dict[str, str]]) -> list[dict[str, Any]]:
    """Read MOSS-003: turn_1, turn_2, ... of marked texts such as `<|Human|>: ...<eoh>`. Thoughts are left out.

    Raises:
        BadRow: A turn commands plugins; the commands are not JSON and cannot become tool calls.
    """
    turns = []
    for _, marked in sorted(chat.items(), key=lambda item: int(item[0].removeprefix("turn_"))):
        texts = {key: MOSS_TURN.fullmatch(text or "")[1] for key, text in marked.items()}
        if texts.get("Commands", "None") not in ("None", ""):
            raise BadRow("a turn commands plugins, which is no tool call")
        turns += exchange(MOSS_MARK.sub("", texts["Human"]), MOSS_MARK.sub("", texts["MOSS"]))
    return turns


def read_moss_002(text: str) -> list[dict[str, Any]]:
    """Read MOSS-002: one text of turns `[Human]: ...<eoh>` and `[MOSS]: ...<eoa>`."""
    turns = MOSS_002_TURN.findall(text)
    if not turns or MOSS_002_TURN.sub("", text):
        raise BadRow("plain_text has no turns such as [Human]: ...<eoh>, or more than them")
    return [turn("user" if name == "Human" else "assistant", content) for name, content in turns]


def read_belle(text: str) -> list[dict[str, Any]]:
    """Read a question that is a dialogue (BELLE): lines `Human:...` and `Assistant:...`, up to an open `Assistant:`.

    Any other text is one question.
    """
    before, *parts = BELLE_TURN.split(text)
    names, texts = parts[::2], [part.strip() for part in parts[1::2]]
    if before.strip() or names != ["Human", "Assistant"] * (len(names) // 2) or not names or texts[-1]:
        return [turn("user", text)]
    roles = ["user", "assistant"] * len(names)
    return [turn(role, content) for role, content in zip(roles, texts[:-1], strict=False)]


def read_glaive(system: str, chat: str) -> tuple[str, list[dict[str, Any]], list[dict[str, Any]]]:
    """Read Glaive's function calls: return the system text, the tools that it lists, and the turns."""
    system = system.removeprefix("SYSTEM:").strip()
    tools = []
    if "{" in system:
        system, functions = system[: system.index("{")], system[system.index("{") :]
        while functions.strip():
            function, end = json.JSONDecoder().raw_decode(functions.lstrip())
            tools.append(function)
            functions = functions.lstrip()[end:]
        system = re.sub(r"\s*with access to the following functions.*", ".", system, flags=re.DOTALL)
    before, *parts = GLAIVE_TURN.split(chat)
    if before.strip() or not parts:
        raise BadRow("chat does not begin with USER:")
    turns = []
    for name, marked in zip(parts[::2], parts[1::2], strict=True):
        text = marked.replace("<|endoftext|>", "").strip()
        message = turn(GLAIVE_ROLES[name], text)
        if name == "ASSISTANT" and (call := GLAIVE_CALL.search(text)):
            message |= {"content": GLAIVE_CALL.sub("", text).strip(), "tool_calls": [read_call(call[1])]}
        turns.append(message)
    return system, read_tools(tools), turns
