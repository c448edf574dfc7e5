"""The schemas in which instruction and preference data is published. To support another one, add a function here:

    @schema("my_set", kind="sft", keys="query reply")
    def my_set(row):
        return instruction(row, question=row["query"], answer=row["reply"])

`keys` are the columns that every row has; a file's schema is recognized by them. The function returns a row in the
standard form of its kind (see rules.py), or a list of such rows. Use these to build it:

    sft          instruction(row, question, answer), or conversation(row, turns)
    kto          labeled(row, turns)
    preference   pair(row, prompt, chosen, rejected)

turns.py reads lists of turns. The caller escapes special tokens, checks the rules, and turns a `KeyError`,
`TypeError`, `ValueError` or `AttributeError` into a bad row; raise `BadRow("reason")` to say more. Then add a case to
CASES in tests/data/chat/test_schemas.py and a row to the table in data/README.md.
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

from buddygpt.data.chat.rules import FORMS, BadRow, read_label
from buddygpt.data.chat.turns import (
    DIALOGUE_TURN,
    add_context,
    exchange,
    read_answer,
    read_dialogue,
    read_turns,
    turn,
)

StandardRow = dict[str, Any]


class Schema(NamedTuple):
    """Rows with all `keys`, and a true or false label if `has_label`, are read into standard rows of `kind`."""

    name: str
    kind: str
    keys: frozenset[str]
    has_label: bool
    read: Callable[[dict[str, Any]], StandardRow | list[StandardRow]]

    def fits(self, row: dict[str, Any]) -> bool:
        return self.keys <= row.keys() and (not self.has_label or read_label(row) is not None)


SCHEMAS: dict[str, Schema] = {}


def schema(name: str, kind: str, keys: str, has_label: bool = False) -> Callable:
    """Register the decorated function as a schema. `keys` are separated by spaces."""

    def register(read: Callable) -> Callable:
        SCHEMAS[name] = Schema(name, kind, frozenset(keys.split()), has_label, read)
        return read

    return register


def recognize(row: dict[str, Any], kind: str | None = None) -> list[Schema]:
    """Return the schemas that `row` fits; a schema is left out if the keys of another one include its keys.

    Args:
        kind: Only schemas of this kind. None: of the last kind of `FORMS` that the row fits any schema of.
    """
    fitting = [entry for entry in SCHEMAS.values() if kind in (None, entry.kind) and entry.fits(row)]
    fitting = [entry for entry in fitting if not any(entry.keys < other.keys for other in fitting)]
    for last_kind in reversed(FORMS):
        if entries := [entry for entry in fitting if entry.kind == last_kind]:
            return entries
    return []


# --- Instructions ---


def instruction(row: dict[str, Any], question: str, answer: str) -> StandardRow:
    """Return a question and its answer, after the exchanges of the row's `history` of [question, answer]."""
    history = row.get("history") or []
    if not isinstance(history, list) or not all(isinstance(item, list) and len(item) == 2 for item in history):
        raise BadRow("history is not a list of [question, answer]")
    turns = []
    for earlier_question, earlier_answer in history:
        turns += exchange(earlier_question, earlier_answer)
    return conversation(row, turns + exchange(question, answer))


def conversation(row: dict[str, Any], turns: list[dict[str, Any]]) -> StandardRow:
    """Return an instruction row of several turns."""
    return add_context(row, {"messages": turns})


def join_input(row: dict[str, Any], key: str) -> str:
    """Return the text under `key` and, on the next line, the row's `input` if it has one."""
    texts = [text for text in (row[key], row.get("input")) if text]
    if not all(isinstance(text, str) for text in texts):
        raise BadRow(f"{key} or input is not a string")
    return "\n".join(texts)


@schema("alpaca", kind="sft", keys="instruction output")
def alpaca(row: dict[str, Any]) -> StandardRow:
    return instruction(row, join_input(row, "instruction"), row["output"])


@schema("seed_tasks", kind="sft", keys="instruction instances")
def seed_tasks(row: dict[str, Any]) -> list[StandardRow]:
    """An instruction with several inputs and outputs gives one row for each."""
    if not row["instances"]:
        raise BadRow("there are no instances")
    return [alpaca({"instruction": row["instruction"], **instance}) for instance in row["instances"]]


@schema("q_a", kind="sft", keys="q a")
def q_a(row: dict[str, Any]) -> StandardRow:
    return instruction(row, join_input(row, "q"), row["a"])


@schema("prompt_response", kind="sft", keys="prompt response")
def prompt_response(row: dict[str, Any]) -> StandardRow:
    return instruction(row, row["prompt"], row["response"])


@schema("input_target", kind="sft", keys="input target")
def input_target(row: dict[str, Any]) -> StandardRow:
    return instruction(row, row["input"], row["target"])


@schema("question_answer", kind="sft", keys="question answer")
def question_answer(row: dict[str, Any]) -> StandardRow:
    return instruction(row, row["question"], row["answer"])


@schema("sharegpt", kind="sft", keys="conversations")
def sharegpt(row: dict[str, Any]) -> StandardRow:
    return conversation(row, read_turns(row["conversations"]))


@schema("messages", kind="sft", keys="messages")
def messages(row: dict[str, Any]) -> StandardRow:
    return conversation(row, read_turns(row["messages"]))


