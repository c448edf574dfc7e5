"""Turn the tables of facts in `tables/` into the sample the quickstart trains on and is judged by.

    python data/sample/make_sample.py --output outputs/sample

README.md lists the files it writes. The same seed gives the same bytes on every machine. Questions from `heldout`
templates go only into the evaluation files, questions from all other templates only into the training files.
"""

import csv
import io
import itertools
import json
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from string import Formatter

import yaml

from buddygpt.cli.arguments import parse_arguments
from buddygpt.cli.errors import UserError, run_script

HERE = Path(__file__).resolve().parent
EXAM_COLUMNS = ("id", "question", "A", "B", "C", "D", "answer")
EXAM_SPLITS = {"dev": 5, "val": 4, "test": 22}  # questions per subject, at most
SFT_EVAL_ROWS, PREFERENCE_EVAL_ROWS, QA_TEST_ROWS = 12, 15, 20  # per subject, at most
ANSWERED_QUESTIONS = 5  # per fact, in the pretraining text; the conversations use every training template
ARRANGEMENTS = 4  # with one, a model learns the order of the documents by heart instead of the facts


@dataclass
class SampleArguments:
    output: str = field(metadata={"help": "Folder to write. An older sample there is replaced as a whole."})
    seed: int = field(default=0, metadata={"help": "Seed of every shuffle and choice."})


@dataclass(frozen=True)
class Relation:
    """How one column of a table is told and asked; the other columns its templates name are the key."""

    answer: str
    statements: tuple[str, ...]
    questions: tuple[str, ...]
    heldout: tuple[str, ...]
    follow_up: str


@dataclass(frozen=True)
class Table:
    """One subject. A row lacks the columns whose cell is `~`, and templates that name them pass over it."""

    subject: str
    language: str
    rows: tuple[dict[str, str], ...]
    passages: tuple[str, ...]
    relations: tuple[Relation, ...]

    def facts(self) -> list["Fact"]:
        pairs = itertools.product(self.relations, self.rows)
        return [Fact(self, r, row) for r, row in pairs if {r.answer, *columns_of(r.follow_up)} <= row.keys()]


@dataclass(frozen=True, eq=False)
class Fact:
    table: Table
    relation: Relation
    row: dict[str, str]

    def ask(self, template: str) -> tuple[str, str]:
        """The question and its answer."""
        return template.format(**self.row), self.row[self.relation.answer]

    def wrong_answers(self) -> list[str]:
        """The other values of the answer's column, in the table's order."""
        column = [row[self.relation.answer] for row in self.table.rows if self.relation.answer in row]
        return [value for value in dict.fromkeys(column) if value != self.row[self.relation.answer]]


def load_table(path: Path) -> Table:
    """Read one subject.

    Raises:
        UserError: A missing or unknown key, a row of another length than `columns`, or a template naming no column.
    """
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
        columns = raw.pop("columns")
        rows, entries = raw.pop("rows"), raw.pop("relations")
        rows = tuple({c: str(cell) for c, cell in zip(columns, row, strict=True) if cell is not None} for row in rows)
        relations = tuple(Relation(**{k: lines(v) if "\n" in v else v for k, v in e.items()}) for e in entries)
        passages = lines(raw.pop("passages"))
        table = Table(subject=path.stem, rows=rows, relations=relations, passages=passages, **raw)
    except (KeyError, TypeError, ValueError, AttributeError, yaml.YAMLError) as error:
        raise UserError(f"{path} is not a table of facts: {error!r}. Compare it with the tables beside it.") from error
    told = [t for r in relations for t in (*r.statements, *r.questions, *r.heldout, r.follow_up)]
    for template in (*passages, *told):
        if unknown := columns_of(template) - set(columns):
            raise UserError(f"{path}: template `{template}` names {sorted(unknown)}; the columns are {columns}.")
    return table


def lines(block: str) -> tuple[str, ...]:
    return tuple(block.strip().split("\n"))


def columns_of(template: str) -> set[str]:
    return {name for _, name, _, _ in Formatter().parse(template) if name is not None}


