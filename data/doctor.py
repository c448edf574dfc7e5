"""Check if data is fit to train on: bad rows, languages, lengths, loss, duplicates, benchmark items, two examples.

    python data/doctor.py alpaca.json --tokenizer outputs/tokenizer
    python data/doctor.py outputs/sft_train.jsonl --stage sft --tokenizer outputs/base --max_length 2048
    python data/doctor.py 'corpus/*.jsonl.gz' --stage pretrain --exams ../exams/cmmlu ../exams/gsm8k

Instruction, preference and labeled rows are checked as data/convert_chat.py would write them, pretraining text as it
is. The recipes check their rows in the same way and stop if they are not fit; give them the same `exams`.

Exit status: 0 fit, 1 not fit, 2 the files cannot be checked.
"""

import argparse
import hashlib
import json
import os
import re
import shlex
import sys
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from multiprocessing import get_all_start_methods, get_context
from pathlib import Path
from typing import Any

from ftfy.badness import is_bad
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from buddygpt.cli.checkpoints import load_tokenizer
from buddygpt.cli.errors import ArgumentParser, UserError, run_script
from buddygpt.cli.files import file_type, find_files
from buddygpt.data.chat.checker import (
    ROWS_TO_RECOGNIZE,
    CheckedRow,
    RowChecker,
    SchemaError,
    find_schema,
    require_schema,
    row_text,
)
from buddygpt.data.chat.report import CONTROL, Findings, format_examples, format_findings, format_verdict
from buddygpt.data.chat.rules import FORMS, MEDIA, TEMPLATE_OPTIONS, count_remarks, special_tokens
from buddygpt.data.chat.schemas import SCHEMAS, Schema, recognize
from buddygpt.data.chat.tokens import TokenSequence
from buddygpt.data.chat.trees import join_replies
from buddygpt.data.text.measures import language
from buddygpt.data.text.rows import Row, progress_bar, read_rows

LARGE_FILE = 2**18  # bytes; starting processes for less takes longer than they save
ROWS_PER_TASK, CHARACTERS_PER_TASK = 100, 2**20
MIN_HAN, MAX_ACCENTED = 0.25, 0.01  # shares of the letters; see `language`
# Columns that text does not have. A file with one of them is no pretraining text, unless --stage pretrain says so.
CHAT_COLUMN = re.compile(
    r"question|query|prompt|instruction|answers?|response|output|completions?|target|chosen|rejected|messages|"
    rf"conversations?|dialogue?s?|{MEDIA.pattern}",
    re.IGNORECASE,
)
# The beginning of a text that is a chat in some template.
CHAT_TEXT = re.compile(
    r"\s*(?:<s>|<bos>|<\|begin_of_text\|>|\[gMASK\]<sop>)?\s*(?:<\|(?:im_start|start_header_id|system|user|Human)\|>|"
    r"<start_of_turn>|<｜User｜>|\[INST\]|\[Human\]:|### (?:Human|Instruction|User):|"
    r"(?:Human|USER): .*\n\s*(?:Assistant|ASSISTANT):|Below is an instruction that describes a task)"
)
SORTED_JSON = json.JSONEncoder(sort_keys=True)
INVISIBLE = re.compile("[\u00ad\u200b-\u200f\u2060\ufeff]")
KINDS = {"sft": "sft", "dpo": "preference", "kto": "kto", "pretrain": "text"}  # stage -> kind of row


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("paths", metavar="PATH", nargs="+", help="files, globs or folders of one stage")
    parser.add_argument("--stage", choices=KINDS, help="stage that the rows are for (default: recognized)")
    parser.add_argument("--schema", choices=SCHEMAS, metavar="NAME", help="the schema, instead of recognizing it")
    parser.add_argument("--tokenizer", metavar="DIR", help="for lengths in tokens; for chats also loss and examples")
    parser.add_argument("--max_length", type=int, default=1024, help="tokens kept of a row (default: %(default)s)")
    parser.add_argument("--exams", nargs="+", default=[], metavar="FOLDER", help="benchmarks to look for in the rows")
    parser.add_argument(
        "--text_key", nargs="+", default=["text", "content"], help="column of pretraining text (default: text content)"
    )
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    if args.max_length < 1:
        raise UserError(f"--max_length is {args.max_length}, must be at least 1")
    for path in args.paths:
        if (Path(path) / "manifest.json").exists():
            raise UserError(f"{path} is a folder of token shards. Run: python data/inspect_shards.py {path}")
    logging.set_verbosity_error()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # large files are split between processes

    try:
        findings = check_files(args)
    except SchemaError as error:
        raise UserError(f"{error}. To read all rows by one schema, give --schema NAME") from error

    in_color = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    print("\n".join(format_findings(findings) + format_examples(findings, in_color)))
    print("\n" + format_verdict(findings, convert_command(findings.kind, args)))
    sys.exit(1 if findings.reasons() else 0)