@schema("human_assistant", kind="sft", keys="conversation")
def human_assistant(row: dict[str, Any]) -> StandardRow:
    items = row["conversation"]
    if not isinstance(items, list) or not all({"human", "assistant"} <= set(item) for item in items):
        raise BadRow("conversation is not a list of objects with human and assistant")
    turns = []
    for item in items:
        turns += exchange(item["human"], item["assistant"])
    return conversation(row, turns)


MOSS_TURN = re.compile(r"(?:<\|[\w ]+\|>:)?\s*(.*?)\s*(?:<eo[a-z]>)?\s*", re.DOTALL)


@schema("moss", kind="sft", keys="chat")
def moss(row: dict[str, Any]) -> StandardRow:
    """MOSS-003: turn_1, turn_2, ... of marked texts such as `<|Human|>: ...<eoh>`. Thoughts are left out.

    A turn with commands to plugins is a bad row: the commands are not JSON and cannot become tool calls.
    """
    turns = []
    for _, marked in sorted(row["chat"].items(), key=lambda item: int(item[0].removeprefix("turn_"))):
        texts = {key: MOSS_TURN.fullmatch(text)[1] for key, text in marked.items()}
        if texts.get("Commands", "None") != "None":
            raise BadRow("a turn commands plugins, which is no tool call")
        turns += exchange(texts["Human"], texts["MOSS"])
    return conversation({"system": row.get("meta_instruction")}, turns)


# --- Labeled answers ---


def labeled(row: dict[str, Any], turns: list[dict[str, Any]]) -> StandardRow:
    """Return a kto row: the last turn is the answer that the row's label calls good or bad."""
    standard = {"prompt": turns[:-1], "completion": turns[-1:], "label": read_label(row)}
    return add_context(row, standard, "prompt")


@schema("messages_label", kind="kto", keys="messages label", has_label=True)
def messages_label(row: dict[str, Any]) -> StandardRow:
    return labeled(row, read_turns(row["messages"]))


@schema("sharegpt_label", kind="kto", keys="conversations label", has_label=True)
def sharegpt_label(row: dict[str, Any]) -> StandardRow:
    return labeled(row, read_turns(row["conversations"]))


@schema("kto", kind="kto", keys="prompt completion label")
def kto(row: dict[str, Any]) -> StandardRow:
    return labeled(row, read_answer(row["prompt"], "user") + read_answer(row["completion"], "assistant"))


# --- Preference pairs ---


def pair(row: dict[str, Any], prompt: list, chosen: list, rejected: list) -> StandardRow:
    """Return a preference row. The answers may begin with turns of their own before the prompt, and repeat it."""
    if chosen[:-1] != rejected[:-1]:
        raise BadRow("chosen and rejected differ before the last turn")
    context = chosen[:-1]
    if context and context[len(context) - len(prompt) :] != prompt:
        raise BadRow("chosen does not begin with the prompt")
    standard = {"prompt": context or prompt, "chosen": chosen[-1:], "rejected": rejected[-1:]}
    return add_context(row, standard, "prompt")


@schema("preference", kind="preference", keys="prompt chosen rejected")
def preference(row: dict[str, Any]) -> StandardRow:
    """The prompt may be the hh-rlhf dialogue that the answers continue, up to an open "\\n\\nAssistant:"."""
    prompt = row["prompt"]
    if isinstance(prompt, str) and DIALOGUE_TURN.match(prompt):
        prompt = [message for message in read_dialogue(prompt) if message != turn("assistant", "")]
    prompt = read_answer(prompt, "user")
    return pair(row, prompt, read_answer(row["chosen"], "assistant"), read_answer(row["rejected"], "assistant"))


@schema("prompt_reject", kind="preference", keys="prompt chosen reject")
def prompt_reject(row: dict[str, Any]) -> StandardRow:
    return preference(row | {"rejected": row["reject"]})


@schema("instruction_preference", kind="preference", keys="instruction chosen rejected")
def instruction_preference(row: dict[str, Any]) -> StandardRow:
    return preference(row | {"prompt": join_input(row, "instruction")})


@schema("sharegpt_preference", kind="preference", keys="conversations chosen rejected")
def sharegpt_preference(row: dict[str, Any]) -> StandardRow:
    prompt = read_turns(row["conversations"])
    return pair(row, prompt, read_answer(row["chosen"], "assistant"), read_answer(row["rejected"], "assistant"))


@schema("message_pair", kind="preference", keys="chosen_messages rejected_messages")
def message_pair(row: dict[str, Any]) -> StandardRow:
    return pair(row, [], read_turns(row["chosen_messages"]), read_turns(row["rejected_messages"]))


@schema("dialogue_pair", kind="preference", keys="chosen rejected")
def dialogue_pair(row: dict[str, Any]) -> StandardRow:
    """Each side is a whole dialogue: one string (hh-rlhf) or a list of turns."""
    dialogues = []
    for side in (row["chosen"], row["rejected"]):
        dialogues.append(read_dialogue(side) if isinstance(side, str) else read_turns(side))
    chosen, rejected = dialogues
    return pair(row, [], chosen, rejected)


@schema("hc3", kind="preference", keys="question human_answers chatgpt_answers")
def hc3(row: dict[str, Any]) -> StandardRow:
    """HC3 compares who wrote, not how well. We choose ChatGPT's first answer over the first human one, because readers
    more often found it the more helpful one (arXiv:2301.07597). So the pairs teach ChatGPT's manner.
    """
    chatgpt, human = row["chatgpt_answers"], row["human_answers"]
    if not chatgpt or not human:
        raise BadRow("one side has no answers")
    return preference({"prompt": row["question"], "chosen": chatgpt[0], "rejected": human[0]})