def pretraining_text(tables: list[Table], seed: int) -> list[dict]:
    """Documents of one subject each: a few sentences, or a few answered questions, in several arrangements."""
    documents = []
    for table, arrangement in itertools.product(tables, range(ARRANGEMENTS)):
        rng = random.Random(f"{seed}/pretrain/{table.subject}/{arrangement}")
        told = [(table.passages, row) for row in table.rows]
        told += [(fact.relation.statements, fact.row) for fact in table.facts()]
        sentences = [t.format(**row) for templates, row in told for t in templates if columns_of(t) <= row.keys()]
        asked = [(fact, t) for fact in table.facts() for t in rng.sample(fact.relation.questions, ANSWERED_QUESTIONS)]
        form, space = ("问：{}\n答：{}", "") if table.language == "zh" else ("Q: {}\nA: {}", " ")
        documents += join_some(sentences, space, rng)
        documents += join_some([form.format(*fact.ask(template)) for fact, template in asked], "\n", rng)
    return [{"text": text} for text in random.Random(f"{seed}/pretrain").sample(documents, len(documents))]


def join_some(pieces: list[str], separator: str, rng: random.Random) -> Iterator[str]:
    """Shuffle, then join two to six at a time."""
    remaining = iter(rng.sample(pieces, len(pieces)))
    while some := list(itertools.islice(remaining, rng.randint(2, 6))):
        yield separator.join(some)


def training_conversations(tables: list[Table], conversations: dict, seed: int) -> list[dict]:
    """Every fact under every training template, dialogues of two or three facts, system prompts, and small talk."""
    rng = random.Random(f"{seed}/sft_train")
    rows = []
    for table in tables:
        systems = lines(conversations[table.language]["system"])
        for relation, group in itertools.groupby(table.facts(), key=lambda fact: fact.relation):
            facts = list(group)
            rows += [chat(fact.ask(template)) for fact in facts for template in relation.questions]
            for fact in facts:
                others = rng.sample([other for other in facts if other is not fact], rng.randint(1, 2))
                follow_ups = [other.ask(relation.follow_up) for other in others]
                first = fact.ask(rng.choice(relation.questions))
                rows.append(chat(first, *follow_ups, system=rng.choice((None, *systems))))
    for language, block in conversations.items():
        facts = [fact for table in tables if table.language == language for fact in table.facts()]
        for talk in small_talk(block, "questions"):
            fact = rng.choice(facts)
            asked = fact.ask(rng.choice(fact.relation.questions))
            rows += [chat(talk, asked), chat(asked, talk)]
            rows += [chat(talk, system=system) for system in (None, *lines(block["system"]))]
    return rng.sample(rows, len(rows))


def evaluation_conversations(tables: list[Table], conversations: dict, seed: int) -> list[dict]:
    asked = heldout_questions(tables, SFT_EVAL_ROWS, random.Random(f"{seed}/sft_eval"))
    talk = [turn for block in conversations.values() for turn in small_talk(block, "heldout")]
    return [chat(turn) for turn in talk + [fact.ask(template) for fact, template in asked]]


def small_talk(block: dict, templates: str) -> list[tuple[str, str]]:
    return [(question, entry["answer"]) for entry in block["talk"] for question in lines(entry[templates])]


def chat(*turns: tuple[str, str], system: str | None = None) -> dict:
    messages = [{"role": "system", "content": system}] if system else []
    for question, answer in turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages}


def heldout_questions(tables: list[Table], limit: int, rng: random.Random) -> list[tuple[Fact, str]]:
    """Up to `limit` facts a subject, each with one of its held-out templates."""
    pools = [table.facts() for table in tables]
    chosen = [fact for facts in pools for fact in rng.sample(facts, min(limit, len(facts)))]
    return [(fact, rng.choice(fact.relation.heldout)) for fact in chosen]


