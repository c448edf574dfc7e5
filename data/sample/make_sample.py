"""Make the sample that the quickstart trains and evaluates on, from the tables of facts in `tables/`.

    python data/sample/make_sample.py --output outputs/sample

README.md lists the files it writes. The same seed gives the same bytes on every machine. Questions from `heldout`
templates appear only in the evaluation files, questions from all other templates only in the training files.
"""

import csv
import io
import itertools
import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from string import Formatter

import yaml

from buddygpt.cli.arguments import parse_arguments
from buddygpt.cli.errors import UserError, run_script
from buddygpt.cli.files import write_atomically

HERE = Path(__file__).resolve().parent
EXAM_COLUMNS = ("id", "question", "A", "B", "C", "D", "answer")
EXAM_SPLITS = {"dev": 5, "val": 4, "test": 22}  # questions per subject, at most
SFT_EVAL_ROWS, PREFERENCE_EVAL_ROWS, QA_TEST_ROWS = 12, 15, 20  # per subject, at most
ANSWERED_QUESTIONS = 5  # per fact, in the pretraining text; the conversations use every training template
ARRANGEMENTS = 4  # with a single one, a model memorizes the order of the documents instead of the facts


@dataclass
class SampleArguments:
    output: str = field(metadata={"help": "Folder to write. An older sample in it is replaced as a whole."})
    seed: int = field(default=0, metadata={"help": "Seed of every shuffle and choice."})


@dataclass(frozen=True)
class Relation:
    """Templates that state and ask for one column of a table. The other columns in them are the key.

    `statements` are for pretraining, `questions` for training, `heldout` for evaluation only, and `follow_up` asks the
    same about another row.
    """

    answer: str
    statements: tuple[str, ...]
    questions: tuple[str, ...]
    heldout: tuple[str, ...]
    follow_up: str


@dataclass(frozen=True)
class Table:
    """One subject. A row lacks the columns whose cell is `~`; templates with such a column are not used for it."""

    subject: str
    language: str
    rows: tuple[dict[str, str], ...]
    passages: tuple[str, ...]
    relations: tuple[Relation, ...]

    def facts(self) -> list["Fact"]:
        """Return every relation of every row that has its answer and its key."""
        facts = []
        for relation in self.relations:
            needed = {relation.answer, *columns_of(relation.follow_up)}
            facts += [Fact(self, relation, row) for row in self.rows if needed <= row.keys()]
        return facts


@dataclass(frozen=True, eq=False)
class Fact:
    """One relation of one row."""

    table: Table
    relation: Relation
    row: dict[str, str]

    def ask(self, template: str) -> tuple[str, str]:
        """Return the question and its answer."""
        return template.format(**self.row), self.row[self.relation.answer]

    def wrong_answers(self) -> list[str]:
        """Return the other values of the answer's column, in the table's order."""
        column = [row[self.relation.answer] for row in self.table.rows if self.relation.answer in row]
        return [value for value in dict.fromkeys(column) if value != self.row[self.relation.answer]]


def load_table(path: Path) -> Table:
    """Read one subject.

    Raises:
        UserError: A missing or unknown key, a row of another length than `columns`, or a template with no such column.
    """
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
        columns = raw.pop("columns")
        rows = []
        for cells in raw.pop("rows"):
            named = zip(columns, cells, strict=True)
            rows.append({column: str(cell) for column, cell in named if cell is not None})
        relations = []
        for entry in raw.pop("relations"):
            values = {key: lines(value) if "\n" in value else value for key, value in entry.items()}
            relations.append(Relation(**values))
        passages = lines(raw.pop("passages"))
        table = Table(subject=path.stem, rows=tuple(rows), relations=tuple(relations), passages=passages, **raw)
    except (KeyError, TypeError, ValueError, AttributeError, yaml.YAMLError) as error:
        raise UserError(f"{path} is not a table of facts: {error!r}. Compare it with the other tables.") from error

    templates = [*passages]
    for relation in relations:
        templates += [*relation.statements, *relation.questions, *relation.heldout, relation.follow_up]
    for template in templates:
        if unknown := columns_of(template) - set(columns):
            raise UserError(f"{path}: template `{template}` names {sorted(unknown)}; the columns are {columns}.")
    return table


def lines(block: str) -> tuple[str, ...]:
    return tuple(block.strip().split("\n"))


def columns_of(template: str) -> set[str]:
    """Return the columns that a template names in braces."""
    return {name for _, name, _, _ in Formatter().parse(template) if name is not None}


