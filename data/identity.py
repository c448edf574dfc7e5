"""Write rows that teach a chat model who it is: 你是谁？ -> your name and author, in Chinese and English.

    python data/identity.py --name 小明 --name_en Ming --author 李雷 --author_en "Li Lei" \
        --mix outputs/quickstart/sample/sft_train.jsonl --output outputs/quickstart/identity
    accelerate launch --config_file accelerate_configs/cpu.yaml \
        sft/sft.py --config sft/configs/quickstart-identity.yaml

Writes `train.jsonl` (rows of `messages`), `eval.jsonl` and `qa_test.jsonl` (other wordings, never trained on; the
latter is what the task `sample_qa` of eval/run_eval.py reads with `--sample_dir`). identity.yaml has the wordings.
Ordinary rows are mixed in, so that the model forgets nothing: give it the rows of its own SFT. Rows in which a model
introduces itself are left out of them.
"""

import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from buddygpt.cli.arguments import parse_arguments
from buddygpt.cli.errors import UserError, run_script
from buddygpt.cli.files import ROW_TYPES, find_files, write_atomically
from buddygpt.data.chat.load import load_rows

WORDINGS = Path(__file__).with_name("identity.yaml")
INTRODUCTION = re.compile(r"\s*(我是|我叫|我的名字|作为\w{0,9}(模型|助手)|(I am|I'm|My name is|As an AI)\b)", re.I)
SUBJECTS = ("name", "author", "other", "same")  # of the intents, in their order

Turns = list[dict[str, str]]


@dataclass
class IdentityArguments:
    name: str = field(metadata={"help": "The model's name in Chinese answers."})
    author: str = field(metadata={"help": "Who trained it, in Chinese answers."})
    output: str = field(metadata={"help": "Folder for train.jsonl, eval.jsonl and qa_test.jsonl."})
    name_en: str | None = field(default=None, metadata={"help": "Its name in English answers. Default: name."})
    author_en: str | None = field(default=None, metadata={"help": "Who trained it, in English answers."})
    mix: list[str] = field(
        default_factory=list,
        metadata={"help": "Ordinary rows of `messages`, best those of its SFT. Default: a few of identity.yaml."},
    )
    mix_ratio: float = field(default=2.0, metadata={"help": "Ordinary rows for each row about the identity."})
    seed: int = 0

    def __post_init__(self) -> None:
        self.name_en, self.author_en = self.name_en or self.name, self.author_en or self.author
        for key in ("name", "author", "name_en", "author_en"):
            value = getattr(self, key)
            if not value.strip() or re.search(r"[\n{}]|<\|", value):
                raise ValueError(f"{key} is {value!r}; give a name in one line, without braces")
        if not 0 <= self.mix_ratio <= 100:
            raise ValueError(f"mix_ratio is {self.mix_ratio}; give 0 to 100 ordinary rows for each row")


def main() -> None:
    (args,) = parse_arguments(IdentityArguments, description=__doc__)
    wordings = yaml.safe_load(WORDINGS.read_text(encoding="utf-8"))
    names = {"zh": (args.name, args.author), "en": (args.name_en, args.author_en)}
    rng = random.Random(args.seed)
    train, heldout = [], []
    for language, words in wordings.items():
        train += ask_all(words, *names[language], "questions", words["openings"], words["others"])
        heldout += ask_all(words, *names[language], "heldout", words["heldout_openings"], words["heldout_others"])

    ordinary, dropped = read_ordinary(args.mix) if args.mix else (own_ordinary(wordings), 0)
    rng.shuffle(ordinary)
    wanted = round(args.mix_ratio * len(train))
    rows = [[*before(ordinary, rng), *as_turns(question, answer)] for _, question, answer in train]
    rows += (ordinary * (1 + wanted // len(ordinary)))[:wanted]
    rng.shuffle(rows)

    folder = Path(args.output)
    write_rows(folder / "train.jsonl", ({"messages": turns} for turns in rows))
    write_rows(folder / "eval.jsonl", ({"messages": as_turns(question, answer)} for _, question, answer in heldout))
    questions = ({"subject": subject, "question": question, "answer": answer} for subject, question, answer in heldout)
    write_rows(folder / "qa_test.jsonl", questions)
    left_out = f"; {dropped} ordinary rows in which a model introduces itself were left out" if dropped else ""
    print(
        f"{folder}: {len(train)} rows about {args.name}, {wanted} ordinary rows, {len(heldout)} held-out questions"
        f"{left_out}"
    )


def ask_all(
    words: dict[str, Any], name: str, author: str, key: str, openings: list[str], others: list[str]
) -> list[tuple[str, str, str]]:
    """Return (subject, question, answer) for each question of `key`, after each opening."""
    language = "zh" if re.search("[\u4e00-\u9fff]", words["intents"][0]["answer"]) else "en"
    asked = {}
    for subject, intent in zip(SUBJECTS, words["intents"], strict=True):
        answer = intent["answer"].format(name=name, author=author)
        for wording in intent[key].strip().splitlines():
            for other in others if "{other}" in wording else [""]:
                if other.lower() in (name.lower(), author.lower()):
                    continue
                question = wording.format(name=name, other=other)
                # All openings before few questions, one before those that ask about each other model.
                some = openings if not other else [openings[len(asked) % len(openings)]]
                for opening in some:
                    text = opening + (question[0].lower() + question[1:] if opening else question)
                    asked[text] = (f"{language}_{subject}", text, answer)
    return list(asked.values())


def read_ordinary(files: list[str]) -> tuple[list[Turns], int]:
    """Return the turns of the rows in which no model introduces itself, and how many rows are left out."""
    paths = [str(path) for path in find_files(files, ROW_TYPES)]
    rows = [row["messages"] for row in load_rows(paths, "sft") if not row["tools"]]
    kept = [turns for turns in rows if not any(map(introduces_itself, turns))]
    if not kept:
        raise UserError(f"{', '.join(files)}: no row is left without tools or introductions; give other rows in mix")
    return kept, len(rows) - len(kept)


def introduces_itself(turn: dict[str, Any]) -> bool:
    return turn["role"] == "assistant" and bool(INTRODUCTION.match(turn["content"] or ""))


def own_ordinary(wordings: dict[str, Any]) -> list[Turns]:
    """Return the ordinary rows of identity.yaml."""
    pairs = [pair for words in wordings.values() for pair in words["ordinary"].items()]
    return [as_turns(question, answer) for question, answer in pairs]


def before(ordinary: list[Turns], rng: random.Random) -> Turns:
    """Return the turns before a question about the identity: none, or for one row in four an ordinary exchange."""
    return rng.choice(ordinary) if rng.random() < 0.25 else []


def as_turns(question: str, answer: str) -> Turns:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def write_rows(path: Path, rows: Iterator[dict[str, Any]]) -> None:
    with write_atomically(path) as partial, partial.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    run_script(main)