def convert_command(kind: str, args: argparse.Namespace) -> str:
    """Return the command that converts the rows into the standard form."""
    command = f"python data/convert_chat.py --kind {kind} --input {shlex.join(args.paths)} --output NEW.jsonl"
    if args.schema:
        command += f" --schema {args.schema}"
    if args.tokenizer:
        command += f" --tokenizer {shlex.quote(args.tokenizer)}"
    return command


def check_files(args: argparse.Namespace) -> Findings:
    """Check every row of all files and print the schema of each file."""
    schemas = find_schemas(find_files(args.paths), args)
    tokenizer = load_tokenizer(args.tokenizer) if args.tokenizer else None
    first_schema = next(iter(schemas.values()))
    kind = first_schema.kind if first_schema else "text"
    doctor = Doctor(kind, args.max_length, tokenizer, args.exams)
    for path, schema in schemas.items():
        with progress_bar([path], desc=path.name, leave=False) as bar:
            rows = read_rows(path, None if schema else args.text_key, bar)
            if schema and not args.schema:
                rows = rows_of_schema(path, rows, schema, KINDS.get(args.stage))
            doctor.add_rows(path, join_replies(rows, schema), schema)
        tqdm.write(f"file         {path} ({f'schema {schema.name}, kind {kind}' if schema else 'text'})")
    return doctor.findings


def rows_of_schema(path: Path, rows: Iterable[Row], schema: Schema, kind: str | None) -> Iterator[Row]:
    """Yield the rows; raise [`SchemaError`] at one that fits another schema."""
    for row in rows:
        require_schema(path, row, schema, kind)
        yield row


def find_schemas(paths: list[Path], args: argparse.Namespace) -> dict[Path, Schema | None]:
    """Return the schema of every file, None for pretraining text. All must be of one kind."""
    schemas = {path: find_schema_or_text(path, args) for path in paths}
    kinds = {path: schema.kind if schema else "text" for path, schema in schemas.items()}
    expected = KINDS.get(args.stage, kinds[paths[0]])
    for path, kind in kinds.items():
        if kind != expected:
            raise UserError(f"{path} holds rows of kind {kind}, not {expected}. Check it separately, or give --stage")
    return schemas


def find_schema_or_text(path: Path, args: argparse.Namespace) -> Schema | None:
    """Return the schema of a file, or None for pretraining text: rows that fit no schema and have a text column."""
    if args.stage == "pretrain" or file_type(path) in (".txt", ".md"):
        return None
    if args.schema:
        return SCHEMAS[args.schema]
    if args.stage is None:
        rows = [row.content for row in islice(read_rows(path), ROWS_TO_RECOGNIZE) if not row.error]
        has_text = any(key in row for row in rows for key in args.text_key)
        named = {key for row in rows for key, value in row.items() if value and key not in args.text_key}
        if has_text and not any(recognize(row) for row in rows):
            if chat := next(filter(CHAT_COLUMN.fullmatch, sorted(named)), None):
                raise UserError(
                    f"{path}: has text and `{chat}`, but fits no schema; its columns: {', '.join(rows[0])}. "
                    "Give --stage pretrain if it is text; else say which columns hold what with data/convert_chat.py "
                    "--map prompt=question,completion=answer"
                )
            texts = [row[key] for row in rows for key in args.text_key if isinstance(row.get(key), str)]
            if texts and all(map(CHAT_TEXT.match, texts)):
                raise UserError(
                    f"{path}: its texts are chats in a template, beginning {texts[0][:40]!r}. Give --stage pretrain "
                    "if that is meant; fine-tuning needs a list of messages in each row, without the template's marks"
                )
            return None
    return find_schema(path, KINDS.get(args.stage))


