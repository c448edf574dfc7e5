"""An exported checkpoint answers through `transformers serve`, over HTTP and in the `transformers chat` client."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from openai import OpenAI
from test_export import make_checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer

from buddygpt.export import to_native
from buddygpt.model import BuddyGPTForCausalLM

pytestmark = pytest.mark.slow  # starts a server
TRANSFORMERS = str(Path(sys.executable).with_name("transformers"))
ANSWERS = {"法国的首都是哪里？": "法国的首都是巴黎。", "What is 12 + 30?": "It is 42."}
SECONDS_TO_START = 240
os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1"


def chat(question: str, answer: str | None = None) -> list[dict[str, str]]:
    turns = [{"role": "user", "content": question}]
    return turns if answer is None else [*turns, {"role": "assistant", "content": answer}]


@pytest.fixture(scope="module")
def native(tmp_path_factory) -> Path:
    """An exported tiny model that has memorized the two answers."""
    folder = tmp_path_factory.mktemp("chat")
    source = make_checkpoint(folder / "source", False, True)
    tokenizer, model = AutoTokenizer.from_pretrained(source), AutoModelForCausalLM.from_pretrained(source)
    model = BuddyGPTForCausalLM(model.config).train()
    texts = [tokenizer.apply_chat_template(chat(*pair), tokenize=False) for pair in ANSWERS.items()]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(80):
        model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(source)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["x", "--checkpoint", str(source), "--output", str(folder / "native")])
        to_native.main()
    return folder / "native"


@pytest.fixture(scope="module")
def server(native) -> Iterator[str]:
    """Run `transformers serve` on the exported folder and yield its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [TRANSFORMERS, "serve", str(native), "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    log = native.parent / "serve.log"
    with open(log, "wb") as output:
        process = subprocess.Popen(
            command, env=os.environ | {"HF_HUB_OFFLINE": "1"}, stdout=output, stderr=output, cwd=native.parent
        )
    try:
        wait_until_healthy(f"http://127.0.0.1:{port}/health", process, log)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_until_healthy(url: str, process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + SECONDS_TO_START
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    pytest.fail(f"the server did not start:\n{log.read_text(errors='replace')[-3000:]}")


def greedy(native: Path, question: str) -> str:
    tokenizer, model = AutoTokenizer.from_pretrained(native), AutoModelForCausalLM.from_pretrained(native)
    inputs = tokenizer.apply_chat_template(
        chat(question), add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    tokens = model.generate(**inputs, do_sample=False, max_new_tokens=40)[0, inputs.input_ids.shape[1] :]
    return tokenizer.decode(tokens, skip_special_tokens=True)


@pytest.mark.parametrize("question", ANSWERS)
def test_the_served_answer_is_the_greedy_answer_of_the_folder(native, server, question):
    body = {"model": str(native), "messages": chat(question), "temperature": 0, "max_tokens": 40}
    request = urllib.request.Request(
        f"{server}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        choice = json.load(response)["choices"][0]
    assert choice["message"]["content"] == greedy(native, question) == ANSWERS[question]
    assert choice["finish_reason"] == "stop"


def test_an_openai_client_gets_streams_stops_and_counts_of_tokens(native, server):
    client = OpenAI(base_url=f"{server}/v1", api_key="none")
    question, answer = next(iter(ANSWERS.items()))

    def create(question: str, **options):
        return client.chat.completions.create(
            model=str(native), messages=chat(question), temperature=0, max_tokens=40, **options
        )

    tokenizer = AutoTokenizer.from_pretrained(native)
    prompt = tokenizer.apply_chat_template(chat(question), add_generation_prompt=True, return_dict=False)
    n_answer = len(tokenizer(answer).input_ids) + 1  # <|im_end|>
    chunks = list(create(question, stream=True))
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert "".join(texts) == answer and sum(map(bool, texts)) > 1
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert (chunks[-1].usage.prompt_tokens, chunks[-1].usage.completion_tokens) == (len(prompt), n_answer)

    stopped = create(question, stop=["首都"]).choices[0].message.content  # the server keeps the stop string
    assert "首都" in stopped and answer.startswith(stopped) and stopped != answer

    with ThreadPoolExecutor() as pool:  # two requests at once do not mix
        assert [each.choices[0].message.content for each in pool.map(create, ANSWERS)] == list(ANSWERS.values())


def test_the_chat_client_shows_the_same_answers(native, server):
    environment = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
    command = [TRANSFORMERS, "chat", str(native), server, "do_sample=False", "max_new_tokens=40", "--user", "me"]
    questions = "".join(f"{question}\n!clear\n" for question in ANSWERS) + "!exit\n"
    done = subprocess.run(
        command, input=questions, env=environment, capture_output=True, text=True, timeout=SECONDS_TO_START
    )
    assert done.returncode == 0, done.stderr
    for answer in ANSWERS.values():
        assert answer in done.stdout
