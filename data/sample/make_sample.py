"""Turn the tables of facts in `tables/` into the sample the quickstart trains on and is judged by.

    python data/sample/make_sample.py --output outputs/sample

writes pretraining text, conversations, preference pairs, free-form questions and a multiple-choice exam; README.md
beside this file lists them. The same seed gives the same bytes on every machine. Questions from `heldout` templates go
only into the evaluation files (`sft_eval`, `preference_eval`, `qa_test`, `exam/`), all others only into training files.
"""

import csv
import io
import json
import random
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from string import Formatter

import yaml

from buddygpt.launch import UserError, parse_arguments, run_script

HERE = Path(__file__).resolve().parent
ANSWERED_QUESTIONS = 5  # per fact, in pretraining text; the conversations ask with every training template
DEV_QUESTIONS, VAL_QUESTIONS, TEST_QUESTIONS = 5, 4, 22  # per subject, at most
QA_QUESTIONS, SFT_EVAL_QUESTIONS, PREFERENCE_EVAL_PAIRS = 20, 12, 15  # per subject, at most
EVASIONS = {
    "zh": ("我不知道。", "这个问题很有意思，值得大家一起想一想。", "对不起，我没有办法回答。"),
    "en": ("I do not know.", "That is an interesting question to think about.", "Sorry, I cannot answer that."),
}
HELDOUT_EVASIONS = {
    "zh": ("我不太清楚。", "这很难说，要看具体的情况。"),
    "en": ("I am not sure.", "That is hard to say, it depends."),
}

Record = dict[str, object]


@dataclass
class SampleArguments:
    output: str = field(metadata={"help": "Folder to write. An older sample there is replaced as a whole."})
    seed: int = field(default=0, metadata={"help": "Seed of every shuffle and choice."})


@dataclass(frozen=True)
class Relation:
    """One direction of one kind of fact: how it is told, how it is asked, and how it is asked only in evaluation."""

    subject: str
    language: str
    answer: str
    statements: tuple[str, ...]
    questions: tuple[str, ...]
    heldout: tuple[str, ...]
    follow_up: str
    rows: tuple[dict[str, str], ...]

    def facts(self) -> list["Fact"]:
        columns = {self.answer, *_columns(self.questions[0])}
        return [Fact(self, row) for row in self.rows if columns <= row.keys()]


@dataclass(frozen=True, eq=False)
class Fact:
    relation: Relation
    row: dict[str, str]

    @property
    def answer(self) -> str:
        return self.row[self.relation.answer]

    def ask(self, template: str) -> str:
        return template.format(**self.row)

    def wrong_answers(self) -> list[str]:
        """Other values of the same column, in the table's order."""
        column = [row[self.relation.answer] for row in self.relation.rows if self.relation.answer in row]
        return [value for value in dict.fromkeys(column) if value != self.answer]


@dataclass(frozen=True)
class Table:
    subject: str
    language: str
    rows: tuple[dict[str, str], ...]
    passages: tuple[str, ...]
    relations: tuple[Relation, ...]

    def facts(self) -> list[Fact]:
        return [fact for relation in self.relations for fact in relation.facts()]


def load_table(path: Path) -> Table:
    """Read one subject. A cell `~` is unknown: templates that need it pass over its row.

    Raises:
        UserError: A missing or unknown key, a row of another length than `columns`, or a template naming no column.
    """
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
        rows = tuple(
            {column: str(cell) for column, cell in zip(raw["columns"], row, strict=True) if cell is not None}
            for row in raw["rows"]
        )
        common = {"subject": path.stem, "language": raw["language"], "rows": rows}
        relations = tuple(
            Relation(**common, **{key: _lines(value) if "\n" in value else value for key, value in relation.items()})
            for relation in raw["relations"]
        )
        table = Table(**common, passages=_lines(raw["passages"]), relations=relations)
    except (KeyError, TypeError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path} is not a table of facts: {error}. Compare it with the tables beside it.") from error
    templates = [
        *table.passages,
        *(t for r in relations for t in (*r.statements, *r.questions, *r.heldout, r.follow_up)),
    ]
    for template in templates:
        if unknown := _columns(template) - set(raw["columns"]):
            raise UserError(f"{path}: template `{template}` names {sorted(unknown)}; columns are {raw['columns']}.")
    return table


def load_tables() -> list[Table]:
    return [load_table(path) for path in sorted((HERE / "tables").glob("*.yaml"))]


def pretraining_text(tables: list[Table], seed: int) -> list[Record]:
    """Documents of one subject each: a few sentences, or a few answered questions."""
    documents = []
    for table in tables:
        rng = random.Random(f"{seed}/pretrain/{table.subject}")
        told = [(table.passages, row) for row in table.rows]
        told += [(fact.relation.statements, fact.row) for fact in table.facts()]
        sentences = [t.format(**row) for templates, row in told for t in templates if _columns(t) <= row.keys()]
        form = "问：{}\n答：{}" if table.language == "zh" else "Q: {}\nA: {}"
        answered = [
            form.format(fact.ask(template), fact.answer)
            for fact in table.facts()
            for template in rng.sample(fact.relation.questions, ANSWERED_QUESTIONS)
        ]
        documents += _documents(sentences, "" if table.language == "zh" else " ", rng)
        documents += _documents(answered, "\n", rng)
    random.Random(f"{seed}/pretrain").shuffle(documents)
    return [{"text": text} for text in documents]


