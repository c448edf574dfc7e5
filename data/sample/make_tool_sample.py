"""Make chats that call tools, with and without thoughts, from tools.yaml and the questions of the bundled sample.

    python data/sample/make_tool_sample.py --sample outputs/sample --output outputs/tool_sample

    sft_train.jsonl    messages          a question, calls of a calculator or a table, their results, the answer; half
                                         of the rows with thoughts, the others with `enable_thinking: false`
    sft_eval.jsonl     messages          the same, of held-out questions
    calls_train.jsonl  prompt, answer,   the questions of sft_train.jsonl for rewards, with the calls that they need,
                       subject           or the answer if they need none
    calls_test.jsonl   prompt, calls,    held-out questions, and the calls that they need: one, two, or none
                       subject

No calculation and no wording of an evaluation row occurs in training. The same seed gives the same bytes.
"""

import json
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from buddygpt.cli.arguments import parse_arguments, require_count
from buddygpt.cli.errors import UserError, run_script
from buddygpt.cli.files import write_atomically
from buddygpt.data.text.rows import read_rows

LANGUAGES = ("zh", "zh", "en")  # two parts to one
RESULTS = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b}
NO_THOUGHTS = {"enable_thinking": False}


@dataclass
class ToolSampleArguments:
    sample: str = field(metadata={"help": "Folder of data/sample/make_sample.py, for questions without tools."})
    output: str = field(metadata={"help": "Folder to write. The four files in it are replaced."})
    list_tools: bool = field(
        default=False,
        metadata={"help": "Describe the tools in each row: 500 tokens for the quickstart's tokenizer."},
    )
    train_rows: int = field(default=8000, metadata={"help": "Chats for training."})
    test_rows: int = field(default=400, metadata={"help": "Questions for evaluation."})
    seed: int = field(default=0, metadata={"help": "Seed of every choice."})

    def __post_init__(self) -> None:
        for key in ("train_rows", "test_rows"):
            require_count(key, getattr(self, key))


@dataclass
class Task:
    """A question with the calls that it needs, their results, and the answer."""

    subject: str
    question: str
    thoughts: str
    calls: list[dict[str, Any]]
    results: list[str]
    answer: str


def draw_task(spec: dict[str, Any], facts: list[tuple[str, str]], heldout: bool, rng: random.Random) -> Task:
    """Return a question about a calculation, two, the table, or (one in eight) a fact that needs no tool."""
    kind = rng.choice(("calculator", "calculator", "calculator", "lookup", "lookup", "lookup", "parallel", "fact"))
    language = rng.choice(LANGUAGES)
    if kind == "fact":
        question, answer = rng.choice(facts)
        return Task(kind, question, "不用工具。" if not question.isascii() else "No tool is needed.", [], [], answer)
    if kind == "lookup":
        return draw_lookup(spec["lookup"][language], heldout, rng)
    first = draw_calculation(spec, language, heldout, rng)
    if kind == "calculator":
        return first
    second = draw_calculation(spec, language, heldout, rng)
    space = "" if language == "zh" else " "
    return Task(
        kind,
        *(getattr(first, key) + space + getattr(second, key) for key in ("question", "thoughts")),
        first.calls + second.calls,
        first.results + second.results,
        f"{first.answer}，{second.answer}" if language == "zh" else f"{first.answer}, {second.answer}",
    )


def draw_calculation(spec: dict[str, Any], language: str, heldout: bool, rng: random.Random) -> Task:
    """Return a calculation; those whose operands add up to a multiple of 5 are held out."""
    templates = spec["calculator"][language]
    while True:
        a, b = rng.randint(2, 30), rng.randint(2, 30)
        if ((a + b) % 5 == 0) == heldout:
            break
    sign, word = rng.choice(list(spec["operators"][language].items()))
    expression, result = f"{a} {sign} {b}", str(RESULTS[sign](a, b))
    return Task(
        "calculator",
        choose(templates["questions"], heldout, rng).format(a=a, b=b, word=word),
        templates["thoughts"].format(expression=expression),
        [{"name": "calculator", "arguments": {"expression": expression}}],
        [result],
        result,
    )


