"""Ask a native export questions through `transformers serve`, as any OpenAI client would.

python runs/ask.py --model outputs/quickstart/native --questions "法国的首都是哪里？" --output outputs/chat.json
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

from openai import OpenAI

from buddygpt.cli.arguments import parse_arguments, require_count
from buddygpt.cli.errors import UserError, run_script
from buddygpt.cli.files import require_output, write_atomically
from buddygpt.export.serving import SECONDS_TO_START, serve


@dataclass
class AskArguments:
    model: str = field(metadata={"help": "Folder of a native export (export/to_native.py)."})
    questions: list[str] = field(metadata={"help": "Questions, each asked in a new conversation."})
    output: str = field(metadata={"help": "JSON file for the questions and answers."})
    max_tokens: int = field(default=64, metadata={"help": "Longest answer, in tokens."})
    timeout: int = field(default=SECONDS_TO_START, metadata={"help": "Seconds the server may take to start."})

    def __post_init__(self) -> None:
        for key in ("max_tokens", "timeout"):
            require_count(key, getattr(self, key))


def main() -> None:
    (args,) = parse_arguments(AskArguments, description=__doc__)
    require_output(Path(args.output), "file")
    if not (Path(args.model) / "config.json").exists():
        raise UserError(f"{args.model} is not a model folder; make one with export/to_native.py")

    with serve(args.model, timeout=args.timeout) as address:
        client = OpenAI(base_url=f"{address}/v1", api_key="none")
        turns = []
        for question in args.questions:
            turns.append({"question": question, "answer": ask(client, args, question)})

    for turn in turns:
        print(f"> {turn['question']}\n{turn['answer']}")
    with write_atomically(Path(args.output)) as partial:
        partial.write_text(json.dumps(turns, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


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
