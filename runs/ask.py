"""Ask a native export questions through `transformers serve`, as any OpenAI client would.

python runs/ask.py --model outputs/quickstart/native --questions "法国的首都是哪里？" --output outputs/chat.json
"""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

from openai import OpenAI

from buddygpt.cli.arguments import parse_arguments, require_count
from buddygpt.cli.errors import UserError, run_script
from buddygpt.cli.files import write_atomically


@dataclass
class AskArguments:
    model: str = field(metadata={"help": "Folder of a native export (export/to_native.py)."})
    questions: list[str] = field(metadata={"help": "Questions, each asked in a new conversation."})
    output: str = field(metadata={"help": "JSON file for the questions and answers."})
    max_tokens: int = field(default=64, metadata={"help": "Longest answer, in tokens."})
    timeout: int = field(default=180, metadata={"help": "Seconds the server may take to start."})

    def __post_init__(self) -> None:
        for key in ("max_tokens", "timeout"):
            require_count(key, getattr(self, key))


def main() -> None:
    (args,) = parse_arguments(AskArguments, description=__doc__)
    if not (Path(args.model) / "config.json").exists():
        raise UserError(f"{args.model} is not a model folder; make one with export/to_native.py")

    port = find_free_port()
    url = f"http://127.0.0.1:{port}"
    server = start_server(args.model, port)
    try:
        wait_until_healthy(url, server, args.timeout)
        client = OpenAI(base_url=f"{url}/v1", api_key="none")
        turns = []
        for question in args.questions:
            turns.append({"question": question, "answer": ask(client, args, question)})
    finally:
        server.terminate()
        server.wait()

    for turn in turns:
        print(f"> {turn['question']}\n{turn['answer']}")
    with write_atomically(Path(args.output)) as partial:
        partial.write_text(json.dumps(turns, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def find_free_port() -> int:
    """Return a port that the operating system considers free."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start_server(model: str, port: int) -> subprocess.Popen:
    """Start `transformers serve` of this Python environment, on the CPU and without network access."""
    transformers = Path(sys.executable).with_name("transformers")
    command = [str(transformers), "serve", model, "--host", "127.0.0.1", "--port", str(port)]
    command += ["--device", "cpu", "--log-level", "warning"]
    return subprocess.Popen(command, env={**os.environ, "HF_HUB_OFFLINE": "1"})


def wait_until_healthy(url: str, server: subprocess.Popen, timeout: int) -> None:
    """Return once the server answers; UserError if it exits or does not answer within `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline and server.poll() is None:
        try:
            urllib.request.urlopen(f"{url}/health").close()
            return
        except OSError:
            time.sleep(0.5)
    raise UserError(f"transformers serve did not answer within {timeout} s (exit status {server.poll()})")


def ask(client: OpenAI, args: AskArguments, question: str) -> str:
    """Return the model's most likely answer (greedy decoding)."""
    completion = client.chat.completions.create(
        model=args.model,
        messages=[{"role": "user", "content": question}],
        temperature=0,
        max_tokens=args.max_tokens,
    )
    return completion.choices[0].message.content


if __name__ == "__main__":
    run_script(main)
