"""Tell what a JSON object is that makes up a whole file: a row, or which rows it holds."""

from typing import Any

ROW_LISTS = {"data", "rows", "examples", "samples", "items", "records"}  # hold a file's rows, whatever stands beside
# An object with one of these keys is a row, not a file.
ROW_COLUMNS = {"messages", "conversations", "conversation", "chat", "instruction", "prompt", "question", "query"}
ROW_COLUMNS |= {"input", "text", "content", "chosen", "rejected"}


def rows_of_object(content: Any) -> dict[str, list[Any]]:
    """Return the lists of rows of an object that is a whole file, by name; an empty dict if it is a row itself.

    It holds lists of rows (`{"data": [{...}, ...]}`, or one list for each split), a row under each key, or a list or
    (pandas) an object of values under each column.

    Raises:
        ValueError: It holds lists of different kinds, and none has a name of `ROW_LISTS`.
    """
    if not isinstance(content, dict) or not content:
        return {}
    values = list(content.values())
    if rows := _rows_of_columns(content, values):
        return {"": rows}
    if ROW_COLUMNS & content.keys():
        return {"": content["messages"]} if len(content) == 1 and _is_conversations(content.get("messages")) else {}
    if _all_of(values, dict) and set.intersection(*(set(value) for value in values)):
        return {} if any(map(is_message, values)) else {"": values}
    if all(is_conversation(value) for value in values):
        return {"": values}
    lists = {name: value for name, value in content.items() if _is_rows(value)}
    named = [name for name in lists if name in ROW_LISTS]
    if len(named) == 1:
        return {named[0]: lists[named[0]]}
    first_rows = [value[0] for value in lists.values() if isinstance(value[0], dict)]
    if len(first_rows) > 1 and not set.intersection(*(set(row) for row in first_rows)):
        raise ValueError(f"it holds lists of different rows: {', '.join(lists)}; keep one of them")
    return lists


def _rows_of_columns(content: dict[str, Any], values: list[Any]) -> list[Any]:
    """Return the rows of an object of columns, in the forms of pandas too; an empty list if it is none."""
    names, data = content.get("columns"), content.get("data")
    if _all_of(names, str) and _all_of(data, list) and all(len(row) == len(names) for row in data):
        return [dict(zip(names, row, strict=True)) for row in data]
    if _all_of(values, dict) and values[0]:
        names = values[0].keys()
        if all(name.isdigit() for name in names) and all(value.keys() == names for value in values):
            return [{key: content[key][name] for key in content} for name in names]
    is_columns = len(values) > 1 and all(isinstance(value, list) and len(value) == len(values[0]) for value in values)
    if not is_columns or any(is_message(item) for value in values for item in value):
        return []
    if all(_is_rows(value) for value in values) and not ROW_COLUMNS & content.keys():
        return []  # splits of equal length
    return [dict(zip(content, row, strict=True)) for row in zip(*values, strict=True)]


def _is_rows(value: Any) -> bool:
    return (_all_of(value, dict) and not any(map(is_message, value))) or _is_conversations(value)


def _is_conversations(value: Any) -> bool:
    return _all_of(value, list) and all(map(is_conversation, value))


def is_conversation(value: Any) -> bool:
    return _all_of(value, dict) and all(map(is_message, value))


def _all_of(value: Any, kind: type) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, kind) for item in value)


def is_message(value: Any) -> bool:
    """Return True for a turn of a conversation: role and content, or from and value."""
    return isinstance(value, dict) and ({"role", "content"} <= value.keys() or {"from", "value"} <= value.keys())
