"""The standard forms of chat rows, and the rules that a row must keep before a model trains on it.

Standard forms (a message is `{"role", "content"}`; an assistant's may have `tool_calls`, and `"weight": 0` if it
carries no loss):

    sft          {"messages": [message, ...]}
    preference   {"prompt": [message, ...], "chosen": [message], "rejected": [message]}
    kto          {"prompt": [message, ...], "completion": [message], "label": true or false}

Each may also have "tools": [{"type": "function", "function": {...}}], and "chat_template_kwargs":
{"enable_thinking": true or false} (see thoughts.py). Thoughts are in the text of an answer, <think>...</think> first.
"""

import json
import re
import unicodedata
from collections import Counter
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Kind of row -> the keys that hold its lists of messages. If a row fits schemas of several kinds, the last kind wins:
# some sets repeat `messages` next to pairs or labels.
FORMS = {"sft": ("messages",), "kto": ("prompt", "completion"), "preference": ("prompt", "chosen", "rejected")}

# Kind of row -> how to train on it.
RECIPES = {
    "sft": "train on them with sft/sft.py",
    "preference": "train on them with rlhf/dpo.py (or orpo.py, simpo.py, reward.py)",
    "kto": "train on them with rlhf/kto.py; the other recipes of preferences need pairs of answers",
    "prompt": "rlhf/grpo.py learns from rewards of the answers to them",  # no kind of its own: see prompts.py
    "text": "make shards of them with data/prepare_pretrain.py, and train on these with pretrain/pretrain.py",
}

TEMPLATE_OPTIONS = "chat_template_kwargs"

# Turns that may follow a turn. "call" is an assistant turn with tool calls.
NEXT = {
    "start": ("system", "user"),
    "system": ("user",),
    "user": ("assistant", "call"),
    "call": ("tool",),
    "tool": ("tool", "assistant", "call"),
    "assistant": ("user",),
}
LONGEST_ROW = 1_000_000  # characters; longer than any context, and slow to tokenize

# Special tokens of our template and of those of Qwen, Llama 3, GLM and (with full-width bars) DeepSeek.
SPECIAL_TOKEN = r'<[|｜][^\s<>|｜"\\]+[|｜]>|</?tool_(?:call|response)>'
# A special token in three parts: opening, name, closing.
TOKEN_PARTS = re.compile(r"(<[|｜]|\W?)(.*?)([|｜]>|\W?)", re.DOTALL)
PLACEHOLDER = re.compile(r"\{\{(\w+)\}\}")
# Keys of a turn or a row for the thinking before an answer; converted rows have it in the answer's text.
THINKING_KEYS = (
    "reasoning_content",
    "reasoning",
    "thinking",
    "thinking_content",
    "think",
    "thoughts",
    "thought",
    "cot",
    "complex_cot",
    "chain_of_thought",
    "reasoning_process",
    "reasoning_trace",
    "thinking_process",
    "thinking_trajectory",
    "thought_process",
    "think_content",
    "rationale",
)
ALL_THINKING_KEYS = frozenset(THINKING_KEYS)
MEDIA = re.compile(r"(?:image|picture|video|audio)s?(?:_(?:url|path|file)s?)?$", re.IGNORECASE)
NUL = re.compile(r"(?<!\\)(?:\\\\)*\\u0000")  # in JSON
LABELS = {"true": True, "1": True, "false": False, "0": False}


class BadRow(ValueError):
    """A row that cannot be trained on. The message is the reason."""


to_json = json.JSONEncoder(ensure_ascii=False).encode  # json.dumps makes an encoder for each row


# --- The rules ---