def training_conversations(tables: list[Table], conversations: dict, seed: int) -> list[Record]:
    """Every fact under every training template, dialogues of two or three facts, system prompts, and identity."""
    rng = random.Random(f"{seed}/sft_train")
    turns = []
    for table in tables:
        system = _lines(conversations[table.language]["system"])
        for relation in table.relations:
            facts = relation.facts()
            asked = [(fact, template) for fact in facts for template in relation.questions]
            turns += [_chat((fact.ask(template), fact.answer)) for fact, template in asked]
            for fact in facts:
                others = rng.sample([other for other in facts if other is not fact], rng.randint(1, 2))
                turns.append(
                    _chat(
                        (fact.ask(rng.choice(relation.questions)), fact.answer),
                        *((other.ask(relation.follow_up), other.answer) for other in others),
                    )
                )
            fact = rng.choice(facts)
            turns += [_chat((fact.ask(rng.choice(relation.questions)), fact.answer), system=text) for text in system]
    facts = [fact for table in tables for fact in table.facts()]
    for language, block in conversations.items():
        own = [fact for fact in facts if fact.relation.language == language]
        for question, answer in _talk(block, "questions"):
            fact = rng.choice(own)
            after = (fact.ask(rng.choice(fact.relation.questions)), fact.answer)
            turns += [_chat((question, answer)), _chat((question, answer), after), _chat(after, (question, answer))]
            turns += [_chat((question, answer), system=text) for text in _lines(block["system"])]
    rng.shuffle(turns)
    return turns


def evaluation_conversations(tables: list[Table], conversations: dict, seed: int) -> list[Record]:
    talk = [_chat(turn) for block in conversations.values() for turn in _talk(block, "heldout")]
    rows = _heldout_questions(tables, SFT_EVAL_QUESTIONS, f"{seed}/sft_eval")
    return talk + [_chat((question, fact.answer)) for fact, question in rows]


def training_preferences(tables: list[Table], seed: int) -> list[Record]:
    """Two pairs a fact: the right answer against a wrong, a repetitive or an evasive one, in equal shares."""
    rng = random.Random(f"{seed}/preference_train")
    asked = [
        (fact, fact.ask(template))
        for table in tables
        for fact in table.facts()
        for template in rng.sample(fact.relation.questions, 2)
    ]
    return _preferences(asked, EVASIONS, slice(1, None), rng)


def evaluation_preferences(tables: list[Table], seed: int) -> list[Record]:
    """Held-out questions, evasions and wrong values; a fact's wrong value here is never its wrong value in training."""
    rng = random.Random(f"{seed}/preference_eval")
    asked = _heldout_questions(tables, PREFERENCE_EVAL_PAIRS, f"{seed}/preference_eval")
    return _preferences(asked, HELDOUT_EVASIONS, slice(0, 1), rng)


def free_form_questions(tables: list[Table], seed: int) -> list[Record]:
    return [
        {
            "question": question,
            "answer": fact.answer,
            "subject": fact.relation.subject,
            "language": fact.relation.language,
        }
        for fact, question in _heldout_questions(tables, QA_QUESTIONS, f"{seed}/qa_test")
    ]