@dataclass
class Examined:
    """What is known about a row, or about one standard row of it, before it is compared with the others."""

    fault: str = ""
    remarks: Counter = field(default_factory=Counter)
    unread: list[str] = field(default_factory=list)  # columns that nothing reads
    text: str = ""  # "" if the row is left out
    language: str = ""
    fingerprint: int = 0
    question: int | None = None  # its fingerprint
    is_standard: bool = True
    sequences: list[TokenSequence] = field(default_factory=list)
    benchmark_item: str = ""


class Doctor:
    """Checks rows and collects `findings`. Keeps two hashes and a length of each row in memory."""

    def __init__(
        self,
        kind: str,
        max_length: int,
        tokenizer: PreTrainedTokenizerBase | None,
        benchmarks: list[str],
    ):
        self.tokenizer = tokenizer
        self.checker = RowChecker(kind, special_tokens(tokenizer) if tokenizer else (), benchmarks, tokenizer)
        self.findings = Findings(kind, max_length, tokenizer, benchmarks)

    def add_rows(self, path: Path, rows: Iterable[Row], schema: Schema | None) -> None:
        """Count the rows of a file. Those of a large file are examined by all processors."""
        workers = os.cpu_count() or 1
        is_large = path.stat().st_size > LARGE_FILE
        chunks = split_into_chunks(rows)
        if workers == 1 or not is_large or self.checker.index or "fork" not in get_all_start_methods():
            for chunk in chunks:
                self._count_chunk(path, chunk, self.examine(chunk, schema))
            return
        # `_forked` is inherited by the processes, not sent to them.
        _forked[:] = [self, schema]
        context = get_context("fork")
        with ProcessPoolExecutor(workers, context) as pool:
            pending: deque = deque()
            for chunk in chunks:
                pending.append((chunk, pool.submit(_examine_chunk, chunk)))
                if len(pending) > 2 * workers:
                    chunk, future = pending.popleft()
                    self._count_chunk(path, chunk, future.result())
            for chunk, future in pending:
                self._count_chunk(path, chunk, future.result())

    def _count_chunk(self, path: Path, chunk: list[Row], all_examined: list[list[Examined]]) -> None:
        for row, examined in zip(chunk, all_examined, strict=True):
            self._count((path, row.number), examined)

    def examine(self, rows: list[Row], schema: Schema | None) -> list[list[Examined]]:
        """Check rows; return what is known about each standard row that each of them stands for."""
        if schema:
            all_checked = self.checker.check_all(rows, schema)
            return [self._examine_chat(row, checked) for row, checked in zip(rows, all_checked, strict=True)]
        examined = [self._examine_text(row) for row in rows]
        documents = [each for each in examined if each.text]
        if self.tokenizer and documents:
            texts = [each.text for each in documents]
            encoded = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
            for each, ids in zip(documents, encoded, strict=True):
                each.sequences = [TokenSequence(ids, [1] * len(ids))]
        return [[each] for each in examined]

    def _examine_chat(self, row: Row, checked: CheckedRow) -> list[Examined]:
        if checked.fault:
            return [Examined(fault=checked.fault)]
        keys = FORMS[self.findings.kind]
        rows = []
        for standard, sequences, item in zip(
            checked.standard, checked.sequences, checked.benchmark_items, strict=True
        ):
            question = next(turn["content"] for turn in standard[keys[0]] if turn["role"] == "user")
            text = row_text(standard, self.findings.kind)
            rows.append(
                Examined(
                    remarks=count_remarks(standard),
                    text=text,
                    language=language(text, min_han=MIN_HAN, max_accented=MAX_ACCENTED),
                    fingerprint=fingerprint(identity(standard, keys)),
                    question=fingerprint(visible(question)),
                    # The file needs conversion if a key differs. Null and empty count as missing.
                    is_standard=all(
                        (row.content.get(key) or None) == standard.get(key)
                        for key in (*keys, "tools", TEMPLATE_OPTIONS)
                    ),
                    sequences=sequences,
                    benchmark_item=item,
                )
            )
        if checked.escaped:
            rows[0].remarks["texts that look like a special token; the converter escapes them"] += checked.escaped
        rows[0].unread = checked.unread
        return rows

    def _examine_text(self, row: Row) -> Examined:
        """Examine one document of pretraining text; an unreadable one is bad, an empty one is left out."""
        if row.error:
            return Examined(fault=row.error)
        text = row.content
        if not text.strip():
            return Examined(remarks=Counter(["empty documents, which data/prepare_pretrain.py leaves out"]))
        remarks = {
            "documents that are chats in a template; fine-tuning needs them as messages": CHAT_TEXT.match(text),
            "documents with U+FFFD: text was lost in decoding": "\ufffd" in text,
            "documents in a wrong encoding (mojibake)": is_bad(text),
            "documents with control characters": CONTROL.search(text.replace("\r", "")),
        }
        return Examined(
            remarks=Counter(name for name, found in remarks.items() if found),
            text=text,
            language=language(text, min_han=MIN_HAN, max_accented=MAX_ACCENTED),
            fingerprint=fingerprint(visible(text)),
            benchmark_item=self.checker.find_item(text),
        )

    def _count(self, place: tuple[Path, int], rows: list[Examined]) -> None:
        findings = self.findings
        for row in rows:
            findings.remarks.update(row.remarks)
            findings.unread.update(row.unread)
            if row.fault:
                findings.add_fault(row.fault, place)
            if not row.text:
                continue
            findings.rows += 1
            findings.not_standard += not row.is_standard
            findings.languages[row.language] += 1
            if row.question is not None:
                findings.add_seen("questions", row.question, place)
            findings.add_seen("rows", row.fingerprint, place)
            findings.add_example(row.language, (place, row.text, row.sequences))
            if row.sequences:
                # Each sequence of an instruction is a row of its own in training.
                together = findings.kind in ("kto", "preference")
                for sequences in [row.sequences] if together else [[each] for each in row.sequences]:
                    findings.add_sequences(sequences, place)
            else:
                findings.lengths.append(len(row.text))
            if row.benchmark_item:
                findings.benchmark_rows += 1
                findings.note("benchmarks", (*place, row.benchmark_item))