def check_row(row: dict[str, Any], kind: str, special_tokens: tuple[str, ...] = (), as_json: str = "") -> None:
    """Raise [`BadRow`] unless `row` is in the standard form of `kind` and fit to train on.

    Args:
        special_tokens: Tokens of the tokenizer in use that no text may contain, in addition to `SPECIAL_TOKEN`.
        as_json: `to_json(row)`, if the caller has it.
    """
    keys = FORMS[kind]
    refuse_media(row)
    if not all(isinstance(row.get(key), list) for key in keys):
        raise BadRow(f"not in the standard form: {', '.join(keys)} must be lists of messages; keys: {', '.join(row)}")
    if kind == "sft":
        refuse_label(row)
        check_messages(row["messages"])
        if (row.get(TEMPLATE_OPTIONS) or {}) == {"enable_thinking": False} and "<think>" in _texts(row["messages"]):
            raise BadRow(f"{TEMPLATE_OPTIONS} turns thinking off, but an answer has thoughts")
    else:
        _check_answers(row, answer_keys=keys[1:])
    tools = row.get("tools") or []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise BadRow("tools is not a list of objects")
    options = row.get(TEMPLATE_OPTIONS) or {}
    if not isinstance(options, dict) or any(
        key != "enable_thinking" or not isinstance(value, bool) for key, value in options.items()
    ):
        raise BadRow(f"{TEMPLATE_OPTIONS} is {options!r:.60}; it may be {{'enable_thinking': true or false}}")
    if kind == "kto" and not isinstance(row.get("label"), bool):
        raise BadRow("label is neither true nor false")
    _check_text(as_json or to_json(row), special_tokens)


def check_messages(messages: Any) -> None:
    """Raise [`BadRow`] unless the turns alternate as in `NEXT`, none is empty, and the last is the assistant's."""
    if not isinstance(messages, list) or not messages:
        raise BadRow("no messages")
    previous = "start"
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise BadRow(f"turn {number} is not an object with role and content")
        role, content = message["role"], message["content"]
        if not isinstance(content, str):
            raise BadRow(f"the content of turn {number} is not a string")
        if not ALL_THINKING_KEYS.isdisjoint(message):
            for key in THINKING_KEYS:
                if message.get(key):
                    raise BadRow(f"turn {number} has `{key}`, which chat templates leave out: convert the row")
        is_call = role == "assistant" and message.get("tool_calls")
        current = "call" if is_call else role
        if current not in NEXT[previous]:
            raise BadRow(f"turn {number} is `{current}` after `{previous}`, expected {' or '.join(NEXT[previous])}")
        if not is_call and is_blank(content):
            raise BadRow(f"turn {number} ({role}) is empty")
        previous = current
    if previous not in ("assistant", "call"):
        raise BadRow(f"the last turn is `{previous}`, not the assistant's")


def _texts(messages: list[dict[str, Any]]) -> str:
    return "\n".join(message["content"] for message in messages if message["role"] == "assistant")


def _check_answers(row: dict[str, Any], answer_keys: tuple[str, ...]) -> None:
    for key in answer_keys:
        check_messages(row["prompt"] + row[key])
    if not row["prompt"] or any(len(row[key]) != 1 for key in answer_keys):
        raise BadRow(f"{' and '.join(answer_keys)} must be one turn each, after a prompt")
    if "chosen" in answer_keys and row["chosen"] == row["rejected"]:
        raise BadRow("chosen equals rejected")


def _check_text(row_as_json: str, special_tokens: tuple[str, ...]) -> None:
    if len(row_as_json) > LONGEST_ROW:
        raise BadRow(f"the row has more than {LONGEST_ROW:,} characters")
    if token := _special_token_pattern(special_tokens).search(row_as_json):
        raise BadRow(f"the text contains the special token {token[0]}")
    if re.search("[\ud800-\udfff]", row_as_json):
        raise BadRow("the text contains half a surrogate pair")
    if "\\u0000" in row_as_json and NUL.search(row_as_json):
        raise BadRow("the text contains a NUL character")


def refuse_media(item: dict[str, Any]) -> None:
    """Raise [`BadRow`] if a row or a turn has pictures, sound or video."""
    for key in item:
        if _is_media(key) and item[key]:
            raise BadRow(f"it needs a picture, sound or video (`{key}`)")


@cache
def _is_media(key: str) -> bool:
    return MEDIA.match(key) is not None


def is_blank(text: str) -> bool:
    """Return True for a text of spaces and zero-width characters only."""
    return all(character.isspace() or unicodedata.category(character) == "Cf" for character in text)