def pretraining_text(tables: list[Table], seed: int) -> list[dict]:
    """Return documents of one subject each: a few sentences, or a few answered questions, in several arrangements."""
    documents = []
    for table, arrangement in itertools.product(tables, range(ARRANGEMENTS)):
        rng = random.Random(f"{seed}/pretrain/{table.subject}/{arrangement}")
        form, space = ("问：{}\n答：{}", "") if table.language == "zh" else ("Q: {}\nA: {}", " ")
        # All passages and statements whose columns the row has.
        stated = [(table.passages, row) for row in table.rows]
        stated += [(fact.relation.statements, fact.row) for fact in table.facts()]
        sentences = []
        for templates, row in stated:
            sentences += [template.format(**row) for template in templates if columns_of(template) <= row.keys()]
        # Some training questions about each fact.
        answered = []
        for fact in table.facts():
            for template in rng.sample(fact.relation.questions, ANSWERED_QUESTIONS):
                answered.append(form.format(*fact.ask(template)))
        documents += join_some(sentences, space, rng)
        documents += join_some(answered, "\n", rng)
    return [{"text": text} for text in random.Random(f"{seed}/pretrain").sample(documents, len(documents))]


def join_some(pieces: list[str], separator: str, rng: random.Random) -> Iterator[str]:
    """Shuffle the pieces and join two to six at a time."""
    remaining = iter(rng.sample(pieces, len(pieces)))
    while some := list(itertools.islice(remaining, rng.randint(2, 6))):
        yield separator.join(some)


def training_conversations(tables: list[Table], conversations: dict, seed: int) -> list[dict]:
    """Return chats: every fact in every training template, dialogues of two or three facts, and small talk."""
    rng = random.Random(f"{seed}/sft_train")
    rows = []
    for table in tables:
        systems = lines(conversations[table.language]["system"])
        for relation, group in itertools.groupby(table.facts(), key=lambda fact: fact.relation):
            facts = list(group)
            # Single questions.
            rows += [chat(fact.ask(template)) for fact in facts for template in relation.questions]
            # A question, and the same about one or two other rows.
            for fact in facts:
                others = rng.sample([other for other in facts if other is not fact], rng.randint(1, 2))
                follow_ups = [other.ask(relation.follow_up) for other in others]
                first = fact.ask(rng.choice(relation.questions))
                rows.append(chat(first, *follow_ups, system=rng.choice((None, *systems))))
    # Small talk: before and after a question about a fact, and alone under every system prompt.
    for language, block in conversations.items():
        facts = facts_of(table for table in tables if table.language == language)
        for talk in small_talk(block, "questions"):
            fact = rng.choice(facts)
            asked = fact.ask(rng.choice(fact.relation.questions))
            rows += [chat(talk, asked), chat(asked, talk)]
            rows += [chat(talk, system=system) for system in (None, *lines(block["system"]))]
    return rng.sample(rows, len(rows))


def facts_of(tables: Iterable[Table]) -> list[Fact]:
    return [fact for table in tables for fact in table.facts()]


def evaluation_conversations(tables: list[Table], conversations: dict, seed: int) -> list[dict]:
    """Return chats of one held-out question each: small talk, then facts."""
    asked = heldout_questions(tables, SFT_EVAL_ROWS, random.Random(f"{seed}/sft_eval"))
    talk = [turn for block in conversations.values() for turn in small_talk(block, "heldout")]
    return [chat(turn) for turn in talk + [fact.ask(template) for fact, template in asked]]


def small_talk(block: dict, templates: str) -> list[tuple[str, str]]:
    """Return the questions under the key `templates`, each with its answer."""
    return [(question, entry["answer"]) for entry in block["talk"] for question in lines(entry[templates])]


def chat(*turns: tuple[str, str], system: str | None = None) -> dict:
    """Return a row of `messages` from questions and answers."""
    messages = [{"role": "system", "content": system}] if system else []
    for question, answer in turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages}


def heldout_questions(tables: list[Table], limit: int, rng: random.Random) -> list[tuple[Fact, str]]:
    """Return up to `limit` facts per subject, each with one of its held-out templates."""
    chosen = []
    for table in tables:
        facts = table.facts()
        chosen += rng.sample(facts, min(limit, len(facts)))
    return [(fact, rng.choice(fact.relation.heldout)) for fact in chosen]


def preference_pairs(tables: list[Table], conversations: dict, seed: int, heldout: bool) -> list[dict]:
    """Return pairs of the right answer and, in turn, a wrong, a repetitive and an evasive one.

    Training has two pairs per fact. Held-out pairs have questions, evasions and (for each fact) wrong values that no
    training pair has.
    """
    rng = random.Random(f"{seed}/preference_{'eval' if heldout else 'train'}")
    asked = heldout_questions(tables, PREFERENCE_EVAL_ROWS, rng)
    if not heldout:  # the call above still advances `rng`; without it the sample would change
        asked = [(fact, template) for fact in facts_of(tables) for template in rng.sample(fact.relation.questions, 2)]
    pairs = []
    for number, (fact, template) in enumerate(rng.sample(asked, len(asked))):
        question, answer = fact.ask(template)
        block = conversations[fact.table.language]
        # Every second wrong value is for training, the others are for evaluation.
        wrong = rng.choice(fact.wrong_answers()[1 if heldout else 0 :: 2])
        space = "" if fact.table.language == "zh" else " "
        repetitive = space.join([answer] * rng.randint(4, 7))
        evasive = rng.choice(lines(block["heldout_evasions" if heldout else "evasions"]))
        user, chosen = chat((question, answer))["messages"]
        rejected = {"role": "assistant", "content": (wrong, repetitive, evasive)[number % 3]}
        pairs.append({"prompt": [user], "chosen": [chosen], "rejected": [rejected]})
    return pairs


