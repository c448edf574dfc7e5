"""Put questions to a native export through `transformers serve`, as any OpenAI client would.

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

from buddygpt.cli.arguments import parse_arguments
from buddygpt.cli.errors import UserError, run_script


@dataclass
class AskArguments:
    model: str = field(metadata={"help": "Folder of a native export (export/to_native.py)."})
    questions: list[str] = field(metadata={"help": "What to ask, each in a conversation of its own."})
    output: str = field(metadata={"help": "JSON file for the questions and answers."})
    max_tokens: int = field(default=64, metadata={"help": "Longest answer, in tokens."})
    timeout: int = field(default=180, metadata={"help": "Seconds the server may take to start."})


def wait_until_healthy(url: str, server: subprocess.Popen, timeout: int) -> None:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline and server.poll() is None:
        try:
            urllib.request.urlopen(f"{url}/health").close()
            return
        except OSError:
            time.sleep(0.5)
    raise UserError(f"transformers serve did not answer within {timeout} s (exit status {server.poll()})")


def ask(client: OpenAI, args: AskArguments, question: str) -> str:
    completion = client.chat.completions.create(
        model=args.model,
        messages=[{"role": "user", "content": question}],
        temperature=0,
        max_tokens=args.max_tokens,
    )
    return completion.choices[0].message.content


def main() -> None:
    (args,) = parse_arguments(AskArguments, description=__doc__)
    if not (Path(args.model) / "config.json").exists():
        raise UserError(f"{args.model} is not a model folder; make one with export/to_native.py")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).with_name("transformers")), "serve", args.model]
    command += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--log-level", "warning"]
    server = subprocess.Popen(command, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until_healthy(url, server, args.timeout)
        client = OpenAI(base_url=f"{url}/v1", api_key="none")
        answers = [{"question": question, "answer": ask(client, args, question)} for question in args.questions]
    finally:
        server.terminate()
        server.wait()
    for turn in answers:
        print(f"> {turn['question']}\n{turn['answer']}")
    Path(args.output).write_text(json.dumps(answers, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_script(main)
