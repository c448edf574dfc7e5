"""Rows in the standard forms, for the tests of chat data."""

USER, ASSISTANT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
SYSTEM, REJECTED = {"role": "system", "content": "s"}, {"role": "assistant", "content": "b"}
ANSWER = {"messages": [USER, ASSISTANT]}
FOLLOW_UP = {"messages": [SYSTEM, USER, REJECTED, {"role": "user", "content": "r"}, ASSISTANT]}
LABELED = {"prompt": [USER], "completion": [ASSISTANT], "label": False}
PAIR = {"prompt": [USER], "chosen": [ASSISTANT], "rejected": [REJECTED]}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1, "y": None}}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
TOOL_ROW = {
    "messages": [
        USER,
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "1"},
        ASSISTANT,
    ],
    "tools": [TOOL],
}