def draw_lookup(templates: dict[str, Any], heldout: bool, rng: random.Random) -> Task:
    item, (field_name, word) = rng.choice(templates["items"]), rng.choice(list(templates["fields"].items()))
    result = str(rng.randint(2, 999))
    return Task(
        "lookup",
        choose(templates["questions"], heldout, rng).format(item=item, field=word),
        templates["thoughts"].format(item=item, field=word),
        [{"name": "lookup", "arguments": {"item": item, "field": field_name}}],
        [result],
        result,
    )


def choose(templates: list[str], heldout: bool, rng: random.Random) -> str:
    return templates[-1] if heldout else rng.choice(templates[:-1])


def to_chat(task: Task, thinks: bool) -> dict[str, Any]:
    """Return a row of `messages`; the thoughts come before the calls, or before the answer if there are none."""
    thoughts = f"<think>\n{task.thoughts}\n</think>\n\n" if thinks else ""
    messages = [{"role": "user", "content": task.question}]
    if task.calls:
        calls = [{"type": "function", "function": call} for call in task.calls]
        messages.append({"role": "assistant", "content": thoughts, "tool_calls": calls})
        messages += [{"role": "tool", "content": result} for result in task.results]
        thoughts = ""
    messages.append({"role": "assistant", "content": thoughts + task.answer})
    return {"messages": messages} if thinks else {"messages": messages, "chat_template_kwargs": NO_THOUGHTS}


def read_facts(path: Path, question: str, answer: str) -> list[tuple[str, str]]:
    """Return the questions and answers of a file of the sample; chats of several turns are left out."""
    facts = []
    for row in read_rows(path):
        content = row.content or {}
        if "messages" in content and len(content["messages"]) == 2:
            facts.append(tuple(message["content"] for message in content["messages"]))
        elif question in content:
            facts.append((content[question], content[answer]))
    if not facts:
        raise UserError(f"{path} has no questions: make the sample with data/sample/make_sample.py")
    return facts


def build_files(args: ToolSampleArguments) -> dict[str, list[dict[str, Any]]]:
    spec = yaml.safe_load(Path(__file__).with_name("tools.yaml").read_text(encoding="utf-8"))
    sample = Path(args.sample)
    known = read_facts(sample / "sft_train.jsonl", "question", "answer")
    heldout = read_facts(sample / "qa_test.jsonl", "question", "answer")

    rng = random.Random(f"{args.seed}/tools")
    train = [draw_task(spec, known, False, rng) for _ in range(args.train_rows)]
    test = [draw_task(spec, heldout, True, rng) for _ in range(args.test_rows)]
    files = {
        "sft_train.jsonl": [to_chat(task, thinks=number % 2 == 0) for number, task in enumerate(train)],
        "sft_eval.jsonl": [to_chat(task, thinks=number % 2 == 0) for number, task in enumerate(test[:100])],
        "calls_train.jsonl": [
            {
                "prompt": [{"role": "user", "content": task.question}],
                "answer": task.calls or task.answer,
                "subject": task.subject,
            }
            for task in train
        ],
        "calls_test.jsonl": [
            {
                "prompt": [{"role": "user", "content": task.question}],
                "calls": task.calls,
                "subject": task.subject,
            }
            for task in test
        ],
    }
    if args.list_tools:
        tools = [{"type": "function", "function": tool} for tool in spec["tools"]]
        files = {name: [row | {"tools": tools} for row in rows] for name, rows in files.items()}
    return files


def main() -> None:
    (args,) = parse_arguments(ToolSampleArguments, description=__doc__)
    output = Path(args.output)
    for name, rows in build_files(args).items():
        with write_atomically(output / name) as partial:
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            partial.write_text("".join(lines), encoding="utf-8", newline="\n")
        print(f"{output / name}: {len(rows):,} rows")


if __name__ == "__main__":
    run_script(main)
