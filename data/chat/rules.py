"""The rules that instruction and preference rows obey, whatever schema they came in, and what may be chosen of them.

Standard forms (a message is `{"role", "content"}`; an assistant's may carry `tool_calls` and `reasoning_content`):

    sft          {"messages": [message, ...]}
    preference   {"prompt": [message, ...], "chosen": [message], "rejected": [message]}
    kto          {"prompt": [message, ...], "completion": [message], "label": true or false}

each optionally with "tools": [{"type": "function", "function": {...}}].
"""

import json
import re
import unicodedata
from collections import Counter
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The lists of messages in a standard row, by kind. Where a row fits schemas of several kinds, the later kind is meant:
# pairs and labels say more than the `messages` that some sets repeat beside them.
FORMS = {"sft": ("messages",), "kto": ("prompt", "completion"), "preference": ("prompt", "chosen", "rejected")}

# Which turn may follow which; "call" is an assistant's turn that calls tools.
NEXT = {
    "start": ("system", "user"),
    "system": ("user",),
    "user": ("assistant", "call"),
    "call": ("tool",),
    "tool": ("tool", "assistant", "call"),
    "assistant": ("user",),
}
# Ours, and their like in the templates of Qwen, Llama 3, GLM and (with full-width bars) DeepSeek.
SPECIAL_TOKEN = r'<[|｜][^\s<>|｜"\\]+[|｜]>|</?tool_(?:call|response)>'
EDGES = re.compile(r"(<[|｜]|\W?)(.*?)([|｜]>|\W?)", re.DOTALL)  # of such a token, around its name
PLACEHOLDER = re.compile(r"\{\{(\w+)\}\}")
LABELS = {"true": True, "1": True, "false": False, "0": False}
LONGEST_ROW = 1_000_000  # characters; beyond any context, and minutes of tokenisation


class BadRow(ValueError):
    """A row that cannot be trained on; the message is the reason."""


def read_label(row: dict[str, Any]) -> bool | None:
    """Return whether `label` (LLaMA-Factory: `kto_tag`) calls the answer good; None where it says neither."""
    return LABELS.get(str(row.get("label", row.get("kto_tag"))).lower())


def refuse_label(row: dict[str, Any]) -> None:
    """Raise [`BadRow`] if the answer of an instruction row is labelled: it may be a bad one."""
    if read_label(row) is not None:
        raise BadRow("an answer labelled good or bad (kto), not an instruction; drop a label of another meaning")


def is_blank(text: str) -> bool:
    """Whether a text has nothing but spaces and zero-width characters."""
    return all(character.isspace() or unicodedata.category(character) == "Cf" for character in text)


def fill_placeholders(row: dict[str, Any], values: dict[str, str]) -> dict[str, Any]:
    """Return `row` with every `{{key}}` in its texts replaced by `values[key]`, where there is one."""
    text = json.dumps(row, ensure_ascii=False)

    def fill(match: re.Match) -> str:
        value = values.get(match[1])
        return match[0] if value is None else json.dumps(value, ensure_ascii=False)[1:-1]

    return json.loads(PLACEHOLDER.sub(fill, text))


def special_tokens(tokenizer: "PreTrainedTokenizerBase") -> tuple[str, ...]:
    """Return the tokens that text must not spell, else it is read as structure."""
    return tuple(token.content for token in tokenizer.added_tokens_decoder.values() if token.special)


@cache
def _find_special(tokens: tuple[str, ...]) -> re.Pattern:
    return re.compile("|".join([SPECIAL_TOKEN, *map(re.escape, sorted(tokens, key=len, reverse=True))]))


