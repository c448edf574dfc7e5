"""Find the columns of a row, and the keys of its turns, that a schema does not read: none may disappear silently."""

from collections.abc import Collection
from typing import Any

from buddygpt.data.chat.loss_marks import LISTS, MARKS
from buddygpt.data.chat.rules import FORMS, TEMPLATE_OPTIONS, THINKING_KEYS

STANDARD_KEYS = {kind: {*keys, "tools", TEMPLATE_OPTIONS} for kind, keys in FORMS.items()}
STANDARD_KEYS["kto"].add("label")
EMPTY = (None, "", [], {})
# Keys of a turn that are read, or that only repeat what the order of the turns says.
TURN_KEYS = {"role", "from", "content", "value", "text", "tool_calls", "function_call", "tools", "functions"}
TURN_KEYS |= {"tool_call_id", "name", "id", *THINKING_KEYS, *MARKS}


class WatchedRow(dict):
    """A row that remembers which of its columns were read."""

    def __init__(self, row: dict[str, Any], read: set[str] | None = None):
        super().__init__(row)
        self.read = set() if read is None else read

    def __getitem__(self, key: str) -> Any:
        self.read.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.read.add(key)
        return super().get(key, default)

    def __or__(self, other: dict[str, Any]) -> "WatchedRow":
        return WatchedRow(super().__or__(other), self.read)


def unread_keys(row: dict[str, Any], read: Collection[str]) -> list[str]:
    """Return the columns of a row that were not read, and the keys of its turns that nothing reads."""
    unread = []
    for key, value in row.items():
        if value in EMPTY or key in LISTS:
            continue
        if key not in read and key.lower() not in read:
            unread.append(key)
        elif isinstance(value, list) and value and isinstance(value[0], dict) and {"role", "from"} & value[0].keys():
            keys = {
                name for turn in value if isinstance(turn, dict) for name, inner in turn.items() if inner not in EMPTY
            }
            unread += [f"{name} (of turns)" for name in sorted(keys - TURN_KEYS)]
    return list(dict.fromkeys(unread))
