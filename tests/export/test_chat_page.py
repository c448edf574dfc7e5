"""The chat page in a real browser: a question typed, the answer read, in both languages."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT
from openai.types.chat.chat_completion_chunk import ChoiceDelta
from openai.types.completion_usage import CompletionUsage
from test_serve_tools import native  # noqa: F401  a tiny model that has memorized thoughts and answers

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
sys.path.insert(0, str(ROOT / "runs"))


@pytest.fixture(scope="module")
def page(native) -> Iterator[str]:  # noqa: F811
    """Run the page over two checkpoints and yield its address: one is exported by the page, one is native."""
    pytest.importorskip("gradio")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    source = native.parent / "source"
    command = [sys.executable, str(ROOT / "runs/chat_page.py"), "--models", str(source), str(native)]
    command += ["--exports", str(native.parent / "exports"), "--port", str(port), "--open_browser", "false"]
    log = native.parent / "page.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--device", "cpu"],
            stdout=output,
            stderr=output,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "no_proxy": "127.0.0.1"},
            cwd=native.parent,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
        )
    try:
        address = f"http://127.0.0.1:{port}"
        wait_for(address, process, log)
        yield address
    finally:
        process.send_signal(signal.SIGINT)  # Ctrl-C
        assert process.wait(timeout=60) == 0
        assert "Traceback" not in log.read_text(encoding="utf-8")


def wait_for(address: str, process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        try:
            urllib.request.build_opener(urllib.request.ProxyHandler({})).open(address).close()
            return
        except urllib.error.URLError:
            time.sleep(0.5)
    pytest.fail(f"the page did not start:\n{log.read_text(encoding='utf-8')[-3000:]}")


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium or google-chrome")
@pytest.mark.parametrize("locale", ["zh-CN", "en-US"])
def test_a_question_typed_in_the_browser_is_answered_by_both_models(page, locale):
    playwright = pytest.importorskip("playwright.sync_api")
    settings, retry, clear, thoughts = {
        "zh-CN": ("设置", "重试", "新对话", "思考过程"),
        "en-US": ("Settings", "Retry", "New chat", "Thoughts"),
    }[locale]
    foreign = []  # addresses that the page wants from elsewhere
    with playwright.sync_playwright() as tool:
        browser = tool.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        tab = browser.new_page(locale=locale)
        tab.set_default_timeout(60_000)
        playwright.expect.set_options(timeout=60_000)
        tab.on("request", lambda request: foreign.append(request.url) if not request.url.startswith(page) else None)
        tab.goto(page)
        temperature = tab.locator("input[type=number]").first
        box = tab.locator("textarea").first
        box.wait_for()
        while not temperature.is_visible():  # a click does nothing until the page's code has loaded
            tab.get_by_text(settings, exact=True).first.click()
            tab.wait_for_timeout(1000)
        temperature.fill("0")
        box.fill("春天？")
        box.press("Enter")
        answers = tab.get_by_text("到了。", exact=True)
        playwright.expect(answers).to_have_count(2)
        playwright.expect(tab.get_by_text(thoughts)).to_have_count(2)
        playwright.expect(tab.get_by_text("桃花", exact=True).first).to_be_hidden()  # folded
        tab.get_by_role("button", name=retry).click()
        playwright.expect(answers).to_have_count(2)
        tab.get_by_role("button", name=retry).click()
        tab.get_by_role("button", name=clear).click()  # while both answer
        tab.wait_for_timeout(3000)
        playwright.expect(answers).to_have_count(0)
        browser.close()
    assert [url for url in foreign if not url.startswith(("data:", "blob:"))] == []


def test_texts_thoughts_and_calls_of_a_stream_become_one_answer():
    pytest.importorskip("gradio")
    import chat_page

    reply = {"role": "assistant", "content": ""}
    call = {"index": 0, "id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    deltas = [{"role": "assistant"}, {"reasoning_content": "so"}, {"content": "a"}, {"content": "b"}]
    found = [chat_page.add_chunk(reply, ChoiceDelta(**delta)) for delta in [*deltas, {"tool_calls": [call]}]]
    assert found == [False, True, True, True, True]
    assert (reply["reasoning_content"], reply["content"]) == ("so", "ab")
    shown = chat_page.display([{"role": "user", "content": "?"}, reply])
    assert [part.get("metadata", {}).get("title") for part in shown] == [None, "Thoughts", "Tool call: add", None]

    usage = CompletionUsage(prompt_tokens=50, completion_tokens=20, total_tokens=70)
    note = chat_page.describe(usage, time.monotonic() - 1, 64, chat_page.TEXTS["en"])
    assert note.startswith("20 tokens, 19 tokens/s") and "70 tokens, more than the 64 positions" in note


@pytest.mark.parametrize("pieces_read", [0, 2])
@pytest.mark.parametrize("action", ["stop", "new chat", "question"])
def test_an_answer_under_way_ends_when_its_conversation_goes_on(action, pieces_read):
    pytest.importorskip("gradio")
    import chat_page
    from openai.types.chat import ChatCompletionChunk

    pieces = [{"delta": {"content": word}, "index": 0, "finish_reason": None} for word in "abcd"]
    empty = {"id": "1", "created": 0, "model": "m", "object": "chat.completion.chunk"}
    stream = iter([ChatCompletionChunk(**empty, choices=[piece]) for piece in pieces])
    question = {"role": "user", "content": "?"}
    conversation = chat_page.Conversation([question])
    model = chat_page.Model("m", "m", 64, False)
    notes = chat_page.stream_reply(stream, model, conversation, conversation.turns, chat_page.TEXTS["en"])
    said = [question]
    for _ in range(pieces_read):
        next(notes)
    if pieces_read:
        said.append({"role": "assistant", "content": "ab"})
    assert conversation.turns == said
    if action == "stop":
        chat_page.stop_answers(conversation)
    elif action == "new chat":
        chat_page.forget(conversation)
    else:
        chat_page.ask("and?", conversation)
    assert list(notes) == []
    expected = {"stop": said, "new chat": [], "question": [*said, {"role": "user", "content": "and?"}]}
    assert conversation.turns == expected[action]


def test_both_languages_have_the_same_texts():
    pytest.importorskip("gradio")
    import chat_page

    english, chinese = chat_page.TEXTS["en"], chat_page.TEXTS["zh"]
    assert english.keys() == chinese.keys()
    for key, text in english.items():
        assert text.count("{") == chinese[key].count("{")
