"""Single messages of OpenAssistant become the conversation of the best replies of each tree."""

import json

import conftest
import pytest
from standard_rows import ASSISTANT, FOLLOW_UP, USER

from buddygpt.cli.errors import UserError

CONVERT = "data/convert_chat.py"


def message(name: str, parent: str | None, text: str, rank: int | None = None, **columns) -> dict:
    return {
        "message_id": name,
        "parent_id": parent,
        "message_tree_id": name[0],
        "text": text,
        "role": "prompter" if len(name) % 2 else "assistant",
        "rank": rank,
        "lang": "en",
        "deleted": False,
        **columns,
    }


MESSAGES = [
    message("abcd", "abc", "a"),  # before the message that it replies to
    message("a", None, "q"),
    message("aa", "a", "worse", rank=1),
    message("ab", "a", "b", rank=0),
    message("ac", "a", "deleted", rank=-1, deleted=True),
    message("abc", "ab", "r"),
    message("b", None, "q"),
    message("bc", "b", "a"),
    message("bcd", "bc", "a question without a reply"),
]


def write(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def test_single_messages_become_the_conversation_of_the_best_replies(tmp_path):
    write(tmp_path / "a.jsonl", MESSAGES)
    conftest.run(CONVERT, "--input", tmp_path / "a.jsonl", "--output", tmp_path / "out.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert rows == [{"messages": FOLLOW_UP["messages"][1:]}, {"messages": [USER, ASSISTANT]}]


@pytest.mark.parametrize(
    ("rows", "place", "reason"),
    [
        (MESSAGES[1:2] + MESSAGES[3:4] + [message("x", "lost", "q")], 3, "the message that it replies to is not in"),
        (MESSAGES[1:2], 1, "no messages"),
    ],
)
def test_a_message_without_its_tree_is_a_bad_row(rows, place, reason, tmp_path):
    path = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(UserError, match=f"a.jsonl:{place}: {reason}"):
        conftest.run(CONVERT, "--input", path, "--output", tmp_path / "out.jsonl")
