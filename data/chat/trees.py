"""Join the single messages of a tree of replies (OpenAssistant's messages) to one row for each tree."""

from collections.abc import Iterable, Iterator

from buddygpt.data.chat.schemas import Schema
from buddygpt.data.text.rows import Row

MESSAGE_SCHEMA = "oasst_message"


def join_replies(rows: Iterable[Row], schema: Schema | None) -> Iterator[Row]:
    """Yield the rows of a file; of one that holds single messages, those that begin a tree, with all `replies`.

    All messages are kept in memory. A message whose parent is missing is a bad row.
    """
    if schema is None or schema.name != MESSAGE_SCHEMA:
        yield from rows
        return
    roots, replies, messages = [], [], {}
    for row in rows:
        if row.error or not row.content.get("message_id"):
            yield row
            continue
        message = row.content | {"replies": []}
        messages[message["message_id"]] = message
        (replies if message.get("parent_id") else roots).append(row._replace(content=message))
    for row in replies:
        parent = messages.get(row.content["parent_id"])
        if parent is None:
            yield Row(row.number, None, "the message that it replies to is not in the file")
        else:
            parent["replies"].append(row.content)
    yield from roots