def preference_pairs(tables: list[Table], conversations: dict, seed: int, heldout: bool) -> list[dict]:
    """The right answer against, in turn, a wrong, a repetitive and an evasive one; for training, two pairs a fact.

    Held-out pairs have questions, evasions, and for each fact wrong values, that no training pair has.
    """
    rng = random.Random(f"{seed}/preference_{'eval' if heldout else 'train'}")
    asked = heldout_questions(tables, PREFERENCE_EVAL_ROWS, rng)
    if not heldout:
        facts = [fact for table in tables for fact in table.facts()]
        asked = [(fact, template) for fact in facts for template in rng.sample(fact.relation.questions, 2)]
    pairs = []
    for i, (fact, template) in enumerate(rng.sample(asked, len(asked))):
        question, answer = fact.ask(template)
        block = conversations[fact.table.language]
        wrong = rng.choice(fact.wrong_answers()[int(heldout) :: 2])
        repetitive = ("" if fact.table.language == "zh" else " ").join([answer] * rng.randint(4, 7))
        evasive = rng.choice(lines(block["heldout_evasions" if heldout else "evasions"]))
        user, chosen = chat((question, answer))["messages"]
        rejected = {"role": "assistant", "content": (wrong, repetitive, evasive)[i % 3]}
        pairs.append({"prompt": [user], "chosen": [chosen], "rejected": [rejected]})
    return pairs


def free_form_questions(tables: list[Table], seed: int) -> list[dict]:
    asked = heldout_questions(tables, QA_TEST_ROWS, random.Random(f"{seed}/qa_test"))
    rows = [(*fact.ask(template), fact.table.subject, fact.table.language) for fact, template in asked]
    return [dict(zip(("question", "answer", "subject", "language"), row, strict=True)) for row in rows]


def exam(table: Table, seed: int) -> dict[str, list[dict]]:
    """Multiple choice on one subject, split by split, in C-Eval's columns; a fact is asked in one split only."""
    rng = random.Random(f"{seed}/exam/{table.subject}")
    facts = iter(rng.sample(table.facts(), len(table.facts())))
    splits = {split: [] for split in EXAM_SPLITS}
    for split, rows in splits.items():
        chosen = list(itertools.islice(facts, EXAM_SPLITS[split]))
        first = rng.randrange(4)
        places = rng.sample([(first + i) % 4 for i in range(len(chosen))], len(chosen))
        for fact, place in zip(chosen, places, strict=True):
            question, answer = fact.ask(rng.choice(fact.relation.heldout))
            options = rng.sample(fact.wrong_answers(), 3)
            options.insert(place, answer)
            rows.append(dict(zip(EXAM_COLUMNS, (len(rows), question, *options, "ABCD"[place]), strict=True)))
    return splits


def build_files(tables: list[Table], conversations: dict, seed: int) -> dict[str, str]:
    """The whole sample, as relative path -> text."""
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
        files |= {f"exam/{split}/{t.subject}.csv": csv_text(e[split]) for t, e in zip(tables, exams, strict=True)}
    return files


def csv_text(records: list[dict]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, EXAM_COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


def write_files(files: dict[str, str], output: Path) -> bool:
    """Write the folder beside its place and rename it. Returns False where the same files are there already.

    Raises:
        UserError: `output` is a file, or a folder that holds anything but a sample.
    """
    if output.is_file():
        raise UserError(f"--output {output} is a file; name a folder.")
    present = {path.relative_to(output).as_posix(): path.read_bytes() for path in output.rglob("*") if path.is_file()}
    if foreign := sorted(present.keys() - files.keys()):
        raise UserError(f"--output {output} holds {foreign[0]}, no part of the sample; name another folder.")
    if present == {name: text.encode() for name, text in files.items()}:
        return False
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    for name, text in files.items():
        path = partial / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8", newline="\n")
    shutil.rmtree(output, ignore_errors=True)
    partial.rename(output)
    return True


def summary(files: dict[str, str]) -> str:
    """Rows, bytes and the Chinese share of the bytes, file by file; the exam's files are added up by split."""
    table = [f"{'file':<24}{'rows':>8}{'bytes':>10}{'Chinese':>9}"]
    for name, group in itertools.groupby(files, key=lambda name: name.rpartition("/")[0] or name):
        rows = [row + "\n" for file in group for row in files[file].split("\n")[file.endswith(".csv") : -1]]
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