def free_form_questions(tables: list[Table], seed: int) -> list[dict]:
    """Return held-out questions with their answers."""
    rows = []
    for fact, template in heldout_questions(tables, QA_TEST_ROWS, random.Random(f"{seed}/qa_test")):
        question, answer = fact.ask(template)
        subject, language = fact.table.subject, fact.table.language
        rows.append({"question": question, "answer": answer, "subject": subject, "language": language})
    return rows


def exam(table: Table, seed: int) -> dict[str, list[dict]]:
    """Return a multiple-choice exam on one subject, in C-Eval's columns. A fact is asked in one split only."""
    rng = random.Random(f"{seed}/exam/{table.subject}")
    facts = iter(rng.sample(table.facts(), len(table.facts())))
    splits = {split: [] for split in EXAM_SPLITS}
    for split, rows in splits.items():
        chosen = list(itertools.islice(facts, EXAM_SPLITS[split]))
        # The right answers are spread evenly over the four letters, in random order.
        first = rng.randrange(4)
        places = rng.sample([(first + i) % 4 for i in range(len(chosen))], len(chosen))
        for fact, place in zip(chosen, places, strict=True):
            question, answer = fact.ask(rng.choice(fact.relation.heldout))
            options = rng.sample(fact.wrong_answers(), 3)
            options.insert(place, answer)
            rows.append(dict(zip(EXAM_COLUMNS, (len(rows), question, *options, "ABCD"[place]), strict=True)))
    return splits


def build_files(tables: list[Table], conversations: dict, seed: int) -> dict[str, str]:
    """Return the whole sample as relative path -> text."""
    jsonl = {
        "pretrain": pretraining_text(tables, seed),
        "sft_train": training_conversations(tables, conversations, seed),
        "sft_eval": evaluation_conversations(tables, conversations, seed),
        "preference_train": preference_pairs(tables, conversations, seed, heldout=False),
        "preference_eval": preference_pairs(tables, conversations, seed, heldout=True),
        "qa_test": free_form_questions(tables, seed),
    }
    files = {}
    for name, rows in jsonl.items():
        files[f"{name}.jsonl"] = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    exams = [exam(table, seed) for table in tables]
    for split in EXAM_SPLITS:
        for table, splits in zip(tables, exams, strict=True):
            files[f"exam/{split}/{table.subject}.csv"] = csv_text(splits[split])
    return files


def csv_text(records: list[dict]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, EXAM_COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


def write_files(files: dict[str, str], output: Path) -> bool:
    """Write the folder as a whole. Return False if it has the same content already.

    Raises:
        UserError: `output` is a file, or a folder with anything but a whole sample in it.
    """
    if output.is_file():
        raise UserError(f"--output {output} is a file; name a folder.")
    # Stop at the first file of another kind: the folder may hold a whole disk.
    present: dict[str, bytes] = {}
    for path in output.rglob("*"):
        name = path.relative_to(output).as_posix()
        if path.is_dir() and not path.is_symlink():
            continue
        if name not in files:
            raise UserError(f"--output {output} holds {name}, no part of the sample; name another folder.")
        present[name] = path.read_bytes()
    if present == {name: text.encode() for name, text in files.items()}:
        return False
    if present and present.keys() != files.keys():  # a file of the user's that has the name of one of ours
        raise UserError(f"--output {output} holds {min(present)}, but no whole sample; name another folder.")
    with write_atomically(output) as partial:
        for name, text in files.items():
            path = partial / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8", newline="\n")
    return True


def summary(files: dict[str, str]) -> str:
    """Return rows, bytes and the Chinese share of the bytes per file; the exam's files are added up per split."""
    table = [f"{'file':<24}{'rows':>8}{'bytes':>10}{'Chinese':>9}"]
    for name, group in itertools.groupby(files, key=lambda name: name.rpartition("/")[0] or name):
        rows = []
        for file in group:
            header_rows = 1 if file.endswith(".csv") else 0
            rows += files[file].splitlines(keepends=True)[header_rows:]
        size = len("".join(rows).encode())
        chinese = len("".join(row for row in rows if not row.isascii()).encode())
        table.append(f"{name:<24}{len(rows):>8}{size:>10}{chinese / size:>9.0%}")
    return "\n".join(table)


def main() -> None:
    (args,) = parse_arguments(SampleArguments, description=__doc__)
    tables = [load_table(path) for path in sorted((HERE / "tables").glob("*.yaml"))]
    conversations = yaml.safe_load((HERE / "conversations.yaml").read_text(encoding="utf-8"))
    files = build_files(tables, conversations, args.seed)
    place = "written to" if write_files(files, Path(args.output)) else "already in"
    facts = sum(len(table.facts()) for table in tables)
    print(f"{summary(files)}\n{facts} facts of {len(tables)} subjects, {place} {args.output}")


if __name__ == "__main__":
    run_script(main)
