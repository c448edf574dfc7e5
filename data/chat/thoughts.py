"""Thoughts and calls in chat rows: the switch of the template, rows as inference will see them, parts of the loss.

As with Qwen3, a chat shows the thoughts of an answer only until the next question. `enable_thinking: false` in the
`chat_template_kwargs` of a row (TRL's key) puts empty thoughts in front of its answers, as it does in a prompt. Such
rows teach a model that can think to answer at once.
"""

import re
from collections.abc import Collection
from typing import Any

from buddygpt.data.chat.loss_marks import carries_loss
from buddygpt.data.chat.rules import TEMPLATE_OPTIONS

THOUGHTS = re.compile(r"\s*<think>.*?</think>\s*", re.DOTALL)
PARTS = ("thoughts", "calls", "text")  # of an answer
PART = re.compile(r"(?P<thoughts><think>\n.*?\n</think>\n*)|(?P<calls>\n?<tool_call>\n.*?\n</tool_call>)", re.DOTALL)


def template_options(row: dict[str, Any]) -> dict[str, bool]:
    """Return the options of the chat template that a row asks for."""
    return row.get(TEMPLATE_OPTIONS) or {}


def read_switch(row: dict[str, Any]) -> dict[str, dict[str, bool]]:
    """Return the `chat_template_kwargs` of a row in the spellings of published sets; nothing if it has none."""
    options = row.get(TEMPLATE_OPTIONS)
    thinks = options.get("enable_thinking") if isinstance(options, dict) else row.get("enable_thinking")
    if row.get("reasoning") == "off":  # Nemotron
        thinks = False
    return {TEMPLATE_OPTIONS: {"enable_thinking": thinks}} if isinstance(thinks, bool) else {}


def has_thoughts(message: dict[str, Any]) -> bool:
    return message["role"] == "assistant" and THOUGHTS.match(message["content"]) is not None


def split_by_questions(row: dict[str, Any]) -> list[dict[str, Any]]:
    """Return instructions that train each answer of a row in the context in which inference asks for it.

    Earlier thoughts are left out of a context. So an answer that is rendered differently once the next question is
    asked, because it has thoughts, or empty ones, is trained in a row that ends with it. It carries no loss in later
    rows. Other rows are returned as they are.
    """
    messages = row["messages"]
    starts = [number for number, message in enumerate(messages) if message["role"] == "user"]
    if len(starts) == 1:
        return [row]
    empty = template_options(row).get("enable_thinking") is False
    rows, trained = [], 0  # up to where answers carry loss in rows above
    for end in [*starts[1:], len(messages)]:
        start = max(number for number in starts if number < end)
        if end < len(messages) and not (empty or any(map(has_thoughts, messages[start:end]))):
            continue
        earlier = [_without_thoughts(message, number < trained) for number, message in enumerate(messages[:start])]
        part = earlier + messages[start:end]
        if end == len(messages) and not trained:
            return [row]
        if any(carries_loss(message) for message in part if message["role"] == "assistant"):
            rows.append(row | {"messages": part})
        trained = end
    return rows


def _without_thoughts(message: dict[str, Any], is_trained: bool) -> dict[str, Any]:
    if message["role"] != "assistant":
        return message
    message = message | {
        "content": THOUGHTS.sub("", message["content"], count=1) if has_thoughts(message) else message["content"]
    }
    return message | {"weight": 0} if is_trained else message


def find_parts(text: str, start: int, end: int) -> list[tuple[str, int, int]]:
    """Return thoughts, calls and text of an answer as (part, start, end), in order.

    Args:
        text: A whole conversation, in which the answer is from `start` to `end`. The mark that ends it belongs to the
            last part.
    """
    parts, place = [], start
    for found in PART.finditer(text, start, end):
        if found.start() > place:
            parts.append(("text", place, found.start()))
        parts.append((str(found.lastgroup), found.start(), found.end()))
        place = found.end()
    rest = text[place:end]
    if parts and parts[-1][0] == "calls" and re.fullmatch(r"\s*(?:<[|｜][^<>]*[|｜]>)?\s*", rest):
        part, place, _ = parts.pop()
        return [*parts, (part, place, end)]
    return [*parts, ("text", place, end)] if rest else parts


def mask_parts(text: str, offsets: list[tuple[int, int]], loss: list[int], loss_on: Collection[str]) -> list[int]:
    """Return the loss of each token, 0 where it belongs to a part of an answer that is not in `loss_on`.

    Args:
        text: The conversation.
        offsets: Start and end of each token in it.
        loss: 1 for each token of an answer.
    """
    masked, number = list(loss), 0
    while number < len(loss):
        if not loss[number]:
            number += 1
            continue
        last = number
        while last + 1 < len(loss) and loss[last + 1]:
            last += 1
        for part, start, end in find_parts(text, offsets[number][0], offsets[last][1]):
            if part not in loss_on:
                for place in range(number, last + 1):
                    if start <= offsets[place][0] < end:
                        masked[place] = 0
        number = last + 1
    return masked
