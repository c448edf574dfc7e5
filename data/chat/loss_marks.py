"""Marks that say which turns or rows carry loss, in the spellings they are published in.

A standard row has one spelling (OpenAI's): `"weight": 0` in a turn of the assistant, which then carries no loss.
"""

import re
from functools import cache
from typing import Any

from buddygpt.data.chat.rules import FORMS, BadRow

# Key of a turn or a row -> True if a true value means loss.
MARKS = {
    "weight": True,  # OpenAI
    "loss": True,  # swift, XTuner
    "loss_weight": True,
    "loss_scale": True,  # swift
    "loss_mask": True,
    "output_with_loss": True,  # XTuner
    "train": True,  # axolotl
    "training": True,
    "trainable": True,
    "is_train": True,
    "use_loss": True,
    "has_loss": True,
    "compute_loss": True,
    "masked": False,  # torchtune
    "mask_loss": False,
    "no_loss": False,
}
# Other names that speak of the loss. What `mask: 1` means, nobody can tell.
UNKNOWN_MARK = re.compile(r"(?:.*_)?(?:loss|train|trained|training|masks?|masked|learn)(?:_.*)?", re.IGNORECASE)
LISTS = (*MARKS, "weights", "loss_weights", "loss_masks")  # of a row: one value per turn
PARTIAL = ("train_detail",)  # axolotl: parts of a turn
VALUES = {"0": False, "0.0": False, "false": False, "no": False, "1": True, "1.0": True, "true": True, "yes": True}
PLAIN_KEYS = frozenset(["role", "content", "from", "value", "tool_calls"])  # of turns; none is a mark
TURN_LISTS = ("messages", "conversations", "conversation")


def carries_loss(turn: dict[str, Any]) -> bool:
    """Return False if a turn is marked as without loss. Raises [`BadRow`] for a mark other than yes or no."""
    if turn.keys() <= PLAIN_KEYS:
        return True
    for key in PARTIAL:
        if turn.get(key):
            raise BadRow(f"`{key}` gives parts of a turn loss; give all of it or none (`weight` 1 or 0)")
    for key in filter(_is_unknown_mark, turn):
        _refuse_unknown(key, [turn[key]])
    carries = True
    for key, means_loss in MARKS.items():
        if key in turn and turn[key] is not None:
            value = VALUES.get(str(turn[key]).lower())
            if value is None:
                raise BadRow(f"`{key}` is {turn[key]!r:.40}; a turn carries loss or not: 1 or 0")
            carries = carries and value == means_loss
    return carries


@cache
def _is_unknown_mark(key: str) -> bool:
    return key not in (*LISTS, *PARTIAL) and UNKNOWN_MARK.fullmatch(key) is not None


def _refuse_unknown(key: str, values: list[Any]) -> None:
    if values and all(str(value).lower() in VALUES for value in values):
        raise BadRow(f"`{key}` seems to tell which turns carry loss; say it with `weight`, 1 or 0, or remove `{key}`")


def spread_marks(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row whose list of marks, one per turn or per answer, is in its turns as `weight`.

    Raises:
        BadRow: A mark excludes the whole row, or does not fit the turns.
    """
    for key in filter(_is_unknown_mark, row):
        _refuse_unknown(key, row[key] if isinstance(row[key], list) else [])
    for key in (key for key in LISTS if key in row):
        value = row[key]
        if isinstance(value, list):
            row = _spread(row, key, value)
        elif value is not None and key in MARKS:
            carries = VALUES.get(str(value).lower())
            if carries is not None and carries != MARKS[key]:
                raise BadRow(f"`{key}` excludes the row from training")
            if carries is None and "weight" in key and not isinstance(value, str):
                raise BadRow(f"`{key}` is {value!r:.40}; a row carries loss or not: 1 or 0, or remove the column")
    return row


def _spread(row: dict[str, Any], key: str, values: list[Any]) -> dict[str, Any]:
    name = next((name for name in TURN_LISTS if isinstance(row.get(name), list)), None)
    turns = row[name] if name else []
    answers = [number for number, turn in enumerate(turns) if _speaker(turn) in ("assistant", "gpt", "bot", "model")]
    places = range(len(turns)) if len(values) == len(turns) else answers
    if not turns or len(values) != len(places) or not all(isinstance(turn, dict) for turn in turns):
        raise BadRow(f"`{key}` has {len(values)} values, the row {len(turns)} turns")
    turns = list(turns)
    for number, value in zip(places, values, strict=True):
        mark = key if key in MARKS else key.removesuffix("s")
        if not carries_loss({mark: value}):
            turns[number] = turns[number] | {"weight": 0}
    return row | {name: turns}


def _speaker(turn: Any) -> str:
    return str(turn.get("from", turn.get("role"))).lower() if isinstance(turn, dict) else ""


def mark_turn(message: dict[str, Any], marked: dict[str, Any]) -> dict[str, Any]:
    """Return a message of the assistant with `weight` 0 if the turn it was read from is marked as without loss."""
    return message if carries_loss(marked) else message | {"weight": 0}


def check_marks(row: dict[str, Any], kind: str) -> None:
    """Raise [`BadRow`] if no answer of a row in standard form carries loss, or if its marks do not fit its turns."""
    if spread_marks(row) != row:
        raise BadRow("it has a list of marks for the loss: convert the row")
    for key in FORMS["sft"] if kind == "sft" else FORMS[kind][1:]:
        answers = [message for message in row[key] if message["role"] == "assistant"]
        trained = [carries_loss(answer) for answer in answers]
        if not any(trained):
            raise BadRow("every answer is marked as without loss")