_forked: list = []  # the doctor and the schema of the file, for the processes that `Doctor.add_rows` forks


def split_into_chunks(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """Yield the rows in lists of `ROWS_PER_TASK` rows, or fewer if they are long."""
    chunk, characters = [], 0
    for row in rows:
        chunk.append(row)
        characters += len(row.content if isinstance(row.content, str) else str(row.content))
        if len(chunk) == ROWS_PER_TASK or characters >= CHARACTERS_PER_TASK:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def _examine_chunk(rows: list[Row]) -> list[list[Examined]]:
    doctor, schema = _forked
    return doctor.examine(rows, schema)


def visible(text: str) -> str:
    """Return a text without what no reader sees: zero-width characters, and how wide a space is."""
    return " ".join(INVISIBLE.sub("", text).split())


def identity(standard: dict[str, Any], keys: tuple[str, ...]) -> str:
    """Return what makes a standard row different from others: the visible text, roles, calls, tools and label."""
    turns = []
    for key in keys:
        turns += [[turn["role"], visible(turn["content"]), turn.get("tool_calls")] for turn in standard[key]]
    others = [standard.get(key) for key in ("tools", "label", TEMPLATE_OPTIONS)]
    return SORTED_JSON.encode([turns, *others])


def fingerprint(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


if __name__ == "__main__":
    run_script(main)