def read_label(row: dict[str, Any]) -> bool | None:
    """Return True or False if `label` (LLaMA-Factory: `kto_tag`) calls the answer good or bad, else None."""
    value = row.get("label", row.get("kto_tag"))
    return LABELS.get(str(value).lower())


def refuse_label(row: dict[str, Any]) -> None:
    """Raise [`BadRow`] if an instruction row has a label: its answer may be a bad one.

    The label 0 or 1 of a row without messages is a class of the task that the row is about.
    """
    if "label" not in row and "kto_tag" not in row and "is_safe" not in row:
        return
    is_class = str(row.get("label")) in ("0", "1") and not {"messages", "conversations", "kto_tag"} & row.keys()
    if read_label(row) is not None and not is_class:
        raise BadRow("the answer is labeled good or bad (kto), so it is no instruction; drop a label of other meaning")
    if str(row.get("is_safe")).lower() == "false":  # BeaverTails
        raise BadRow("the answer is judged unsafe (`is_safe`)")


# --- Special tokens in text ---


def special_tokens(tokenizer: "PreTrainedTokenizerBase") -> tuple[str, ...]:
    """Return the tokens that the tokenizer reads as structure wherever a text contains them."""
    return tuple(token.content for token in tokenizer.added_tokens_decoder.values() if token.special)


@cache
def _special_token_pattern(tokens: tuple[str, ...]) -> re.Pattern:
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile("|".join([SPECIAL_TOKEN, *map(re.escape, longest_first)]))


def escape(row: dict[str, Any], special_tokens: tuple[str, ...] = ()) -> tuple[dict[str, Any], int, str]:
    """Return `row` with spaces inside every text that looks like a special token, how many there were, and its JSON.

    A tokenizer reads `<|im_end|>` in a text as the end of the turn, and `<tool_call>` as the start of a call, so a row
    could open turns and make calls itself. `<| im_end |>` and `< tool_call >` stay readable and are ordinary tokens.
    Real calls are in `tool_calls`, never in the text, so texts of all roles are escaped.

    Args:
        special_tokens: Tokens of the tokenizer in use, in addition to `SPECIAL_TOKEN`.
    """

    def add_spaces(match: re.Match) -> str:
        return " ".join(TOKEN_PARTS.fullmatch(match[0]).groups())

    text, count = _special_token_pattern(special_tokens).subn(add_spaces, to_json(row))
    return json.loads(text) if count else row, count, text


# --- Placeholders, remarks, choice of turns ---


def fill_placeholders(row: dict[str, Any], values: dict[str, str]) -> dict[str, Any]:
    """Return `row` with every `{{key}}` in its texts replaced by `values[key]`; unknown keys stay."""

    def fill(match: re.Match) -> str:
        value = values.get(match[1])
        return match[0] if value is None else json.dumps(value, ensure_ascii=False)[1:-1]

    return json.loads(PLACEHOLDER.sub(fill, json.dumps(row, ensure_ascii=False)))


def count_remarks(row: dict[str, Any]) -> Counter:
    """Count what is allowed in a standard row but may surprise: unfilled placeholders."""
    remarks = Counter()
    if "{{" not in str(row):
        return remarks
    for match in PLACEHOLDER.finditer(json.dumps(row, ensure_ascii=False)):
        remarks[f"placeholder {match[0]} not filled (`fill` of data/convert_chat.py sets it)"] += 1
    return remarks


def select_turns(row: dict[str, Any], turns: str) -> dict[str, Any] | None:
    """Return an instruction row with the chosen exchanges: a user turn and everything up to the next user turn.

    The system turn stays. `last` drops the earlier exchanges, so that only the last answer carries loss.

    Args:
        turns: `all`, `first`, `last`, or `single`: rows of one exchange as they are, None for longer ones.
    """
    if turns == "all":
        return row
    messages = row["messages"]
    starts = [number for number, message in enumerate(messages) if message["role"] == "user"]
    if turns == "single":
        return row if len(starts) == 1 else None
    if len(starts) == 1:
        return row
    system = messages[: starts[0]]
    exchange = messages[starts[0] : starts[1]] if turns == "first" else messages[starts[-1] :]
    return row | {"messages": system + exchange}