def neutralise(row: dict[str, Any], tokens: tuple[str, ...] = ()) -> tuple[dict[str, Any], int]:
    """Return `row` with spaces inside every text that is spelt like a special token, and how many there were.

    Args:
        tokens: The [`special_tokens`] of a tokenizer, beside ours and their like.

    A tokenizer would read `<|im_end|>` in the text as the end of the turn, and `<tool_call>` as the beginning of a
    call, so that a row could open turns and make calls of its own. Calls are made by `tool_calls` alone, whoever
    speaks. `<| im_end |>` and `< tool_call >` stay legible and are made of ordinary tokens.
    """

    def space(match: re.Match) -> str:
        return " ".join(EDGES.fullmatch(match[0]).groups())

    text, count = _find_special(tokens).subn(space, json.dumps(row, ensure_ascii=False))
    return (json.loads(text), count) if count else (row, 0)


def count_remarks(row: dict[str, Any]) -> Counter:
    """Count what is no fault of a standard row but may surprise: placeholders left open, and hidden reasoning."""
    placeholders = PLACEHOLDER.finditer(json.dumps(row, ensure_ascii=False))
    remarks = Counter(
        f"placeholder {match[0]} left open (convert with --fill {match[1]}=...)" for match in placeholders
    )
    messages = [message for key in FORMS["preference"] + FORMS["kto"] + FORMS["sft"] for message in row.get(key, ())]
    if any("reasoning_content" in message for message in messages):
        remarks["rows with reasoning_content: trained on only where the template renders it"] += 1
    return remarks


def select_turns(row: dict[str, Any], turns: str) -> dict[str, Any] | None:
    """Return an instruction row with `all` its exchanges, the `first` or the `last` alone; None if not `single`.

    An exchange is a user's turn and all up to the next user's turn. A system turn stays; `last` goes without the
    turns before it, so that loss is taken on its answer alone.
    """
    messages = row["messages"]
    starts = [number for number, message in enumerate(messages) if message["role"] == "user"]
    if turns == "single":
        return row if len(starts) == 1 else None
    if turns == "all" or len(starts) == 1:
        return row
    chosen = messages[starts[0] : starts[1]] if turns == "first" else messages[starts[-1] :]
    return row | {"messages": messages[: starts[0]] + chosen}


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
        if this != "call" and is_blank(content):
            raise BadRow(f"turn {number} ({role}) is empty")
        last = this
    if last not in ("assistant", "call"):
        raise BadRow(f"the last turn is `{last}`, not the assistant's")


def check_row(row: dict[str, Any], kind: str, special_tokens: tuple[str, ...] = ()) -> None:
    """Raise [`BadRow`] unless `row` is in the standard form of `kind` and fit to train on.

    Args:
        special_tokens: Of the tokenizer in use, for texts to hold none; ours and their like are looked for anyway.
    """
    keys = FORMS[kind]
    if not all(isinstance(row.get(key), list) for key in keys):
        raise BadRow(f"not in the standard form: {', '.join(keys)} must be lists of messages; keys: {', '.join(row)}")
    if kind == "sft":
        refuse_label(row)
        check_messages(row["messages"])
    else:
        _check_answers(row, keys[1:])
    tools = row.get("tools") or []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise BadRow("tools is not a list of objects")
    if kind == "kto" and not isinstance(row.get("label"), bool):
        raise BadRow("label is neither true nor false")
    _check_text(json.dumps(row, ensure_ascii=False), special_tokens)


def _check_answers(row: dict[str, Any], keys: tuple[str, ...]) -> None:
    for key in keys:
        check_messages(row["prompt"] + row[key])
    if any(len(row[key]) != 1 for key in keys) or not row["prompt"]:
        raise BadRow(f"{' and '.join(keys)} must be one turn each, after a prompt")
    if len(keys) == 2 and row["chosen"] == row["rejected"]:
        raise BadRow("chosen equals rejected")


def _check_text(text: str, special_tokens: tuple[str, ...]) -> None:
    if len(text) > LONGEST_ROW:
        raise BadRow(f"the row has more than {LONGEST_ROW:,} characters")
    if token := _find_special(special_tokens).search(text):
        raise BadRow(f"the text holds the special token {token[0]}")
    if re.search("[\ud800-\udfff]", text):
        raise BadRow("the text holds half a surrogate pair")
    if re.search(r"(?<!\\)(?:\\\\)*\\u0000", text):
        raise BadRow("the text holds a NUL character")