def exam(table: Table, seed: int) -> dict[str, list[Record]]:
    """Multiple choice on one subject; a fact is asked in one split only. Columns as in C-Eval."""
    rng = random.Random(f"{seed}/exam/{table.subject}")
    facts = iter(rng.sample(table.facts(), len(table.facts())))
    splits = {}
    for split, size in (("dev", DEV_QUESTIONS), ("val", VAL_QUESTIONS), ("test", TEST_QUESTIONS)):
        chosen = [fact for _, fact in zip(range(size), facts, strict=False)]
        letters = list("ABCD" * (len(chosen) // 4 + 1))
        letters = rng.sample(letters[: len(chosen)], len(chosen))
        splits[split] = [
            _exam_row(i, fact, letter, rng) for i, (fact, letter) in enumerate(zip(chosen, letters, strict=True))
        ]
    return splits


def build_files(tables: list[Table], conversations: dict, seed: int) -> dict[str, str]:
    """The whole sample as relative path -> text."""
    files = {
        "pretrain.jsonl": _jsonl(pretraining_text(tables, seed)),
        "sft_train.jsonl": _jsonl(training_conversations(tables, conversations, seed)),
        "sft_eval.jsonl": _jsonl(evaluation_conversations(tables, conversations, seed)),
        "preference_train.jsonl": _jsonl(training_preferences(tables, seed)),
        "preference_eval.jsonl": _jsonl(evaluation_preferences(tables, seed)),
        "qa_test.jsonl": _jsonl(free_form_questions(tables, seed)),
    }
    for table in tables:
        for split, rows in exam(table, seed).items():
            files[f"exam/{split}/{table.subject}.csv"] = _csv(rows)
    return files


def _lines(block: str) -> tuple[str, ...]:
    return tuple(block.strip().split("\n"))


def _columns(template: str) -> set[str]:
    return {name for _, name, _, _ in Formatter().parse(template) if name is not None}


def _documents(pieces: list[str], separator: str, rng: random.Random) -> Iterator[str]:
    pieces = rng.sample(pieces, len(pieces))
    while pieces:
        size = rng.randint(2, 6)
        yield separator.join(pieces[:size])
        pieces = pieces[size:]


def _chat(*turns: tuple[str, str], system: str | None = None) -> Record:
    messages = [{"role": "system", "content": system}] if system else []
    for question, answer in turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages}


def _talk(block: dict, templates: str) -> list[tuple[str, str]]:
    return [(question, entry["answer"]) for entry in block["talk"] for question in _lines(entry[templates])]


def _heldout_questions(tables: list[Table], limit: int, seed: str) -> list[tuple[Fact, str]]:
    rows = []
    for table in tables:
        rng = random.Random(f"{seed}/{table.subject}")
        facts = rng.sample(table.facts(), len(table.facts()))[:limit]
        rows += [(fact, fact.ask(rng.choice(fact.relation.heldout))) for fact in facts]
    return rows


def _preferences(asked: list[tuple[Fact, str]], evasions: dict, wrong: slice, rng: random.Random) -> list[Record]:
    """Pairs whose rejected answer is in turn wrong (one of `values[wrong]`), repetitive, evasive."""
    pairs = []
    for i, (fact, question) in enumerate(rng.sample(asked, len(asked))):
        values = fact.wrong_answers()
        start = fact.relation.rows.index(fact.row)  # so that the value kept for evaluation differs from fact to fact
        values = values[start % len(values) :] + values[: start % len(values)]
        space = "" if fact.relation.language == "zh" else " "
        rejected = (
            rng.choice(values[wrong]),
            space.join([fact.answer] * rng.randint(4, 7)),
            rng.choice(evasions[fact.relation.language]),
        )[i % 3]
        messages = [
            [{"role": role, "content": text}]
            for role, text in (("user", question), ("assistant", fact.answer), ("assistant", rejected))
        ]
        pairs.append(dict(zip(("prompt", "chosen", "rejected"), messages, strict=True)))
    return pairs


def _exam_row(index: int, fact: Fact, letter: str, rng: random.Random) -> Record:
    options = rng.sample(fact.wrong_answers(), 3)
    options.insert("ABCD".index(letter), fact.answer)
    question = fact.ask(rng.choice(fact.relation.heldout))
    return {"id": index, "question": question, **dict(zip("ABCD", options, strict=True)), "answer": letter}


def _jsonl(records: Iterable[Record]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def _csv(rows: list[Record]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, ["id", "question", *"ABCD", "answer"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def write_files(files: dict[str, str], output: Path) -> bool:
    """Write the folder beside its place and rename it. Returns False where the same files are there already.

    Raises:
        UserError: `output` is a file, or a folder that holds anything but a sample.
    """
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output} is a file; name a folder.")
    present = {path.relative_to(output).as_posix(): path for path in output.rglob("*") if path.is_file()}
    if foreign := sorted(present.keys() - files.keys()):
        raise UserError(f"--output {output} holds {foreign[0]}, no part of the sample; name another folder.")
    if present.keys() == files.keys() and all(present[n].read_bytes() == t.encode() for n, t in files.items()):
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
    """Rows, bytes and the Chinese share of the bytes for each file; the exam's files are added up by split."""
    groups: dict[str, list[str]] = {}
    for name, text in files.items():
        rows = text.split("\n")[1 if name.endswith(".csv") else 0 : -1]
        groups.setdefault(name.rsplit("/", 1)[0] if "/" in name else name, []).extend(rows)
    lines = [f"{'file':<24}{'rows':>8}{'bytes':>10}{'Chinese':>9}"]
    for name, rows in groups.items():
        sizes = [(len(row.encode()) + 1, not row.isascii()) for row in rows]
        total = sum(size for size, _ in sizes)
        lines.append(f"{name:<24}{len(rows):>8}{total:>10}{sum(s for s, zh in sizes if zh) / total:>9.0%}")
    return "\n".join(lines)


def main() -> None:
    (args,) = parse_arguments(SampleArguments, description=__doc__)
    tables = load_tables()
    conversations = yaml.safe_load((HERE / "conversations.yaml").read_text(encoding="utf-8"))
    files = build_files(tables, conversations, args.seed)
    written = write_files(files, Path(args.output))
    print(summary(files))
    facts = sum(len(table.facts()) for table in tables)
    print(f"{facts} facts of {len(tables)} subjects, {'written to' if written else 'already in'} {args.output}")


if __name__ == "__main__":
    run_script(main)
